"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


@contextmanager
def progress_bar(work: str, n_images: int) -> Iterator[Callable[[int], object]]:
    """A bar over so many images, with rate and time left, if stderr is a terminal. Yields what to tell progress to."""
    console = Console(stderr=True)
    columns = (TextColumn(work), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(work, total=n_images)
        yield lambda n: bar.advance(task, n)
