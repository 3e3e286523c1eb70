"""Values of single bases as a bedGraph track, written as they come."""

from collections.abc import Iterable
from typing import TextIO

import numpy as np


class BinnedTrack:
    """Writes a bedGraph line for each bin of so many bases, aligned to the chromosome's start, as values come.

    A bin's value is the mean of those that are no nan; one without any is left out.
    """

    def __init__(self, file: TextIO, name: str, bin: int):
        self.file, self.bin = file, bin
        file.write(f'track type=bedGraph name="{name}"\n')

    def write(self, record: str, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """(start, values (n,)) of consecutive pieces of a record."""
        held, first, last = np.empty(0), 0, 0
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
        known = ~np.isnan(values)
        edges = np.arange(first // self.bin * self.bin, first + len(values), self.bin)
        starts = np.maximum(edges, first)
        counts = np.add.reduceat(known, starts - first, dtype=np.int64)
        means = np.add.reduceat(np.where(known, values, 0), starts - first) / np.maximum(counts, 1)
        ends = np.minimum(edges + self.bin, first + len(values))
        rows = zip(starts.tolist(), ends.tolist(), means.tolist(), counts.tolist(), strict=True)
        self.file.writelines(f"{record}\t{start}\t{end}\t{mean:.4f}\n" for start, end, mean, n in rows if n)
