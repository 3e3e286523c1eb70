"""The selective scan, the convolution and the Mamba block on a GPU: milliseconds, peak memory, share of the limit.

    python benchmarks/scan.py [--output benchmarks/results/scan_h200.md] [--picture benchmarks/results/scan_h200.png]
                              [--backend triton]
    python benchmarks/scan.py --complex [--output ...]      complex A: the Triton kernels beside plain PyTorch, by the
                                                            host's clock

bf16 inputs, float32 A, D and bias, softplus; medians of `triton.testing.do_bench` (CUDA events; it overwrites the
second-level cache between runs). A time is of calls recorded as one CUDA graph, as `--cuda-graph` launches them: of a
short scan in the table up to eight, each on inputs of its own, so that none is found in the second-level cache and the
3 us between two events are shared; of all else, and in the picture, one. In brackets behind it the time of a single
call launched by Python, for which a short one may have to wait. The limit is the larger of two times: each input read
and each output written once at the copy bandwidth measured in the same run, and one exp2 a (token, channel, state) at
16 a cycle and multiprocessor at 1.98 GHz. "Official" are mamba-ssm's CUDA kernels (built for sm_90) on an H100 in
another run, launched by Python, for orientation.

The picture: time against length at the shape of Figure 8 of the Mamba paper (batch 1, 1024 channels, 16 states), beside
PyTorch's causal attention of the same width (16 heads of 64).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from machine import describe
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from polymamba.core import Mamba
from polymamba.core.replayed import WARM_UPS, Replayed, own_stream
from polymamba.core.speed import median_seconds
from polymamba.kernels import causal_conv1d, info, selective_scan

SHAPES = {  # batch, channels, length, states, groups, gate: official forward and backward, ms
    (8, 2048, 2048, 16, 1, True): (0.595, 2.404),
    (1, 5120, 2048, 16, 1, True): (0.200, 0.918),
    (2, 2048, 8192, 16, 1, True): (0.746, 2.549),
    (128, 384, 197, 16, 1, True): (0.394, 1.209),
    (64, 768, 3136, 1, 4, False): (1.055, 2.819),
    (64, 3072, 196, 1, 4, False): (0.297, 0.879),
    (8, 2048, 2048, 64, 1, True): (1.971, 9.339),
    (8, 128, 65536, 16, 1, True): (1.466, 5.630),
    (1, 2048, 131072, 16, 1, True): (5.95, 22.63),
    (8, 512, 131072, 16, 1, True): (11.37, 43.13),
    (1, 512, 1048576, 16, 1, True): (11.74, 60.93),
}
BLOCKS = {  # batch, length, d_model: official forward, forward and backward, ms; peak GiB
    (8, 2048, 1024): (1.06, 4.60, 0.96),
    (1, 1048576, 256): (16.5, 88.2, 13.9),
}
COMPLEX_SHAPES = [
    *((8, 2048, 2048, 16, 1, True), (128, 384, 197, 16, 1, True), (1, 512, 65536, 16, 1, True)),
    (8, 512, 2048, 64, 1, True),
]
CLOCK = 1.98e9
MOST_CALLS = 8  # recorded together


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def scan_inputs(
    batch: int, channels: int, length: int, states: int, groups: int, gate: bool
) -> list[torch.Tensor | None]:
    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    u, z = randn(batch, length, channels), randn(batch, length, channels) if gate else None
    delta, A = randn(batch, length, channels) * 0.5, -torch.rand(channels, states, device="cuda") * states - 0.1
    B, C = randn(batch, length, groups, states), randn(batch, length, groups, states)
    D, bias = randn(channels, dtype=torch.float32), randn(channels, dtype=torch.float32) - 4
    return [u, delta, A, B, C, D, z, bias]


class Milliseconds(NamedTuple):
    graphed: float
    launched: float

    @classmethod
    def of(cls, *works: Callable[[], object]) -> "Milliseconds":
        """Of one of several equal works in a stream of its own: recorded, of all of them; launched, of the first."""
        launched = do_bench(works[0], return_mode="median")
        replayed = Replayed(lambda _: [work() for work in works], torch.device("cuda"))
        for _ in range(WARM_UPS + 1):
            replayed(())
        return cls(do_bench(lambda: replayed(()), return_mode="median") / len(works), launched)

    def __str__(self) -> str:
        return f"{self.graphed:.3f} ({self.launched:.3f})"


def measure(sets: list[list[torch.Tensor | None]], backend: str | None) -> tuple[Milliseconds, Milliseconds, float]:
    """(of the forward, of the backward, MiB that both add at their peak). sets: of inputs, one a call."""
    leaves = [[None if x is None else x.detach().requires_grad_() for x in inputs] for inputs in sets]

    def forward(given: list[torch.Tensor | None]) -> torch.Tensor:
        return selective_scan(*given[:7], delta_bias=given[7], delta_softplus=True, backend=backend)

    def backward(given: list[torch.Tensor | None], y: torch.Tensor, dy: torch.Tensor) -> object:
        return torch.autograd.grad(y, [x for x in given if x is not None], dy, retain_graph=True)

    with torch.no_grad():
        of_forward = Milliseconds.of(*[partial(forward, given) for given in leaves])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward(leaves[0])
    dy = torch.randn_like(y)
    backward(leaves[0], y, dy)
    peak = torch.cuda.max_memory_allocated() - before
    of_backward = Milliseconds.of(*[partial(backward, given, forward(given), torch.randn_like(dy)) for given in leaves])
    return of_forward, of_backward, peak / 2**20


def table(bandwidth: float, backend: str | None) -> list[str]:
    exps = 16 * torch.cuda.get_device_properties(0).multi_processor_count * CLOCK
    of_direction = "limit | share | official"
    lines = [f"| B, D, L, N | G | z | forward ms | {of_direction} | backward ms | {of_direction} | peak MiB |"]
    lines += ["|" + "---|" * 12]
    for shape, official in SHAPES.items():
        batch, channels, length, states, groups, gate = shape
        elements = batch * channels * length
        with own_stream(torch.device("cuda")):
            n_calls = min(max(2**27 // elements, 1), MOST_CALLS)
            *times, peak = measure([scan_inputs(*shape) for _ in range(n_calls)], backend)
        matrices = 2 * batch * length * groups * states * 2
        moved = elements * 2 * (4 if gate else 3) + matrices, elements * 2 * (7 if gate else 5) + 2 * matrices
        cells = [f"{batch}, {channels}, {length}, {states}", str(groups), "yes" if gate else "no"]
        for time, n_bytes, peer in zip(times, moved, official, strict=True):
            limit = 1e3 * max(n_bytes / bandwidth, elements * states / exps)
            cells += [str(time), f"{limit:.3f}", f"{limit / time.graphed:.0%}", f"{peer:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {peak:.0f} |")
    return lines


def complex_table() -> list[str]:
    """Of complex A, B and C, as Python launches it."""
    backends = {"triton": 30, "torch": 3}  # and how often: a call of PyTorch's takes up to 2 s
    lines = [f"| B, D, L, N | {' | '.join(f'{b}: forward ms | backward ms | peak MiB' for b in backends)} |"]
    lines += ["|" + "---|" * 7]
    for shape in COMPLEX_SHAPES:
        u, delta, A, B, C, D, z, bias = scan_inputs(*shape)
        A, B, C = (torch.complex(x.float(), torch.randn_like(x.float())) for x in (A, B, C))
        leaves = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]
        cells = [", ".join(map(str, shape[:4]))]
        for backend, repeats in backends.items():
            scan = partial(selective_scan, *leaves[:7], delta_bias=bias, delta_softplus=True, backend=backend)
            with torch.no_grad():
                cells.append(f"{1e3 * median_seconds(scan, u.device, repeats):.3f}")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = scan()
            back = partial(torch.autograd.grad, y, leaves, torch.randn_like(y), retain_graph=True)
            back()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            cells += [f"{1e3 * median_seconds(back, u.device, repeats):.3f}", f"{peak:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def blocks() -> list[str]:
    """A table of the Mamba block in training, bf16."""
    lines = ["| B, L, d_model | forward ms | official | forward and backward ms | official | peak GiB | official |"]
    lines += ["|" + "---|" * 7]
    for (batch, length, width), official in BLOCKS.items():
        model = Mamba(width).cuda().bfloat16()
        x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)

        def train(model=model, x=x, dy=dy) -> None:
            torch.autograd.grad(model(x), (x, *model.parameters()), dy)

        with own_stream(x.device):
            times = [Milliseconds.of(work) for work in (partial(model, x), train)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        ours = (*map(str, times), f"{peak:.2f}")
        cells = [str(cell) for pair in zip(ours, official, strict=True) for cell in pair]
        lines.append(f"| {batch}, {length}, {width} | {' | '.join(cells)} |")
    return lines


def against_length(backend: str | None) -> tuple[list[str], list[tuple[int, float, float | None]]]:
    """A table, and its rows: (length, ms of the scan forward, ms of attention)."""
    rows = []
    device = torch.device("cuda")
    for length in [2**k for k in range(9, 21)]:
        u, delta, A, B, C, D, z, bias = scan_inputs(1, 1024, length, 16, 1, True)
        scan = partial(selective_scan, u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=True, backend=backend)
        heads = torch.randn(1, 16, length, 64, device="cuda", dtype=torch.bfloat16)
        attention = None
        if length <= 2**16:
            attend = partial(scaled_dot_product_attention, heads, heads, heads, is_causal=True)
            with own_stream(device):
                attention = Milliseconds.of(attend).graphed
        with own_stream(device):
            rows.append((length, Milliseconds.of(scan).graphed, attention))
    lines = ["| L | scan ms | attention ms |", "|---|---|---|"]
    lines += [f"| {n} | {scan:.3f} | {'' if other is None else f'{other:.3f}'} |" for n, scan, other in rows]
    return lines, rows


def draw(rows: list[tuple[int, float, float | None]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(*zip(*[row[:2] for row in rows], strict=True), "o-", label="selective scan")
    pairs = [(length, other) for length, _, other in rows if other is not None]
    axes.loglog(*zip(*pairs, strict=True), "s--", label="causal attention")
    axes.set(xlabel="length", ylabel="forward, ms", title="Batch 1, width 1024, 16 states, bf16")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def report(backend: str | None, picture: Path | None) -> str:
    bandwidth = copy_bandwidth()
    chosen = backend or info()["selective_scan on cuda"]
    lines = ["# Selective scan on the GPU", "", *describe(), f"copy: {bandwidth / 1e12:.2f} TB/s", f"backend: {chosen}"]
    lines += ["", *table(bandwidth, backend)]
    x = torch.randn(8, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2048, 4, device="cuda"), torch.randn(2048, device="cuda")
    with own_stream(x.device):
        ms = Milliseconds.of(lambda: causal_conv1d(x, weight, bias)).graphed
    share = 4 * x.numel() / bandwidth * 1e3 / ms
    lines += ["", f"causal_conv1d 8 x 2048 x 2048, width 4, SiLU: forward {ms:.3f} ms, {share:.0%} of copy bandwidth"]
    if backend is None:  # a block chooses for itself
        lines += ["", "The Mamba block, in training:", "", *blocks()]
    if picture:
        text, rows = against_length(backend)
        draw(rows, picture)
        lines += [
            "",
            "Forward at batch 1, width 1024, 16 states, beside causal attention of 16 heads of 64:",
            "",
            *text,
        ]
        lines += ["", f"![time against length]({picture.name})"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--complex", action="store_true")
    args = parser.parse_args()
    if args.complex:
        text = "\n".join(["# Selective scan of complex A on the GPU", "", *describe(), "", *complex_table()]) + "\n"
    else:
        text = report(args.backend, args.picture)
    print(text)
    if args.output:
        args.output.write_text(text)
