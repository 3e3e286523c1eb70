"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.3g} {self.unit}/s")


@contextmanager
def progress_bar(work: str, total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """A bar over `total` units, with rate and time left, if stderr is a terminal. Yields what to call with progress."""
    console = Console(stderr=True)
    columns = (
        TextColumn(work),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(work, total=total)
        yield lambda n: bar.advance(task, n)
