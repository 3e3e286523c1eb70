"""Gradients of several processes, averaged: after their backward, or while it goes on.

The last layers' gradients are there long before the first layers' are. So they go round meanwhile, in buckets, and
what is left to wait for after the backward is the last bucket. A CUDA graph of the backward (replayed.py) holds both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .sharded import here

AT_ONCE = 1 << 26  # gradients that are put side by side, to go round in one operation
BUCKET = 1 << 24  # and while others are still made


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Give each process of a group the mean of all their gradients."""
    for some in _in_buckets(parameters, AT_ONCE):
        for p in some:
            if p.grad is None:  # of a process that had no batch in this step
                p.grad = torch.zeros_like(p)
        gradients = [here(p.grad) for p in some]
        flat = torch.cat([g.flatten() for g in gradients])
        if flat.is_cuda:
            dist.all_reduce(flat, dist.ReduceOp.AVG, group=group)
        else:  # gloo knows sums only
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


class Averaging:
    """Averages the gradients of a backward while it goes on, in a stream of its own.

    All processes of the group have to make one, for the same parameters, and to run the backward at the same time.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Any):
        self.group = group
        self.buckets = _in_buckets(parameters[::-1], BUCKET)  # about as a backward comes to them
        self.stream = torch.cuda.Stream(parameters[0].device) if parameters[0].is_cuda else None
        self._missing: list[int] = []  # gradients of each bucket
        self._sent = 0  # buckets: one after the other, on all processes

    @contextmanager
    def on(self) -> Iterator[None]:
        """In which the backward runs; no parameter has a gradient before it."""
        self._missing, self._sent = [len(bucket) for bucket in self.buckets], 0
        hooks = [
            p.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i))
            for i, bucket in enumerate(self.buckets)
            for p in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:  # they would keep their parameters for ever
                hook.remove()
        while self._sent < len(self.buckets):  # of parameters that the loss does not depend on
            self._send()
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    def _arrived(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        while self._sent < len(self.buckets) and not self._missing[self._sent]:
            self._send()

    def _send(self) -> None:
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # of None: nothing
            average_gradients(self.buckets[self._sent], self.group)
        self._sent += 1


def _in_buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """In their order; of more numbers than that, one alone."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for p in parameters:
        if not buckets or here(p).numel() > room:
            buckets.append([])
            room = most
        buckets[-1].append(p)
        room -= here(p).numel()
    return buckets
