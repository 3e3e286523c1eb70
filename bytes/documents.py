"""Documents in files, as one stream of ids that is read by position: larger than memory, if need be."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.inputs import find_files as find_files
from .config import DOCUMENT

BLOCK = 1 << 20  # bytes that are read at a time where a whole document is gone through


class Document(NamedTuple):
    """Some of the bytes of a file, most often all of them."""

    path: Path
    start: int
    size: int

    def blocks(self) -> Iterator[np.ndarray]:
        """Its bytes, uint8, in pieces. Raises InputError if they cannot be read."""
        for offset in range(0, self.size, BLOCK):
            yield self.read(offset, min(offset + BLOCK, self.size))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its bytes [start, stop), uint8. Mapped anew each time, so that worker processes can share a `Documents`."""
        try:
            return np.memmap(self.path, np.uint8, "r", offset=self.start + start, shape=(stop - start,))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it was cut short meanwhile"
            raise InputError(f"{self.path}: cannot be read ({reason})") from None


class Documents:
    """Documents as one stream of ids: DOCUMENT, the bytes of the first, DOCUMENT, those of the second, ..., DOCUMENT.

    Each document thus begins after a DOCUMENT and ends before one.
    """

    def __init__(self, documents: Iterable[Document]):
        self.documents = list(documents)
        sizes = np.array([document.size for document in self.documents], dtype=np.int64)
        self.n_bytes = int(sizes.sum())
        self.marks = np.concatenate([[0], np.cumsum(sizes + 1)])  # (documents + 1,): positions of DOCUMENT, ascending
        self.n_tokens = int(self.marks[-1]) + 1

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids [start, stop) of the stream, int64. 0 <= start <= stop <= n_tokens."""
        ids = np.full(stop - start, DOCUMENT, dtype=np.int64)
        first, last = self.document_at(start), min(int(np.searchsorted(self.marks, stop)), len(self))
        for i in range(first, last):
            begin, document = int(self.marks[i]) + 1, self.documents[i]
            left, right = max(start, begin), min(stop, begin + document.size)
            if left < right:
                ids[left - start : right - start] = document.read(left - begin, right - begin)
        return ids

    def document_at(self, position: int) -> int:
        """Index of the document to which the id at this position belongs; a DOCUMENT belongs to what follows it."""
        return int(np.searchsorted(self.marks, position, side="right")) - 1


def whole_files(files: Sequence[Path]) -> list[Document]:
    """Each file as a document; the empty ones among them are left out. Raises InputError if nothing remains."""
    documents = [Document(file, 0, file.stat().st_size) for file in files]
    filled = [document for document in documents if document.size]
    if not filled:
        names = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
        raise InputError(f"{names}: empty; give files with at least one byte")
    return filled
