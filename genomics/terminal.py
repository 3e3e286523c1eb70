"""What a person at the terminal sees while work goes on: on stderr."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from ..core.terminal import progress_bar as core_bar


def progress_bar(work: str, n_bases: int) -> AbstractContextManager[Callable[[float], object]]:
    """A bar over so many bases, as of core/terminal.py."""
    return core_bar(work, n_bases, "bases")
