"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..core.terminal import progress_bar as core_bar


def progress_bar(work: str, n_bytes: int) -> AbstractContextManager[Callable[[float], object]]:
    """A bar over so many bytes, with rate and time left, if stderr is a terminal. Yields what to call with progress."""
    return core_bar(
        n_bytes, TextColumn(work), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
