"""Predictions of single bases as regions: runs of bases of one class, or with one label, written as they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TextIO

import numpy as np

from .config import DNAAnnotatorConfig


class _Open(NamedTuple):
    """A run that reaches the end of what was seen."""

    start: int
    total: float  # of its bases' probabilities


class RunsTrack:
    """BED6: chromosome, start, end, class, 1000 times the run's mean probability, strand.

    A base is of its likeliest class, NONE being left out; of independent labels it has those of probability 0.5 and up.
    """

    def __init__(self, file: TextIO, config: DNAAnnotatorConfig):
        self.file, self.multiclass = file, config.target == "multiclass"
        self.names = config.classes[1:] if self.multiclass else config.classes
        strands = {"(+)": "+", "(-)": "-"} if config.stranded else {}
        self.strands = [strands.get(name[-3:], ".") for name in self.names]
        self.labels = [name[:-3] if name[-3:] in strands else name for name in self.names]

    def write(self, record: str, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """(start, predictions (n, K), nan where nothing is known) of consecutive pieces of a record."""
        runs: dict[int, _Open] = {}
        last = 0
        for start, predictions in pieces:
            last = start + len(predictions)
            known = ~np.isnan(predictions[:, 0])
            likeliest = np.nan_to_num(predictions).argmax(1)
            rows = []
            for k in range(len(self.names)):
                p = np.nan_to_num(predictions[:, k + self.multiclass])
                chosen = known & (likeliest == k + 1) if self.multiclass else known & (p >= 0.5)
                rows += [(first, end, k, mean) for first, end, mean in self._closed(runs, k, start, chosen, p)]
            self._write(record, rows)
        self._write(record, [(run.start, last, k, run.total / (last - run.start)) for k, run in runs.items()])

    @staticmethod
    def _closed(
        runs: dict[int, _Open], k: int, at: int, chosen: np.ndarray, p: np.ndarray
    ) -> Iterator[tuple[int, int, float]]:
        """The runs of label k (start, end, mean probability) that end in a piece; what reaches its end stays open."""
        changes = np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8))
        sums = np.concatenate(([0.0], np.cumsum(p)))
        found = [
            (int(i), int(j), float(sums[j] - sums[i]))
            for i, j in zip(np.flatnonzero(changes > 0), np.flatnonzero(changes < 0), strict=True)
        ]
        before = runs.pop(k, None)
        if before is not None and not (found and found[0][0] == 0):
            yield before.start, at, before.total / (at - before.start)
            before = None
        for i, j, total in found:
            start = at + i
            if i == 0 and before is not None:
                start, total = before.start, total + before.total
            if j == len(chosen):
                runs[k] = _Open(start, total)
            else:
                yield start, at + j, total / (at + j - start)

    def _write(self, record: str, rows: list[tuple[int, int, int, float]]) -> None:
        for start, end, k, mean in sorted(rows):
            score = min(1000, round(1000 * mean))
            self.file.write(f"{record}\t{start}\t{end}\t{self.labels[k]}\t{score}\t{self.strands[k]}\n")
