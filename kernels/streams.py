"""Work of a GPU in several streams, where that costs the host nothing: as branches of a CUDA graph that is recorded."""

import threading
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")
_ASIDE = 0  # the number of its branch; those side by side have 1, 2, ..
_here = threading.local()  # branching: whether this thread is at work in `side_by_side`


def side_by_side(work: Callable[[int], Tensor], n: int, x: Tensor, may_branch: bool) -> list[Tensor]:
    """[work(0), .., work(n - 1)], which do not depend on each other; x: where they run.

    While a CUDA graph is recorded each is a branch of it: kernels of one fill the multiprocessors that the last blocks
    of another's leave idle. Launched one by one they wait for the host anyhow, which another stream would cost more.
    """
    if n == 1 or not may_branch or not x.is_cuda or not torch.cuda.is_current_stream_capturing():
        return [work(i) for i in range(n)]
    current = torch.cuda.current_stream(x.device)
    begin = current.record_event()
    before, _here.branching = _is_branching(), True
    try:
        results = [work(0)]
        for i in range(1, n):
            branch = _branch(x.device, i)
            branch.wait_event(begin)
            with torch.cuda.stream(branch):
                results.append(work(i))
            current.wait_stream(branch)  # so memory of a branch is free for the next one to begin in it
    finally:
        _here.branching = before
    return results


def _is_branching() -> bool:
    return getattr(_here, "branching", False)


def aside(work: Callable[[], Found], x: Tensor) -> Callable[[], Found]:
    """A function that returns work()'s result, to be called once, where that is first read; x: where it runs.

    While a CUDA graph is recorded the work is a branch of it, which that call ends: small kernels cost nothing beside
    large ones. The work's inputs and its result must live until then and until they were read, respectively. Not within
    `side_by_side`: a result's memory is used anew after a wait for the stream of the next caller alone, while work of
    another branch may still read it.
    """
    if not x.is_cuda or _is_branching() or not torch.cuda.is_current_stream_capturing():
        found = work()
        return lambda: found
    branch = _branch(x.device, _ASIDE)
    branch.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(branch):
        result = work()

    def joined() -> Found:
        torch.cuda.current_stream(x.device).wait_stream(branch)
        return result

    return joined


@cache
def _branch(device: torch.device, i: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
