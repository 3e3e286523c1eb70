"""Predictions along records in the formats that genome browsers read: BED and bedGraph. Written as they come."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

import numpy as np

from .config import DNAClassifierConfig
from .pieces import Piece

# A piece, its label as text, and its predictions (K,). The pieces of a record stand together, sorted by start.
Predicted = tuple[Piece, str, np.ndarray]


def write_bed(file: TextIO, predicted: Iterable[Predicted], config: DNAClassifierConfig) -> None:
    """BED6, a line a window: chromosome, start, end, label, score 0 to 1000, strand ".".

    The score is that of the likeliest class or label (1000 p, rounded), as the UCSC format asks for; of a regression,
    whose values have no such range, the name is the value and the score 0.
    """
    for piece, label, row in predicted:
        score = 0 if config.target == "regression" else round(1000 * float(row.max()))
        file.write(f"{piece.name}\t{piece.start}\t{piece.end}\t{label}\t{score}\t.\n")


def write_bedgraph(file: TextIO, predicted: Iterable[Predicted], config: DNAClassifierConfig, folder: Path) -> None:
    """bedGraph, a track for each class: where windows overlap, the mean of those that cover a base.

    A track's lines do not overlap, as the format demands. The tracks grow in temporary files in `folder`: in the file
    they stand one after another.
    """
    with ExitStack() as stack:
        tracks = [stack.enter_context(TemporaryFile("w+", encoding="utf-8", dir=folder)) for _ in config.classes]
        for record, group in groupby(predicted, key=lambda p: p[0].name):
            for first, last, means in mean_cover((p.start, p.end, row) for p, _, row in group):
                for track, mean in zip(tracks, means.tolist(), strict=True):
                    track.write(f"{record}\t{first}\t{last}\t{mean:.6g}\n")
        for name, track in zip(config.classes, tracks, strict=True):
            file.write(f'track type=bedGraph name="{name}"\n')
            track.seek(0)
            shutil.copyfileobj(track, file)


def mean_cover(
    windows: Iterable[tuple[int, int, np.ndarray]], at_a_time: int = 4096
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, end, values (K,)) of windows, sorted by start -> of each stretch between window borders where there are
    any, (start, end, mean of the values of the windows that cover it).

    So many windows are held at a time, and those that reach into the next ones.
    """
    windows = iter(windows)
    held: list[tuple[int, int, np.ndarray]] = []
    written = 0  # all stretches up to here are given
    while new := list(islice(windows, at_a_time)):
        held += new
        complete = new[-1][0]  # no further window covers what lies before
        for start, end, mean in _mean_cover(held):
            if written <= start and end <= complete:
                yield start, end, mean
        held = [window for window in held if window[1] > complete]
        written = complete
    if held:
        yield from (stretch for stretch in _mean_cover(held) if stretch[0] >= written)


def _mean_cover(windows: list[tuple[int, int, np.ndarray]]) -> Iterator[tuple[int, int, np.ndarray]]:
    starts, ends = (np.array([window[i] for window in windows], dtype=np.int64) for i in (0, 1))
    values = np.stack([window[2] for window in windows])
    borders = np.unique(np.concatenate((starts, ends)))
    totals, counts = np.zeros((len(borders), values.shape[1])), np.zeros(len(borders), dtype=np.int64)
    for side, sign in ((starts, 1), (ends, -1)):
        at = np.searchsorted(borders, side)
        np.add.at(totals, at, sign * values)
        np.add.at(counts, at, sign)
    totals, counts = np.cumsum(totals, axis=0), np.cumsum(counts)
    for i in np.flatnonzero(counts[:-1]):
        yield int(borders[i]), int(borders[i + 1]), totals[i] / counts[i]
