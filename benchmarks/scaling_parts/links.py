"""What the links do: the constants of docs/scaling.md."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from polymamba.bytes import ByteLM
from polymamba.core.sharded import UNIT

from .bench import Bench
from .sizes import byte_model
from .steps import build

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
