"""Several sequence files at once, in threads with a handle each.

Decompression and the parser of FASTA run outside of Python's lock: packed files gain, plain text does not. Processes
would have to hand over what they read, which costs as much as reading a large plain file does. Figures are in
benchmarks/results/reading.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from .fasta import quiet_htslib
from .format import Record
from .records import read_records

T = TypeVar("T")
_MOST_THREADS = 8  # the lock, which each needs a quarter of the time or more, has no room for further ones


def read_each(paths: Sequence[Path], keep: Callable[[Record], T], n_threads: int | None = None) -> Iterator[list[T]]:
    """For each file, in their order, what `keep` makes of its records; by default in as many threads as may pay.

    Raises InputError as read_records does, of the first file that has an error. Pipes are read one after another.
    """
    if n_threads is None:
        n_threads = min(len(paths), os.cpu_count() or 1, _MOST_THREADS)
    if n_threads < 2 or not all(path.is_file() for path in paths):
        yield from ([keep(record) for record in read_records(path)] for path in paths)
        return
    stopped = threading.Event()

    def read(path: Path) -> list[T]:
        kept = []
        for record in read_records(path):
            if stopped.is_set():
                break
            kept.append(keep(record))
        return kept

    # quiet here already: no thread makes htslib speak again while others read
    with quiet_htslib(), ThreadPoolExecutor(n_threads) as threads:
        try:
            yield from threads.map(read, paths)
        finally:  # after an error or Ctrl-C the threads end at their next record
            stopped.set()
