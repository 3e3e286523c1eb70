"""Values of single bases as bedGraph tracks, written as they come."""

from collections.abc import Iterable, Sequence
from typing import TextIO

import numpy as np


class BinnedTracks:
    """Writes a bedGraph line for each bin of so many bases, aligned to the chromosome's start, as values come.

    A bin's value is the mean of those that are no nan; one without any is left out. K tracks, each into its own file.
    """

    def __init__(self, files: Sequence[TextIO], names: Sequence[str], bin: int):
        self.files, self.bin = files, bin
        for file, name in zip(files, names, strict=True):
            file.write(f'track type=bedGraph name="{name}"\n')

    def write(self, record: str, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """(start, values (n, K)) of consecutive pieces of a record."""
        held, first, last = np.empty((0, len(self.files))), 0, 0
        for start, values in pieces:
            held, first = np.concatenate((held, values)), start - len(held)
            last = start + len(values)
            full = last // self.bin * self.bin - first
            if full > 0:
                self._write(record, first, held[:full])
                held, first = held[full:], first + full
        if len(held):
            self._write(record, first, held)

    def _write(self, record: str, first: int, values: np.ndarray) -> None:
        """Whole bins, or the record's last one."""
        edges = np.arange(first // self.bin * self.bin, first + len(values), self.bin)
        starts = np.maximum(edges, first)
        ends = np.minimum(edges + self.bin, first + len(values)).tolist()
        for file, column in zip(self.files, values.T, strict=True):
            known = ~np.isnan(column)
            counts = np.add.reduceat(known, starts - first, dtype=np.int64)
            means = np.add.reduceat(np.where(known, column, 0), starts - first) / np.maximum(counts, 1)
            rows = zip(starts.tolist(), ends, means.tolist(), counts.tolist(), strict=True)
            file.writelines(f"{record}\t{start}\t{end}\t{mean:.4f}\n" for start, end, mean, n in rows if n)
