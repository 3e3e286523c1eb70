"""The processes, how a step is measured in them, and the lines of the report."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe
from torch.distributed.device_mesh import DeviceMesh

from polymamba.core.processes import everyones, from_first
from polymamba.core.replayed import WARM_UPS, own_stream

from .sizes import Sizes

WARM, ROUNDS, IN_A_ROW = WARM_UPS + 1, 3, 2  # steps


class Ended(Exception):
    """A part of the report, by failure of a process or for want of time: on all processes."""


class Bench:
    def __init__(self, sizes: Sizes, output: Path | None, seconds: float):
        """seconds: for all parts."""
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
        self.end = self.end_of_part = self.began + seconds

    def part(self, name: str, run: Callable[["Bench"], None], left: int) -> None:
        """Run one of the parts that are left, in its share of the time that is."""
        now = time.monotonic()
        self.end_of_part = now + (self.end - now) / left
        how = "done"
        try:
            run(self)
        except Ended as ended:
            how = str(ended)
        self.say("", f"({name}: {how}, at {time.monotonic() - self.began:.0f} s)", "")

    def close(self) -> None:
        dist.destroy_process_group()

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
        """Median seconds of a step, and peak GiB, where the first n processes run make(n)'s step; on the first one.

        Raises Ended on all processes if the part's time is over, or if it fails on each of the n, or on one before it
        waits for others.
        """
        if from_first(lambda: time.monotonic() > self.end_of_part):
            raise Ended("its time is over")
        result, problem = None, None
        if self.rank < n:
            try:
                with own_stream(self.device) if self.cuda else nullcontext():  # where a step can be recorded
                    result = self._measured(n, make(n))
            except Exception as error:  # whatever it is: there are other parts
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        gc.collect()  # models and their hooks hold each other
        if self.cuda:
            torch.cuda.empty_cache()
        if problems := [p for p in everyones(problem) if p]:
            raise Ended(f"failed on {n}: {problems[0]}")
        return result if self.rank == 0 else None

    def _measured(self, n: int, step: Callable[[], object]) -> tuple[float, float]:
        for _ in range(WARM):
            step()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(ROUNDS):
            self.synchronize()
            dist.all_reduce(torch.zeros(1), group=self.groups[n])  # on the CPU: the GPUs stay as they are
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                step()
            self.synchronize()
            times.append((time.perf_counter() - start) / IN_A_ROW)
        peak = torch.cuda.max_memory_reserved() / 2**30 if self.cuda else 0.0
        worst = torch.tensor([statistics.median(times), peak], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.groups[n])
        return worst[0].item(), worst[1].item()

    def table(self, title: str, unit: str) -> None:
        self.say(
            *(f"## {title}", "", f"| | GPUs | {unit} a step | ms | {unit}/s | of n | GiB a GPU |"),
            "|---|---|---|---|---|---|---|",
        )

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
