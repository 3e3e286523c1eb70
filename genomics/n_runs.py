"""Where a genome is unknown: runs of N and other ambiguity codes, held as intervals: a few hundred in a good assembly.

They are found once, piece by piece, which also shows every letter that is no DNA before a long work begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .alphabet import N
from .parts import Stretch
from .reading.genome import Genome


class NRuns:
    """The runs of N in one stretch. starts, ends int64 (n,): sorted, half-open, from 0 of the contig."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray):
        self.starts, self.ends = starts, ends
        self._before = np.concatenate(([0], np.cumsum(ends - starts)))  # N in the runs before each run

    def count(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How many of the bases start .. end - 1 are N, for windows of any number, int64 (windows,)."""
        return self._below(end) - self._below(start)

    def _below(self, position: np.ndarray) -> np.ndarray:
        """N before each position."""
        position = np.asarray(position, dtype=np.int64)
        if not len(self.starts):
            return np.zeros_like(position)
        i = np.searchsorted(self.starts, position)  # runs that begin before it
        beyond = np.where(i > 0, self.ends[np.maximum(i - 1, 0)] - position, 0)
        return self._before[i] - np.maximum(beyond, 0)


def find_n_runs(
    genome: Genome, stretches: Sequence[Stretch], *, advance: Callable[[int], object] = lambda n: None
) -> list[NRuns]:
    """Those of each stretch. Reads all their bases; raises InputError for a letter that is no DNA."""
    found = []
    for stretch in stretches:
        starts: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        was_n = False
        for start, tokens in genome.pieces(stretch.contig, stretch.start, stretch.end):
            is_n = np.concatenate(([was_n], tokens == N))
            changes = np.diff(is_n.astype(np.int8))
            starts.append(start + np.flatnonzero(changes > 0))
            ends.append(start + np.flatnonzero(changes < 0))
            was_n = bool(is_n[-1])
            advance(len(tokens))
        ends.append(np.full(int(was_n), stretch.end))
        found.append(NRuns(*(np.concatenate(x).astype(np.int64) for x in (starts, ends))))
    return found
