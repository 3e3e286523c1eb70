"""Predictions along records in the formats that genome browsers read: BED and bedGraph."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TextIO

import numpy as np

from .config import DNAClassifierConfig


class Piece(NamedTuple):
    """A record, or a window of it."""

    name: str  # of the record
    start: int  # 0-based, half-open
    end: int
    tokens: np.ndarray  # uint8 (end - start,)


def write_bed(
    file: TextIO, pieces: Sequence[Piece], labels: Sequence[str], predictions: np.ndarray, config: DNAClassifierConfig
) -> None:
    """BED6, a line a window: chromosome, start, end, label, score 0 to 1000, strand ".".

    The score is that of the likeliest class or label (1000 p, rounded), as the UCSC format asks for; of a regression,
    whose values have no such range, the name is the value and the score 0.
    """
    for piece, label, row in zip(pieces, labels, predictions, strict=True):
        score = 0 if config.target == "regression" else round(1000 * float(row.max()))
        file.write(f"{piece.name}\t{piece.start}\t{piece.end}\t{label}\t{score}\t.\n")


def write_bedgraph(file: TextIO, pieces: Sequence[Piece], predictions: np.ndarray, config: DNAClassifierConfig) -> None:
    """bedGraph, a track for each class: where windows overlap, the mean of those that cover a base.

    A track's lines do not overlap, as the format demands. The pieces of a record stand together.
    """
    for k, name in enumerate(config.classes):
        file.write(f'track type=bedGraph name="{name}"\n')
        start = 0
        for record, group in groupby(pieces, key=lambda p: p.name):
            windows = [(p.start, p.end) for p in group]
            values = predictions[start : start + len(windows), k]
            start += len(windows)
            for first, last, value in mean_cover(windows, values):
                file.write(f"{record}\t{first}\t{last}\t{value:.6g}\n")


def mean_cover(windows: Sequence[tuple[int, int]], values: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(start, end, mean of the values of the windows that cover it) of each stretch between window borders."""
    starts, ends = (np.array(side, dtype=np.int64) for side in zip(*windows, strict=True))
    borders = np.unique(np.concatenate((starts, ends)))
    totals, counts = np.zeros(len(borders)), np.zeros(len(borders), dtype=np.int64)
    for side, sign in ((starts, 1), (ends, -1)):
        at = np.searchsorted(borders, side)
        np.add.at(totals, at, sign * values)
        np.add.at(counts, at, sign)
    totals, counts = np.cumsum(totals), np.cumsum(counts)
    for i in np.flatnonzero(counts[:-1]):
        yield int(borders[i]), int(borders[i + 1]), float(totals[i] / counts[i])
