"""One sequence over all GPUs, by context parallelism."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from polymamba.core import LanguageModel, LanguageModelConfig
from polymamba.core.parallel import context_parallel

from .bench import Bench
from .steps import build, parallel, parameters, train_step


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
