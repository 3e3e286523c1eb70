"""Words for the person at the terminal, and bars while work goes on: on stderr, as results alone go to stdout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn


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
