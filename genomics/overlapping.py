"""Windows that overlap, over a sequence of any length, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class InnerPart(NamedTuple):
    """Bases left .. right - 1, of which a window that goes from first to last - 1 tells."""

    left: int
    right: int
    first: int
    last: int


def inner_parts(start: int, end: int, window: int, overlap: int) -> Iterator[InnerPart]:
    """Windows that overlap, over bases start .. end - 1: their inner parts, window - overlap long, lie side by side.

    Half of the overlap stands on either side, as far as there are bases. Raises ValueError unless it is 0 or more and
    less than the window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap is {overlap}; it must be at least 0 and less than the window, which is {window}")
    inner, margin = window - overlap, overlap // 2
    for left in range(start, end, inner):
        right = min(left + inner, end)
        yield InnerPart(left, right, max(start, left - margin), min(end, right + overlap - margin))


def grouped(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of n items, the last one perhaps of fewer."""
    items = iter(items)
    while group := list(islice(items, n)):
        yield group
