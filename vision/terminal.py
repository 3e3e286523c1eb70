"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..core.terminal import progress_bar as core_bar


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


def progress_bar(work: str, n_images: int) -> AbstractContextManager[Callable[[float], object]]:
    """A bar over so many images, with rate and time left, if stderr is a terminal. Yields what to tell progress to."""
    return core_bar(n_images, TextColumn(work), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
