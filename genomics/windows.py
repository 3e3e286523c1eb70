"""Long sequences -> windows, and what becomes of sequences that are mostly N."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .alphabet import N
from .dataset import LabelledSequences


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of a sequence begin: at 0, stride, 2 stride, ...; the last one is moved back to end at its end.

    So each base is in a window if stride <= window, and a sequence not longer than the window is one window.
    """
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def windows_of(length: int, window: int | None, stride: int | None) -> Iterator[tuple[int, int]]:
    """(start, end) of each window, 0-based, half-open; the whole sequence if there is no window."""
    if window is None:
        yield 0, length
        return
    for start in window_starts(length, window, window if stride is None else stride):
        yield start, min(start + window, length)


def cut_windows(data: LabelledSequences, window: int | None, stride: int | None) -> LabelledSequences:
    """Every record cut into windows, which have its label, part and source, and the name `record:start-end`.

    The stride is that of the train part; the windows of the others lie side by side (but for the last one of a record,
    moved back to its end), so that hardly a base counts twice in a figure. The windows are views of the records'
    tokens. Positions are 0-based and half-open.
    """
    if window is None:
        return data
    strides = [stride if part == "train" else None for part in data.split]
    pieces = [
        (i, start, end) for i, ids in enumerate(data.tokens) for start, end in windows_of(len(ids), window, strides[i])
    ]
    records, starts = (np.array([piece[k] for piece in pieces], dtype=np.int64) for k in (0, 1))
    names = [f"{data.names[i]}:{start}-{end}" for i, start, end in pieces]
    tokens = [data.tokens[i][start:end] for i, start, end in pieces]
    return replace(data.take(records), names=names, tokens=tokens, records=records, starts=starts)


def moved(
    data: LabelledSequences,
    i: int,
    rng: np.random.Generator,
    *,
    records: Sequence[np.ndarray],
    reach: int,
    max_n: float,
) -> np.ndarray:
    """Tokens of window i of `data` moved along its record at random, by at most `reach` bases either way.

    records   tokens of the records that `cut_windows` cut, in their order

    So training sees windows at other places in each epoch, instead of the same ones again and again. A window that
    would be mostly N (a larger share than max_n) stays where it is.
    """
    assert data.records is not None  # `data` was cut
    assert data.starts is not None
    record, length = records[data.records[i]], len(data.tokens[i])
    start = int(np.clip(data.starts[i] + rng.integers(-reach, reach + 1), 0, len(record) - length))
    tokens = record[start : start + length]
    return tokens if share_of_n(tokens) <= max_n else data.tokens[i]


def share_of_n(tokens: np.ndarray) -> float:
    """Share of a sequence's bases that are N or another ambiguity code; 1 for an empty sequence."""
    return float(np.mean(tokens == N)) if len(tokens) else 1.0


def without_n_rich(data: LabelledSequences, max_n: float) -> tuple[LabelledSequences, int]:
    """The sequences whose share of N is at most max_n, and how many others there were."""
    kept = np.flatnonzero([share_of_n(ids) <= max_n for ids in data.tokens])
    return (data, 0) if len(kept) == len(data.names) else (data.take(kept), len(data.names) - len(kept))
