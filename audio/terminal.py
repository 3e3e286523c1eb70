"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..core.terminal import progress_bar as core_bar


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.3g} {self.unit}/s")


def progress_bar(work: str, total: float, unit: str) -> AbstractContextManager[Callable[[float], object]]:
    """A bar over `total` units, with rate and time left, if stderr is a terminal. Yields what to call with progress."""
    return core_bar(
        total,
        TextColumn(work),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(unit),
        TimeRemainingColumn(),
    )
