"""Training on 1, 2, 4, ... GPUs of one host: data parallel, FSDP2, sequences in pieces, experts spread.

    torchrun --nproc-per-node 4 benchmarks/scaling.py [--only links|context|lm|experts|vision ...] [--output FILE]

Each number of GPUs is a group of the processes that torchrun started; the others wait meanwhile. A step is forward,
loss, backward and AdamW, bf16 by autocast, of random data that lies on the GPU; medians of STEPS after WARM. Weak: each
GPU has the same work at every number of GPUs; strong: all share the work of one, where it says so in batches whose
gradients are added up. Recorded: forward and backward by CUDA graph, as by `train --cuda-graph`. "of n": the rate, over
n times that of one GPU. Memory is what PyTorch has reserved at the peak, on the GPU with most. About 150 s on two
H100s; the file is written anew after each line. --tiny tries the script on CPUs (gloo).
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from polymamba.core.division import average_gradients
from polymamba.core.expert_parallel import spread_experts
from polymamba.core.parallel import context_parallel
from polymamba.core.replayed import WARM_UPS, Replayed, own_stream
from polymamba.core.sharded import UNIT, shard

WARM, STEPS = WARM_UPS + 1, 4
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of VMamba's convolutions, in DDP


@dataclass(frozen=True)
class Sizes:
    lm: BackboneConfig
    lm_length: int
    lm_batch: int  # of each GPU, weak; all of them share 4 times, and 16 times as many, strong
    image_model: str
    image_size: int
    image_batch: int  # as lm_batch; strong: 4 times as many
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
            with own_stream(self.device) if self.cuda else nullcontext():  # where a step can be recorded
                result = self._measured(n, make(n))
        if self.cuda:
            torch.cuda.empty_cache()
        meet()
        return result if self.rank == 0 else None

    def _measured(self, n: int, step: Callable[[], object]) -> tuple[float, float]:
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
        peak = torch.cuda.max_memory_reserved() / 2**30 if self.cuda else 0.0
        worst = torch.tensor([statistics.median(times), peak], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.groups[n])
        return worst[0].item(), worst[1].item()

    def series(
        self,
        name: str,
        work: Callable[[int], int],
        make: Callable[[int], Any],
        *,
        first: int = 1,
        one: float | None = None,
    ) -> float | None:
        """A line for each number of GPUs n, from the first one on, of work(n) units a step.

        Returns the rate of one GPU, on the first process; `one` is that, if it has been measured.
        """
        for n in [n for n in self.counts if n >= first]:
            found = self.measure(n, make)
            if found is None:
                continue
            rate = work(n) / found[0]
            one = one or rate / n
            self.say(
                f"| {name} | {n} | {work(n):,} | {found[0] * 1e3:,.1f} | {rate:,.0f} | {rate / (n * one):.0%} "
                f"| {found[1]:.1f} |"
            )
        return one

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


def byte_model(backbone: BackboneConfig) -> LanguageModelConfig:
    return LanguageModelConfig(backbone=backbone, vocab_size=320, tie_embeddings=False)


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


def train_step(
    bench: Bench, model: Any, loss_of: Callable[[Any, Any], torch.Tensor], batches: Sequence[Any] = (None,)
) -> Callable[[], object]:
    """A step over batches whose gradients are added up; loss_of(model, batch)."""
    optimizer = bench.optimizer(model)

    def step() -> None:
        for i, batch in enumerate(batches):
            last = i + 1 == len(batches)
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext():
                with bench.autocast():
                    loss = loss_of(model, batch) / len(batches)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def recorded_step(
    bench: Bench, model: Any, loss_of: Callable[[Any, Any], torch.Tensor], batches: Sequence[Any], n: int
) -> Callable[[], object]:
    """The same, of which forward and backward are a CUDA graph; gradients of n processes meet after the last one."""
    optimizer, parameters = bench.optimizer(model), list(model.parameters())

    def gradients(batch: Any) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        with bench.autocast():
            loss = loss_of(model, batch) / len(batches)
        loss.backward()
        return [p.grad for p in parameters]

    replayed = Replayed(gradients, bench.device) if bench.cuda else gradients

    def step() -> None:
        total = replayed(batches[0])
        for i, batch in enumerate(batches[1:]):
            total = [g.clone() for g in total] if i == 0 else total
            torch._foreach_add_(total, replayed(batch))
        for p, g in zip(parameters, total, strict=True):
            p.grad = g
        if n > 1:
            average_gradients(parameters, bench.groups[n])
        optimizer.step()

    return step


# Language model


def language_models(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return ByteLM(byte_model(s.lm))

    def loss_of(net: Any, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    def make(how: str, n_batches: Callable[[int], int], size: Callable[[int], int]) -> Callable[[int], Any]:
        """A step of n_batches(n) batches of size(n) sequences on each of n GPUs."""

        def made(n: int) -> Callable[[], object]:
            net = build(bench, model)
            shape = size(n), s.lm_length + 1
            batches = [torch.randint(256, shape, device=bench.device) for _ in range(n_batches(n))]
            if how == "recorded":
                return recorded_step(bench, net, loss_of, batches, n)
            return train_step(bench, parallel(bench, net, n, how), loss_of, batches)

        return made

    bench.table(f"Byte language model of {parameters(build(bench, model))}, sequences of {s.lm_length:,}", "tokens")
    kinds = (("ddp", "ddp"), ("fsdp", "fsdp"), ("recorded, gradients after it", "recorded"))
    for name, kinds_, n_batches, size, total in (
        ("weak", kinds, lambda n: 1, lambda n: s.lm_batch, lambda n: n * s.lm_batch),
        ("strong", kinds, lambda n: 1, lambda n: max(1, 4 * s.lm_batch // n), lambda n: 4 * s.lm_batch),
        # What is too much for one GPU at once, in batches of twice the size: too long to wait for the host.
        ("strong, added up", kinds[:2], lambda n: max(1, 8 // n), lambda n: 2 * s.lm_batch, lambda n: 16 * s.lm_batch),
    ):
        one = None
        for label, how in kinds_:
            steps = make(how, n_batches, size)
            first = 2 if how == "fsdp" else 1  # on one GPU it is what ddp is there
            rate = bench.series(
                f"{name}: {label}",
                lambda n, total=total: total(n) * s.lm_length,
                steps,
                first=first,
                one=one if how == "fsdp" else None,
            )
            one = one or rate
    bench.say("")


# Images


def images(bench: Bench) -> None:
    s = bench.sizes

    def model() -> torch.nn.Module:
        return timm.create_model(s.image_model, num_classes=1000)

    def loss_of(net: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(net(batch[0]).float(), batch[1])

    def make(how: str, batch_of: Callable[[int], int]) -> Callable[[int], Callable[[], object]]:
        def made(n: int) -> Callable[[], object]:
            net = build(bench, model)
            x = torch.randn(batch_of(n), 3, s.image_size, s.image_size, device=bench.device)
            batch = x, torch.randint(1000, (batch_of(n),), device=bench.device)
            if how == "recorded":
                return recorded_step(bench, net, loss_of, [batch], n)
            return train_step(bench, parallel(bench, net, n, how), loss_of, [batch])

        return made

    bench.table(f"{s.image_model}, {parameters(build(bench, model))}, {s.image_size} x {s.image_size}", "images")
    most = 4 * s.image_batch
    for label, how in (("ddp", "ddp"), ("recorded, gradients after it", "recorded")):
        bench.series(f"weak: {label}", lambda n: n * s.image_batch, make(how, lambda n: s.image_batch))
        bench.series(f"strong: {label}", lambda n: most, make(how, lambda n: max(1, most // n)))
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

            def loss_of(net: Any, _: None) -> torch.Tensor:
                return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[0, 1:])

            inner = train_step(bench, net, loss_of)
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
        "state passing: all collectives of the context, in forward and backward, and the waiting for slower GPUs in "
        "them. second scan: what one GPU takes more in a context of its own than without.",
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
        return ByteLM(byte_model(s.experts))

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

            def loss_of(net: Any, _: None) -> torch.Tensor:
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

AT_A_TIME = 50  # small collectives of a measurement


def links(bench: Bench) -> None:
    s = bench.sizes
    n_state = s.dna.d_inner * (s.dna.d_state + 1)
    n_weights = sum(p.numel() for p in build(bench, lambda: ByteLM(byte_model(s.lm))).parameters())

    def numbers(n: int) -> torch.Tensor:
        return torch.ones(n, device=bench.device)

    def all_gather(n: int, size: int) -> Callable[[], object]:
        own, everyones = numbers(size), numbers(n * size)
        return lambda: dist.all_gather_into_tensor(everyones, own, group=bench.groups[n])

    def reduce_scatter(n: int, size: int) -> Callable[[], object]:
        own, everyones = numbers(size), numbers(n * size)
        return lambda: dist.reduce_scatter_tensor(own, everyones, group=bench.groups[n])

    def all_reduce(n: int, size: int) -> Callable[[], object]:
        own = numbers(size)
        return lambda: dist.all_reduce(own, group=bench.groups[n])

    def send(n: int, size: int) -> Callable[[], object]:
        """To the next process; from the one before."""
        own, other = numbers(size), numbers(size)
        after, before = (bench.rank + 1) % n, (bench.rank - 1) % n

        def step() -> None:
            sends = [dist.P2POp(dist.isend, own, after, bench.groups[n])]
            for work in dist.batch_isend_irecv([*sends, dist.P2POp(dist.irecv, other, before, bench.groups[n])]):
                work.wait()

        return step

    # name, collective, numbers of the own part, numbers received over these, how often
    def kinds(n: int) -> list[tuple[str, Callable[[int, int], Callable[[], object]], int, float, int]]:
        part = UNIT // n if bench.cuda else 8
        return [
            ("all-gather of one number", all_gather, 1, n - 1, AT_A_TIME),
            ("all-gather of a layer's state", all_gather, n_state, n - 1, AT_A_TIME),
            ("reduce-scatter of its gradient", reduce_scatter, n_state, n - 1, AT_A_TIME),
            ("a layer's state to the next one", send, n_state, 1, AT_A_TIME),
            ("all-gather of a unit of weights (fsdp)", all_gather, part, n - 1, 4),
            ("reduce-scatter of its gradients", reduce_scatter, part, n - 1, 4),
            ("all-reduce of the language model's gradients", all_reduce, n_weights, 2 * (n - 1) / n, 4),
        ]

    bench.say("## Links", "", "| | GPUs | bytes | ms | GB/s |", "|---|---|---|---|---|")
    for n in bench.counts[1:]:
        for name, collective, size, received, times in kinds(n):

            def make(n: int, collective=collective, size=size, times=times) -> Callable[[], object]:
                one = collective(n, size)
                return lambda: [one() for _ in range(times)]

            found = bench.measure(n, make)
            if found is not None:
                seconds, n_bytes = found[0] / times, 4 * received * size
                bench.say(f"| {name} | {n} | {n_bytes:,.0f} | {seconds * 1e3:.3f} | {n_bytes / seconds / 1e9:.1f} |")
    bench.say("", "bytes: what a GPU receives, by a ring; ms: of one of several that follow one another", "")


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
