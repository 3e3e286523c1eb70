"""Genomes by position: any stretch of any chromosome, of files of any size, in memory that does not grow with them.

FASTA, plain or bgzip, is read in place by its index (.fai, of bgzip .gzi too): the one beside it, as `samtools faidx`
makes it, or else one that is made for as long as the genome is open. What cannot be read by position (gzip, other
formats, pipes, lines of unlike lengths) is unpacked, or written as FASTA, to a temporary file first.
"""

from __future__ import annotations

import gzip
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pysam

from ...core.errors import InputError
from ..alphabet import LetterError, tokenize
from .fasta import quiet_htslib
from .records import read_records
from .source import GZIP_MAGIC, Source, opened

_BLOCK = 1 << 20
_WIDTH = 1 << 16  # letters a line of a FASTA file that is written here
_MOST_CHECKED = 200  # records whose place in an index found beside a file is compared with the file
_MOST_HEADER = 1 << 16
_INDEX_COLUMNS = ("name", "length", "offset", "bases a line", "bytes a line")


class Contig(NamedTuple):
    """A sequence of a genome."""

    name: str
    length: int
    path: Path  # as the user named the file


class Genome:
    """The sequences of some files. A context manager: temporary files go when it closes.

    Raises InputError that names the file for what cannot be read, for an index that is malformed or of another file,
    for a sequence without bases, and for a file that changed meanwhile.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._stack = ExitStack()
        self.contigs: list[Contig] = []
        self._files: list[tuple[Path, str, str | None]] = []  # what pysam opens: FASTA, .fai, .gzi
        self._file_of: list[int] = []  # contig -> its file
        self._handles: dict[tuple[int, int], pysam.FastaFile] = {}  # process, file -> handle: none may share one
        self._sources: list[Source] = []
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="polymamba-")))
            for i, path in enumerate(paths):
                source = self._stack.enter_context(opened(path))
                self._sources.append(source)
                fasta, fai, gzi = _indexed(source, folder, str(i))
                self._files.append((fasta, str(fai), None if gzi is None else str(gzi)))
                for row in _read_index(fai, source.name):
                    if not row.length:
                        raise InputError(f"{source.name}, record {row.name!r}: no sequence after the header")
                    self.contigs.append(Contig(row.name, row.length, Path(source.name)))
                    self._file_of.append(i)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Genome:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for (process, _), handle in self._handles.items():
            if process == os.getpid():
                handle.close()
        self._handles.clear()
        self._stack.close()

    @property
    def n_bases(self) -> int:
        return sum(contig.length for contig in self.contigs)

    def letters(self, contig: int, start: int, end: int) -> bytes:
        """The letters start .. end - 1, from 0, of the contig of this number, as in the file."""
        i, name = self._file_of[contig], self.contigs[contig].name
        if not 0 <= start <= end <= self.contigs[contig].length:
            raise ValueError(f"{name}: {start}-{end} is not within its {self.contigs[contig].length} bases")
        if start == end:
            return b""
        try:
            found = self._handle(i).fetch(name, start, end).encode("ascii", errors="replace")
        except (OSError, ValueError):
            found = b""
        if len(found) != end - start:
            self._sources[i].check_unchanged()
            place = f"record {name!r}, bases {start}-{end}"
            raise InputError(f"{self._sources[i].name}, {place}: cannot be read; the file or its index is damaged")
        return found

    def tokens(self, contig: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of these bases, uint8 (end - start,), read-only, and which are lower-case, bool (end - start,).

        Raises InputError for a letter that alphabet.tokenize refuses.
        """
        letters = self.letters(contig, start, end)
        try:
            tokens = tokenize(letters)
        except LetterError as error:
            where = f"{self.contigs[contig].path}, record {self.contigs[contig].name!r}"
            in_record = LetterError(chr(letters[error.position - 1]), start + error.position)
            raise InputError(f"{where}: {in_record}") from None
        return tokens, np.frombuffer(letters, np.uint8) >= ord("a")

    def pieces(self, contig: int, start: int, end: int, size: int = _BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """(start, tokens) of pieces of at most `size` bases, one after another."""
        for at in range(start, end, size):
            yield at, self.tokens(contig, at, min(at + size, end))[0]

    def _handle(self, file: int) -> pysam.FastaFile:
        key = os.getpid(), file
        if key not in self._handles:
            fasta, fai, gzi = self._files[file]
            with quiet_htslib():
                self._handles[key] = pysam.FastaFile(
                    str(fasta), filepath_index=fai, **({} if gzi is None else {"filepath_index_compressed": gzi})
                )
        return self._handles[key]


# Indexes


class _Row(NamedTuple):
    name: str
    length: int
    offset: int  # of the first base, in the unpacked file
    line_bases: int
    line_bytes: int


def _indexed(source: Source, folder: Path, stem: str) -> tuple[Path, Path, Path | None]:
    """A FASTA file with what `source` holds, its .fai, and its .gzi if it is bgzip."""
    packed, looks_right = _kind(source)
    if looks_right and packed != "gzip":
        gzi = Path(f"{source.path}.gzi") if packed == "bgzip" else None
        fai = Path(f"{source.path}.fai")
        if fai.exists() and (gzi is None or gzi.exists()):
            _check_index(source, fai, gzi)
            return source.path, fai, gzi
        fai = folder / f"{stem}.fai"
        gzi = None if gzi is None else folder / f"{stem}.gzi"
        if _make_index(source, source.path, fai, gzi):
            return source.path, fai, gzi
    fasta, fai = folder / f"{stem}.fa", folder / f"{stem}.fa.fai"
    try:
        if looks_right and packed == "gzip":
            with fasta.open("wb") as file:
                for block in source.blocks():
                    file.write(block)
            if _make_index(source, fasta, fai, None):
                return fasta, fai, None
        with fasta.open("w", encoding="utf-8") as file:
            for record in read_records(source):
                file.write(f">{record.name}\n")
                for at in range(0, len(record.sequence), _WIDTH):
                    file.write(record.sequence[at : at + _WIDTH] + "\n")
    except OSError as error:
        raise InputError(f"{source.name}: cannot be unpacked to {tempfile.gettempdir()} ({error.strerror})") from None
    if not _make_index(source, fasta, fai, None):
        raise InputError(f"{source.name}: cannot be indexed; check that it is FASTA")
    return fasta, fai, None


def _kind(source: Source) -> tuple[str, bool]:
    """How a source is packed ("", gzip or bgzip), and whether it begins as FASTA does."""
    with source.path.open("rb") as stream:
        head = stream.read(16)
    packed = "" if not head.startswith(GZIP_MAGIC) else "bgzip" if head[12:14] == b"BC" else "gzip"
    try:
        with source.open() as stream:
            return packed, stream.read(1) == b">"
    except (OSError, EOFError, gzip.BadGzipFile):
        return packed, False  # the reader of records says what is wrong


def _make_index(source: Source, fasta: Path, fai: Path, gzi: Path | None) -> bool:
    """Whether an index could be made of all records of `fasta`, which holds what `source` does. It is read whole."""
    n_records, previous = 0, b"\n"
    for block in replace(source, path=fasta).blocks():  # or an error: truncated, damaged
        if b"\0" in block:
            return False
        n_records += block.count(b"\n>") + (previous == b"\n" and block.startswith(b">"))
        previous = block[-1:]
    words = [str(fasta), "--fai-idx", str(fai), *(["--gzi-idx", str(gzi)] if gzi is not None else [])]
    try:
        with quiet_htslib():
            pysam.faidx(*words)
    except pysam.SamtoolsError:
        return False
    with fai.open("rb") as file:
        return sum(1 for _ in file) == n_records  # of two records of one name htslib drops one


def _read_index(fai: Path, name: str) -> list[_Row]:
    """The rows of a .fai, which `name` is an index of. Raises InputError that names file and line."""
    rows = []
    try:
        lines = fai.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise InputError(f"{fai}: cannot be read ({reason}); remove it, or make it anew with samtools faidx") from None
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        if len(cells) != len(_INDEX_COLUMNS) or not all(re.fullmatch("[0-9]{1,18}", cell) for cell in cells[1:]):
            wanted = f"expected {len(_INDEX_COLUMNS)} columns separated by tabs ({', '.join(_INDEX_COLUMNS)})"
            what = "; remove it, or make it anew with samtools faidx"
            raise InputError(f"{fai}, line {number}: not a line of a FASTA index, {wanted}{what}")
        rows.append(_Row(cells[0], *map(int, cells[1:])))
    if not rows:
        raise InputError(f"{fai}: an empty index of {name}; remove it, or make it anew with samtools faidx")
    return rows


def _check_index(source: Source, fai: Path, gzi: Path | None) -> None:
    """Raises InputError unless the records of an index stand where it says: an index may be of an earlier file."""
    rows = _read_index(fai, source.name)
    blocks = None if gzi is None else _read_gzi(gzi)
    places = sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(len(rows), _MOST_CHECKED))})
    for row in (rows[i] for i in places):
        n_lines = (row.length - 1) // row.line_bases if row.line_bases and row.length else 0
        end = row.offset + row.length + n_lines * (row.line_bytes - row.line_bases)
        before = max(0, row.offset - _MOST_HEADER)
        head = _bytes_at(source, blocks, before, row.offset - before)
        header = head[head[:-1].rfind(b"\n") + 1 :]
        tail = _bytes_at(source, blocks, end - 1, 4)
        ends = len(tail) == 1 or (tail[1:2] in (b"\n", b"\r") and tail[1:].strip(b"\r\n")[:1] in (b">", b""))
        names = header.startswith(b">") and header.endswith(b"\n") and header[1:].split(None, 1)[:1]
        if not (ends and tail[:1].strip() and names and names[0] == row.name.encode()):
            stale = f"record {row.name!r} is not where the index {fai} says"
            raise InputError(f"{source.name}: {stale}; remove the index, or make it anew with samtools faidx")


def _read_gzi(gzi: Path) -> np.ndarray:
    """The blocks of a bgzip file by its .gzi: (n, 2) of the offsets, packed and unpacked, at which each begins."""
    raw = np.frombuffer(gzi.read_bytes()[: gzi.stat().st_size // 8 * 8], "<u8")
    if len(raw) == 0 or len(raw) != 1 + 2 * int(raw[0]) or gzi.stat().st_size % 8:
        raise InputError(f"{gzi}: not an index of a bgzip file; remove it, or make it anew with samtools faidx")
    return np.concatenate((np.zeros((1, 2), np.int64), raw[1:].reshape(-1, 2).astype(np.int64)))


def _bytes_at(source: Source, blocks: np.ndarray | None, offset: int, size: int) -> bytes:
    """Some of the unpacked bytes; fewer at the file's end, or if an offset leads nowhere."""
    if blocks is None:
        with source.path.open("rb") as file:
            file.seek(max(0, offset))
            return file.read(size)
    i = int(np.searchsorted(blocks[:, 1], offset, side="right")) - 1
    packed, unpacked = blocks[max(i, 0)].tolist()
    try:
        with source.path.open("rb") as file:
            file.seek(packed)
            with gzip.GzipFile(fileobj=file) as stream:
                stream.read(max(0, offset - unpacked))
                return stream.read(size)
    except (OSError, EOFError):
        return b""
