"""Words for the person at the terminal."""

from rich.console import Console


def say(message: str) -> None:
    """Print a message on stderr: results alone go to stdout."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
