"""A run of several processes, which `accelerate launch` or torchrun started: who does what, and what if one fails.

    torchrun --nproc-per-node 4 -m polymamba bytes train books/ -o runs/books --accumulation 4

What needs to be done once is `from_first`, or done by the first process before the others look (`first_alone`); what
can be shared is `each_once`. All that is nothing in a run of one process.

While `watched`, each process has a thread that says every few seconds that it is alive, and that ends the process with
one line, which one of them prints, where training cannot go on: if the launcher ends the run because another process
died, and if nothing moves. They talk by the launcher's store, which most often outlives them.
"""

import itertools
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

ENDED = "another process of the run has ended"
PERIOD = 5.0  # most seconds between two signs of life


def is_first() -> bool:
    """Whether this process speaks for all: writes files, prints, tests the model after training."""
    return dist.get_rank() == 0 if joined() else int(os.environ.get("RANK", "0")) == 0


def joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Processes that work together now."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    return dist.get_rank() if joined() else 0


def join() -> None:
    """Meet the other processes, if a launcher started several and that has not happened."""
    if joined() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(days=1))  # `watched` knows better when to stop
    else:
        dist.init_process_group("gloo", timeout=timedelta(days=1))


def leave() -> None:
    """Part, when all have come here. From then on each process is alone."""
    if joined():
        wait()
        dist.destroy_process_group()


def wait() -> None:
    """For all to come here."""
    if count() > 1:
        everyones(None)


@contextmanager
def first_alone() -> Iterator[None]:
    """The body runs on the first process, then on the others, which find what it has made."""
    join()
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def from_first(work: Callable[[], T]) -> T:
    """work(), which only the first process does; the others get a copy of the result."""
    join()
    if count() == 1:
        return work()
    result = [work() if is_first() else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # pyright: ignore[reportReturnType]


def everyones(x: T) -> list[T]:
    """x of each process, by rank."""
    global _waits
    found: list[Any] = [x] * count()
    if count() > 1:
        _waits = True
        dist.all_gather_object(found, x)
        _waits = False
        moved()
    return found


def each_once(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """[work(item) for item in items]: each item on one process, all results on all, in their order."""
    results: list[Any] = [None] * len(items)
    own = []
    for item in items[rank() :: count()]:
        own.append(work(item))
        moved()
    for first, part in enumerate(everyones(own)):
        results[first :: count()] = part
    return results


# Failure

_moves = 0  # what this process has done, in steps of training, items of evaluation and meetings
_moved_at = time.monotonic()
_step = 0
_waits = False  # for others, and does nothing else


def moved(step: int | None = None) -> None:
    """To be called by what goes on, at least every few minutes. step: the step of training that begins."""
    global _moves, _moved_at, _step
    _moves, _moved_at = _moves + 1, time.monotonic()
    _step = _step if step is None else step


class _Sign(NamedTuple):
    """What a process tells of itself."""

    number: int  # of the sign: it grows while the process lives, though its work be stuck
    moves: int
    step: int
    waits: int
    name: str


@contextmanager
def watched(most_seconds: float) -> Iterator[None]:
    """See above; nothing has moved when that has been so for `most_seconds`. Where there is one process: nothing."""
    if count() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # SIGTERM comes from the launcher. The main thread may wait for a GPU that waits for the lost process, and run no
    # handler ever; but the number of the signal goes into the pipe at once.
    fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    over = threading.Event()
    moved()
    thread = threading.Thread(target=_watch, args=(reader, over, most_seconds), daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        _give_up(ENDED)
    finally:
        over.set()
        os.write(writer, b"\0")
        thread.join()
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(fd)
        os.close(reader)
        os.close(writer)


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether a collective operation says so: what it raises has no type of its own in gloo."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        words in text for words in ("onnection closed by peer", "onnection reset by peer", "gloo/transport")
    )


def _watch(reader: int, over: threading.Event, most_seconds: float) -> None:
    store = _store()
    period = min(PERIOD, most_seconds / 4)
    own, world = rank(), count()
    name = f"{socket.gethostname()}, pid {os.getpid()}"
    looks: list[list[_Sign]] = []  # at all processes, since this one's work is stuck
    for number in itertools.count():
        if select.select([reader], [], [], period)[0]:
            received = os.read(reader, 64)
            if over.is_set():
                return
            if signal.SIGTERM in received:
                _give_up(ENDED)
        try:
            store.set(f"sign/{own}", json.dumps(_Sign(number, _moves, _step, int(_waits), name)))
            if time.monotonic() - _moved_at < most_seconds:
                looks = []
                continue
            looks.append([_Sign(*json.loads(store.get(f"sign/{r}"))) for r in range(world)])
        except RuntimeError:
            if not over.is_set():
                _give_up(ENDED)
            return
        if len(looks) > 3 and (problem := stuck(looks[-4], looks[-1])):
            _give_up(f"{problem} for {most_seconds:.0f} s or more")


def stuck(before: list[_Sign], after: list[_Sign]) -> str | None:
    """Which process holds the others up, from what all told at two times; None if any of them moves."""
    for r, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.number == new.number:
            return f"process {r} ({new.name}), last heard of in step {new.step}, is silent"
    if any(old.moves != new.moves for old, new in zip(before, after, strict=True)):
        return None
    working = [(sign.step, r) for r, sign in enumerate(after) if not sign.waits]
    behind = [r for step, r in working if step == min(working)[0]]
    if not behind or len(behind) == len(after):
        return f"no process has moved on from step {after[0].step}"
    return f"process {behind[0]} ({after[behind[0]].name}), in step {after[behind[0]].step}, holds the others up"


def _store() -> Any:
    """The launcher's, by a connection that nobody else uses."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


_giving_up = threading.Lock()


def _give_up(problem: str) -> NoReturn:
    """End this process; the first one to come here says why."""
    _giving_up.acquire()  # for good: the thread that comes second would end the process before the first has said so
    try:
        says = _store().add("given up", 1) == 1
    except RuntimeError:  # it went with the first process, or with the launcher
        says = rank() == 1
    if says:
        hint = "the same command with --resume goes on from the last checkpoint"
        os.write(2, f"error: {problem}; {hint}\n".encode())
    os._exit(1)
