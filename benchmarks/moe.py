"""A mixture-of-experts layer against loops over its experts, and against a dense layer of the size that a token uses.

    python benchmarks/moe.py [--device cpu|cuda] [--output benchmarks/results/moe_cpu.md]

32 experts, d_model 512, inner width 1536, top-1, ReLU, balance loss included; weights and inputs in bf16 and 16,384
tokens on a GPU, float32 and 1,024 tokens on a CPU. All mixtures hold the same weights, and their outputs are compared
before anything is timed. `naive` takes each expert's matrices as `weight[e]`, whose gradient autograd makes as large as
all experts' together; `unbound` is the same loop over `weight.unbind(0)`. Gradients of input and weights; medians. On a
CPU times are CPU seconds of one thread, so that other work on the machine counts little. On a GPU also as CUDA graphs,
and compiled: a layer this small is else as fast as Python can launch its kernels.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor, nn

from polymamba.core import MoE, MoEConfig

N_EXPERTS, D_MODEL, WIDTH = 32, 512, 1536
N_TOKENS = {"cpu": 1024, "cuda": 16384}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = {"cpu": 3, "cuda": 30}


class LoopOverExperts(nn.Module):
    """The layer as it is most often written, on the weights of a `MoE`."""

    def __init__(self, moe: MoE, matrices: Callable[[Tensor], Iterable[Tensor]]):
        super().__init__()
        self.moe, self.matrices = moe, matrices

    def forward(self, x: Tensor) -> Tensor:
        moe, tokens = self.moe, x.flatten(0, 1)
        routes = moe.router(tokens)
        y = torch.zeros_like(tokens)
        of_experts = zip(self.matrices(moe.in_proj.weight), self.matrices(moe.out_proj.weight), strict=True)
        for e, (w_in, w_out) in enumerate(of_experts):
            rows = (routes.experts[:, 0] == e).nonzero()[:, 0]
            y = y.index_add(0, rows, torch.relu(tokens[rows] @ w_in) @ w_out * routes.gates[rows].to(y.dtype))
        counts = F.one_hot(routes.experts[:, 0], N_EXPERTS).sum(0)
        moe.aux_loss = moe._auxiliary(routes, counts, None, len(tokens))
        return y.view(x.shape)


def by_index(weight: Tensor) -> Iterable[Tensor]:
    return (weight[e] for e in range(len(weight)))


def by_unbinding(weight: Tensor) -> Iterable[Tensor]:
    return weight.unbind(0)


class Dense(nn.Module):
    """What one token is computed with: a single expert, without a router."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(D_MODEL, WIDTH, bias=False)
        self.out_proj = nn.Linear(WIDTH, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.relu(self.in_proj(x)))


def layers(device: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    moe = MoE(D_MODEL, MoEConfig(n_experts=N_EXPERTS, d_expert=WIDTH))
    nn.init.normal_(moe.router.weight, std=D_MODEL**-0.5)
    found = {
        "ours": moe,
        "unbound": LoopOverExperts(moe, by_unbinding),
        "naive": LoopOverExperts(moe, by_index),
        "dense": Dense(),
    }
    return {name: layer.to(device, DTYPE[device]).train() for name, layer in found.items()}


def step_of(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the gradients of input and weights."""
    moe = next((module for module in layer.modules() if isinstance(module, MoE)), None)
    leaves = [x, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        if moe is None:
            return torch.autograd.grad(y, leaves, dy)
        aux_loss, moe.aux_loss = moe.aux_loss, None  # which would hold this step's graph, and that its stream
        return torch.autograd.grad([y, aux_loss], leaves, [dy, torch.ones_like(aux_loss)])

    return step


def forward_of(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return forward


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """The same by one launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(works: Sequence[Callable[[], object]], device: str) -> list[float]:
    """The median of each, in rounds, so that whatever else happens on the machine happens to all."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: list[list[float]] = [[] for _ in works]
    for round_ in range(1 + REPEATS[device]):
        for work, taken in zip(works, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                taken.append(clock() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def check(found: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """All mixtures agree, in output and gradients."""
    ours = found["ours"](x), *step_of(found["ours"], x, dy)()
    for name in ("unbound", "naive"):
        other = found[name](x), *step_of(found[name], x, dy)()
        for a, b in zip(ours, other, strict=True):
            error = ((a - b).abs().max() / b.abs().max()).item()
            assert error < (0.05 if x.dtype == torch.bfloat16 else 1e-4), f"{name}: {error:.1e}"


def report_layers(device: str) -> list[str]:
    n_tokens, found = N_TOKENS[device], layers(device)
    x = torch.randn(8, n_tokens // 8, D_MODEL, device=device, dtype=DTYPE[device]).requires_grad_()
    dy = torch.randn_like(x)
    check(found, x, dy)
    with torch.no_grad():
        counts = found["ours"].router(x.flatten(0, 1)).experts.flatten().bincount(minlength=N_EXPERTS)
    spread = f"tokens of an expert: {counts.min()} to {counts.max()}"
    rows = [(name, forward_of(layer, x), step_of(layer, x, dy)) for name, layer in found.items()]
    if device == "cuda":
        rows += [
            (f"{name}, graphed", graphed(forward), graphed(step))
            for name, forward, step in rows
            if name in ("ours", "dense")
        ]
        for name in ("ours", "dense"):
            compiled = torch.compile(found[name], fullgraph=True)
            rows.append(
                (f"{name}, compiled, graphed", graphed(forward_of(compiled, x)), graphed(step_of(compiled, x, dy)))
            )
    names, forwards, steps = zip(*rows, strict=True)
    times = dict(zip(names, zip(milliseconds(forwards, device), milliseconds(steps, device), strict=True), strict=True))
    lines = [
        f"{n_tokens:,} tokens, {DTYPE[device]}; {spread}",
        "",
        "| | forward ms | forward + backward ms | tokens/s | naive / this | rate, of dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, (forward, step) in times.items():
        kind = name.partition(",")[2]
        dense = times[f"dense,{kind}" if kind else "dense"][1]
        lines.append(
            f"| {name} | {forward:.3f} | {step:.3f} | {n_tokens / step * 1e3:,.0f} | {times['naive'][1] / step:.1f} "
            f"| {dense / step:.0%} |"
        )
    return [*lines, ""]


@torch.no_grad()
def report_steps(device: str) -> list[str]:
    """Decoding: where gathering the matrices of each token's expert is the better way."""
    moe = layers(device)["ours"].eval()
    lines = ["One token of each of so many sequences, ms:", "", "| sequences | gathered | sorted |", "|---|---|---|"]
    for batch in (1, 8, 32, 128):
        hidden = torch.randn(batch, D_MODEL, device=device, dtype=DTYPE[device])

        def gathered(hidden: Tensor = hidden) -> Tensor:
            return moe._gathered(hidden)

        def by_order(hidden: Tensor = hidden) -> Tensor:
            return moe._mixed(hidden, None, training=False)

        ways = [graphed(way) if device == "cuda" else way for way in (gathered, by_order)]
        lines.append(f"| {batch} | {' | '.join(f'{ms:.3f}' for ms in milliseconds(ways, device))} |")
    return [*lines, ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=N_TOKENS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(
        [
            f"# A mixture-of-experts layer on a {'GPU' if args.device == 'cuda' else 'CPU'}",
            "",
            *describe(),
            "",
            f"{N_EXPERTS} experts, d_model {D_MODEL}, inner width {WIDTH}, top-1",
            "",
            *report_layers(args.device),
            *report_steps(args.device),
        ]
    )
    print(text)
    if args.output:
        args.output.write_text(text)
