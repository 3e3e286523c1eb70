"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def progress_bar(work: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar over so many bytes, with rate and time left, if stderr is a terminal. Yields what to call with progress."""
    console = Console(stderr=True)
    columns = (TextColumn(work), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(work, total=n_bytes)
        yield lambda n: bar.advance(task, n)
