"""Words for the person at the terminal, and bars while work goes on: on stderr, as results alone go to stdout."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def say(message: str) -> None:
    """Print a message on stderr: results alone go to stdout."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


@contextmanager
def progress_bar(total: float, *columns: ProgressColumn) -> Iterator[Callable[[float], object]]:
    """A bar of these columns over `total` units, if stderr is a terminal. Yields what to call with progress."""
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def under_bar(items: Iterable[T], work: str, unit: str, done: int, total: int, *, hidden: bool = False) -> Iterator[T]:
    """The items, under a bar that begins at `done` of `total`, if stderr is a terminal. Its rate is of these items."""
    console = Console(stderr=True)
    columns = TextColumn(work), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    disable = hidden or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disable) as bar:
        task = bar.add_task("", total=total, completed=done, rate="")
        began = time.monotonic()
        for i, item in enumerate(items, start=1):
            yield item
            bar.update(task, advance=1, rate=f"{i / (time.monotonic() - began):.1f} {unit}/s")
