"""What a person at the terminal sees while a model runs over sequences: on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} bases/s")


@contextmanager
def progress_bar(work: str, n_bases: int) -> Iterator[Callable[[int], object]]:
    """A bar over so many bases, with rate and time left, if stderr is a terminal. Yields what to call with progress."""
    console = Console(stderr=True)
    columns = (TextColumn(work), BarColumn(), TaskProgressColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(work, total=n_bases)
        yield lambda n: bar.advance(task, n)
