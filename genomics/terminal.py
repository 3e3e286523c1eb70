"""What a person at the terminal sees while a model runs over sequences: on stderr."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..core.terminal import progress_bar as core_bar


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} bases/s")


def progress_bar(work: str, n_bases: int) -> AbstractContextManager[Callable[[float], object]]:
    """A bar over so many bases, with rate and time left, if stderr is a terminal. Yields what to call with progress."""
    return core_bar(n_bases, TextColumn(work), BarColumn(), TaskProgressColumn(), _Rate(), TimeRemainingColumn())
