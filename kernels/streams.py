"""Work of a GPU in several streams, where that costs the host nothing: as branches of a CUDA graph that is recorded."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

FIRST = -1  # priority of the streams of branches: their kernels go ahead of what else is waiting
Inputs = TypeVar("Inputs")


def side_by_side(
    prepare: Callable[[int], Inputs], work: Callable[[int, Inputs], Tensor], n: int, x: Tensor, may_branch: bool
) -> list[Tensor]:
    """[work(i, prepare(i)) for i in range(n)], which do not depend on each other; x: where they run.

    While a CUDA graph is recorded each work is a branch of it, ahead of the next preparation: where preparing waits for
    memory and working for the multiprocessors, the two together take little longer than the work. Launched one by one
    they wait for the host anyhow, which another stream would cost more.
    """
    if n == 1 or not may_branch or not x.is_cuda or not torch.cuda.is_current_stream_capturing():
        return [work(i, prepare(i)) for i in range(n)]
    current = torch.cuda.current_stream(x.device)
    branches = [_branch(x.device, i, FIRST) for i in range(n)]
    prepared, results = [], []
    for i, branch in enumerate(branches):
        prepared.append(prepare(i))  # kept until all has ended: its memory is free for what is launched next here
        branch.wait_stream(current)
        with torch.cuda.stream(branch):
            results.append(work(i, prepared[i]))
    for branch in branches:
        current.wait_stream(branch)
    return results


@cache
def _branch(device: torch.device, i: int, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)
