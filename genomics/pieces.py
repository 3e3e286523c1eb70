"""The records of sequence files, or windows of them, as a model runs over them: never all in memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..core.batching import BUCKET
from ..core.errors import InputError
from .reading.records import read_records
from .reading.source import Source
from .sources import tokens_of
from .windows import share_of_n, windows_of


class Piece(NamedTuple):
    """A record, or a window of it."""

    name: str  # of the record
    start: int  # 0-based, half-open
    end: int
    tokens: np.ndarray  # uint8 (end - start,)


class Pieces:
    """Every record of these files in their order, or every window of it that is not mostly N; to be iterated over anew.

    window, stride    as for windows_of
    max_n             windows of which a larger share is N are left out
    hard_mask         lower-case letters are read as N

    One record is held at a time. `count`, `n_bases` and `n_left_out` (windows) are known after `check`.
    """

    def __init__(
        self, files: Sequence[Source], *, window: int | None, stride: int | None, max_n: float, hard_mask: bool
    ):
        self.files, self.window, self.stride, self.max_n, self.hard_mask = files, window, stride, max_n, hard_mask
        self.count = self.n_bases = self.n_left_out = 0

    def __iter__(self) -> Iterator[Piece]:
        return (piece for _, piece, kept in self._all() if kept)

    def by_record(self) -> Iterator[tuple[np.ndarray, list[Piece]]]:
        """The tokens of each record, and its pieces, by their starts."""
        for file in self.files:
            for record in read_records(file):
                tokens = tokens_of(record, self.hard_mask)
                yield tokens, [piece for piece, kept in self._of(record.name, tokens) if kept]

    def check(self, max_tokens: int, *, unique_names: bool) -> None:
        """Read all files, so that what is wrong with them shows before any work, and count.

        Raises InputError as read_records does, for a piece of over max_tokens bases, and with unique_names for two
        files that hold a record of one name.
        """
        file_of: dict[str, str] = {}
        for file, piece, kept in self._all():
            if unique_names and file_of.setdefault(piece.name, file.name) != file.name:
                both = f"record {piece.name!r} stands in {file_of[piece.name]} too"
                raise InputError(f"{file.name}: {both}; rename one of them")
            if not kept:
                self.n_left_out += 1
                continue
            if len(piece.tokens) > max_tokens:
                long = f"{len(piece.tokens)} bases in one piece, but --max-tokens is {max_tokens}"
                what = "cut it with a --window of no more, or raise --max-tokens, which takes more memory"
                raise InputError(f"{file.name}, record {piece.name!r}: {long}; {what}")
            self.count += 1
            self.n_bases += len(piece.tokens)

    def _all(self) -> Iterator[tuple[Source, Piece, bool]]:
        """Each piece with its file, and whether it is kept."""
        for file in self.files:
            for record in read_records(file):
                tokens = tokens_of(record, self.hard_mask)
                yield from ((file, piece, kept) for piece, kept in self._of(record.name, tokens))

    def _of(self, name: str, tokens: np.ndarray) -> Iterator[tuple[Piece, bool]]:
        """Each piece of a record, and whether it is kept."""
        for start, end in windows_of(len(tokens), self.window, self.stride):
            piece = Piece(name, start, end, tokens[start:end])
            yield piece, self.window is None or share_of_n(piece.tokens) <= self.max_n


def in_chunks(pieces: Iterable[Piece], batch_size: int, max_tokens: int) -> Iterator[list[Piece]]:
    """Pieces in their order, some BUCKET batches of them at a time: enough to batch those of like length together."""
    chunk: list[Piece] = []
    n_bases = 0
    for piece in pieces:
        chunk.append(piece)
        n_bases += len(piece.tokens)
        if len(chunk) == BUCKET * batch_size or n_bases >= BUCKET * max_tokens:
            yield chunk
            chunk, n_bases = [], 0
    if chunk:
        yield chunk
