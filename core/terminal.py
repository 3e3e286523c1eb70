"""Words for the person at the terminal, and bars while work goes on: on stderr, as results alone go to stdout."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .processes import is_first

T = TypeVar("T")

TOO_MANY = 100_000  # units to be counted under a bar (12/34): of so many it tells the share (35%)


def say(message: str) -> None:
    """Print a message on stderr: results alone go to stdout."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _watched(console: Console) -> bool:
    """Whether a bar is for somebody: of several processes the first one shows its own, on a terminal."""
    return is_first() and console.is_terminal


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:{',.0f' if speed >= 100 else '.3g'}} {self.unit}/s")


@contextmanager
def progress_bar(work: str, total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """A bar over `total` units, with rate and time left, if stderr is a terminal. Yields what to call with progress.

    Of several processes the first one shows its own.
    """
    console = Console(stderr=True)
    done = MofNCompleteColumn() if total < TOO_MANY else TaskProgressColumn()
    columns = TextColumn(work), BarColumn(), done, _Rate(unit), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not _watched(console)) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def under_bar(items: Iterable[T], work: str, unit: str, done: int, total: int) -> Iterator[T]:
    """The items, under a bar that begins at `done` of `total`, where `progress_bar` shows one. Its rate is of these."""
    console = Console(stderr=True)
    columns = TextColumn(work), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    disable = not _watched(console)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disable) as bar:
        task = bar.add_task("", total=total, completed=done, rate="")
        began = time.monotonic()
        for i, item in enumerate(items, start=1):
            yield item
            bar.update(task, advance=1, rate=f"{i / (time.monotonic() - began):.1f} {unit}/s")
