"""Training on 1, 2, 4, ... GPUs of one host: data parallel, FSDP2, sequences in pieces, experts spread.

    torchrun --nproc-per-node 4 benchmarks/scaling.py [--only links|context|lm|experts|vision ...] [--output FILE]

Each number of GPUs is a group of the processes that torchrun started; the others wait meanwhile. A step is forward,
loss, backward and AdamW, bf16 by autocast, of random data that lies on the GPU; medians of STEPS after WARM. Weak: each
GPU has the same work at every number of GPUs; strong: all share the work of the first line. "of n": the rate, over n
times that of one GPU. Memory is what PyTorch has allocated at the peak, on the GPU with most. About 200 s on four
H100s; the file is written anew after each line. --tiny tries the script on CPUs (gloo).
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import describe
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import polymamba.vision  # noqa: F401 - registers vmamba_* in timm
from polymamba.bytes import ByteLM
from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, MoEConfig, aux_loss
from polymamba.core.expert_parallel import spread_experts
from polymamba.core.parallel import context_parallel
from polymamba.core.sharded import shard

WARM, STEPS = 3, 5
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of VMamba's convolutions, in DDP


@dataclass(frozen=True)
class Sizes:
    lm: BackboneConfig
    lm_length: int
    lm_batch: int  # of each GPU, weak; all of them share 4 times as many, strong
    image_model: str
    image_size: int
    image_batch: int  # as lm_batch; strong: twice as many
    dna: BackboneConfig
    dna_length: int  # of the piece of each GPU, weak
    dna_longest: int
    experts: BackboneConfig
    experts_batch: int


FULL = Sizes(
    lm=BackboneConfig(d_model=768, n_layer=34),  # 129M
    lm_length=2048,
    lm_batch=8,
    image_model="vmamba_tiny_s1l8",
    image_size=224,
    image_batch=128,
    dna=BackboneConfig(d_model=256, n_layer=16),  # 7M
    dna_length=1 << 19,
    dna_longest=1 << 22,
    experts=BackboneConfig(d_model=512, n_layer=16, pattern=("mamba", "moe"), moe=MoEConfig(n_experts=32)),
    experts_batch=8,
)
TINY = Sizes(
    lm=BackboneConfig(d_model=16, n_layer=2),
    lm_length=32,
    lm_batch=1,
    image_model="vmamba_tiny_s1l8",
    image_size=32,
    image_batch=2,
    dna=BackboneConfig(d_model=16, n_layer=2),
    dna_length=128,
    dna_longest=512,
    experts=BackboneConfig(d_model=16, n_layer=2, pattern=("mamba", "moe"), moe=MoEConfig(n_experts=8)),
    experts_batch=1,
)


class Bench:
    """The processes, the device, and the lines of the report."""

    def __init__(self, sizes: Sizes, output: Path | None):
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo")
        self.sizes, self.output = sizes, output
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.counts = [n for n in (1, 2, 4, 8, 16) if n <= self.world]
        self.groups: dict[int, Any] = {n: dist.new_group(list(range(n))) for n in self.counts}  # all have to call it
        self.lines = ["# Training on several GPUs", "", *describe(), f"GPUs: {self.world}", ""]
        self.began = time.monotonic()

    def say(self, *lines: str) -> None:
        if self.rank == 0:
            self.lines += lines
            print(*lines, sep="\n", flush=True)
            if self.output:
                self.output.write_text("\n".join(self.lines) + "\n")

    def mesh(self, n: int) -> DeviceMesh:
        return DeviceMesh.from_group(self.groups[n], self.device.type)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.cuda)

    def measure(self, n: int, make: Callable[[int], Callable[[], object]]) -> tuple[float, float] | None:
        """Median seconds of a step, and peak GiB, where the first n processes run make(n)'s step; on the first one."""
        result = None
        if self.rank < n:
            step = make(n)
            for _ in range(WARM):
                step()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(STEPS):
                self.synchronize()
                meet(self.groups[n])
                start = time.perf_counter()
                step()
                self.synchronize()
                times.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
            worst = torch.tensor([statistics.median(times), peak], dtype=torch.float64)
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.groups[n])
            result = worst[0].item(), worst[1].item()
            del step
        if self.cuda:
            torch.cuda.empty_cache()
        meet()
        return result if self.rank == 0 else None

    def series(self, name: str, work: Callable[[int], int], make: Callable[[int], Any]) -> None:
        """A line for each number of GPUs n, of work(n) units a step."""
        one = None
        for n in self.counts:
            found = self.measure(n, make)
            if found is None:
                continue
            rate = work(n) / found[0]
            one = one or rate / n
            self.say(
                f"| {name} | {n} | {work(n):,} | {found[0] * 1e3:,.1f} | {rate:,.0f} | {rate / (n * one):.0%} "
                f"| {found[1]:.1f} |"
            )

    def table(self, title: str, unit: str) -> None:
        self.say(
            *(f"## {title}", "", f"| | GPUs | {unit} a step | ms | {unit}/s | of n | GiB a GPU |"),
            "|---|---|---|---|---|---|---|",
        )


def meet(group: Any = None) -> None:
    """Wait for the others, on the CPU: the GPUs stay as they are."""
    dist.all_reduce(torch.zeros(1), group=group)


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def build(bench: Bench, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    with bench.device:
        return make().train()


def parallel(bench: Bench, model: Any, n: int, how: str) -> Any:
    """how: ddp or fsdp."""
    if n == 1:
        return model
    if how == "ddp":
        ids = [bench.device.index] if bench.cuda else None
        return DistributedDataParallel(model, ids, process_group=bench.groups[n])
    shard(model, bench.mesh(n))
    return model


def train_step(bench: Bench, model: Any, loss_of: Callable[[Any], torch.Tensor]) -> Callable[[], object]:
    optimizer = bench.optimizer(model)

    def step() -> None:
        with bench.autocast():
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# Language model


def language_models(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return ByteLM(LanguageModelConfig(backbone=s.lm, vocab_size=320, tie_embeddings=False))

    def make(how: str, batch_of: Callable[[int], int]) -> Callable[[int], Callable[[], object]]:
        def made(n: int) -> Callable[[], object]:
            net = parallel(bench, build(bench, model), n, how)
            tokens = torch.randint(256, (batch_of(n), s.lm_length + 1), device=bench.device)

            def loss_of(net: Any) -> torch.Tensor:
                return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

            return train_step(bench, net, loss_of)

        return made

    bench.table(f"Byte language model of {parameters(build(bench, model))}, sequences of {s.lm_length:,}", "tokens")
    most = 4 * s.lm_batch
    for how in ("ddp", "fsdp"):
        weak = make(how, lambda n: s.lm_batch)
        bench.series(f"{how}, weak", lambda n: n * s.lm_batch * s.lm_length, weak)
        strong = make(how, lambda n: max(1, most // n))
        bench.series(f"{how}, strong", lambda n: most * s.lm_length, strong)
    bench.say("")


# Images


def images(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return timm.create_model(s.image_model, num_classes=1000)

    def make(batch_of: Callable[[int], int]) -> Callable[[int], Callable[[], object]]:
        def made(n: int) -> Callable[[], object]:
            net = parallel(bench, build(bench, model), n, "ddp")
            x = torch.randn(batch_of(n), 3, s.image_size, s.image_size, device=bench.device)
            y = torch.randint(1000, (batch_of(n),), device=bench.device)
            return train_step(bench, net, lambda net: F.cross_entropy(net(x).float(), y))

        return made

    bench.table(f"{s.image_model}, {parameters(build(bench, model))}, {s.image_size} x {s.image_size}, ddp", "images")
    bench.series("weak", lambda n: n * s.image_batch, make(lambda n: s.image_batch))
    most = 2 * s.image_batch
    bench.series("strong", lambda n: most, make(lambda n: max(1, most // n)))
    bench.say("")


# Sequences in pieces


class Clock:
    """Milliseconds of the collectives of context parallelism: what goes round, and what waits for it."""

    def __init__(self, bench: Bench):
        self.bench, self.spans = bench, []

    @contextmanager
    def running(self) -> Iterator[None]:
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
        before = {name: getattr(dist, name) for name in names}
        for name in names:
            setattr(dist, name, self._timed(before[name]))
        yield
        for name in names:
            setattr(dist, name, before[name])

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if not self.bench.cuda:
                start = time.perf_counter()
                result = collective(*args, **options)
                self.spans.append((time.perf_counter() - start) * 1e3)
                return result
            ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            ends[0].record()
            result = collective(*args, **options)
            ends[1].record()
            self.spans.append(ends)
            return result

        return run

    def milliseconds(self) -> float:
        self.bench.synchronize()
        return sum(s if isinstance(s, float) else s[0].elapsed_time(s[1]) for s in self.spans)


def pieces(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return LanguageModel(LanguageModelConfig(backbone=s.dna, vocab_size=16))

    clocks: dict[int, Clock] = {}

    def make(length_of: Callable[[int], int], cut: bool) -> Callable[[int], Callable[[], object]]:
        def made(n: int) -> Callable[[], object]:
            net: Any = build(bench, model)
            net.backbone.gradient_checkpointing = True
            net = parallel(bench, net, n, "ddp")
            tokens = torch.randint(4, (1, length_of(n) // n + 1), device=bench.device)  # the own piece, and one more
            inner = train_step(
                bench, net, lambda net: F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[0, 1:])
            )
            clocks[n] = clock = Clock(bench)

            def step() -> None:
                clock.spans.clear()
                with context_parallel(bench.groups[n]) if cut else nullcontext(), clock.running():
                    inner()

            return step

        return made

    bench.say(
        f"## One sequence over all GPUs: a DNA model of {parameters(build(bench, model))}, blocks recomputed",
        "",
        "state passing: all collectives of the context, in the forward, the recomputed one and the backward, and the "
        "waiting for slower GPUs in them. second scan: what one GPU takes more in a context of its own than without.",
        "",
        "| | GPUs | bases of a sequence | ms a step | state passing ms | bases/s | of n | GiB a GPU |",
        "|---|---|---|---|---|---|---|---|",
    )

    def line(name: str, n: int, length: int, cut: bool, one: float | None) -> float | None:
        found = bench.measure(n, make(lambda _: length, cut))
        if found is None:
            return None
        rate = length / found[0]
        share = f"{rate / (n * one):.0%}" if one else "100%"
        passing = clocks[n].milliseconds()
        bench.say(
            f"| {name} | {n} | {length:,} | {found[0] * 1e3:,.1f} | {passing:.2f} | {rate:,.0f} | {share} "
            f"| {found[1]:.1f} |"
        )
        return rate

    whole = line("no context", 1, s.dna_length, False, None)
    line("context of one: second scan", 1, s.dna_length, True, whole)
    for n in bench.counts[1:]:
        line("weak", n, n * s.dna_length, True, whole)
    for n in bench.counts[1:]:
        line("strong", n, s.dna_length, True, whole)
    line("longest", bench.counts[-1], s.dna_longest // 4 * bench.counts[-1], True, whole)
    bench.say("")


# Experts


def experts(bench: Bench) -> None:
    s = bench.sizes
    length = s.lm_length

    def model() -> torch.nn.Module:
        return ByteLM(LanguageModelConfig(backbone=s.experts, vocab_size=320, tie_embeddings=False))

    def make(how: str) -> Callable[[int], Callable[[], object]]:
        def made(n: int) -> Callable[[], object]:
            net: Any = build(bench, model)
            if how == "spread" and n > 1:
                mesh = bench.mesh(n)
                shard(net, mesh, apart=spread_experts(net, mesh))
            else:
                net = parallel(bench, net, n, "ddp")
            generator = torch.Generator(bench.device).manual_seed(bench.rank)
            shape = (s.experts_batch, length + 1)
            tokens = torch.randint(256, shape, device=bench.device, generator=generator)

            def loss_of(net: Any) -> torch.Tensor:
                logits = net(tokens[:, :-1]).flatten(0, 1).float()
                return F.cross_entropy(logits, tokens[:, 1:].flatten()) + aux_loss(net)

            return train_step(bench, net, loss_of)

        return made

    n_experts, title = s.experts.moe.n_experts, parameters(build(bench, model))
    bench.table(f"MoE-Mamba of {title}, {n_experts} experts a layer, weak", "tokens")
    for name, how in (("each GPU has all experts (ddp)", "ddp"), ("experts spread, the rest fsdp", "spread")):
        bench.series(name, lambda n: n * s.experts_batch * length, make(how))
    bench.say("")


# What the links do: the constants of docs/scaling.md

AT_A_TIME = 100  # collectives of a measurement


def links(bench: Bench) -> None:
    s = bench.sizes
    dna, lm = s.dna, build(bench, lambda: ByteLM(LanguageModelConfig(backbone=s.lm, vocab_size=320)))
    n_state, n_weights = dna.d_inner * (dna.d_state + 1), sum(p.numel() for p in lm.parameters())
    del lm

    def gathers(n: int) -> Callable[[], object]:
        own = torch.ones(n_state, device=bench.device)
        all_ = torch.empty(n * n_state, device=bench.device)

        def step() -> None:
            for _ in range(AT_A_TIME):
                dist.all_gather_into_tensor(all_, own, group=bench.groups[n])

        return step

    def reduces(n: int) -> Callable[[], object]:
        gradients = torch.ones(n_weights, device=bench.device)
        return lambda: dist.all_reduce(gradients, group=bench.groups[n])

    bench.say("## Links", "", "| | GPUs | bytes | ms | GB/s |", "|---|---|---|---|---|")
    for n in bench.counts[1:]:
        for name, size, times, make in (
            ("all-gather of a layer's state", 4 * n_state * (n - 1), AT_A_TIME, gathers),
            ("all-reduce of the language model's gradients", 8 * n_weights * (n - 1) // n, 1, reduces),
        ):
            found = bench.measure(n, make)
            if found is not None:
                seconds = found[0] / times
                bench.say(f"| {name} | {n} | {size:,} | {seconds * 1e3:.3f} | {size / seconds / 1e9:.1f} |")
    bench.say("", "bytes: what a GPU receives, by a ring", "")


PARTS = {"links": links, "context": pieces, "lm": language_models, "experts": experts, "vision": images}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    bench = Bench(TINY if args.tiny else FULL, args.output)
    for part in args.only:
        PARTS[part](bench)
        bench.say(f"({part}: done at {time.monotonic() - bench.began:.0f} s)", "")
    dist.destroy_process_group()
