"""Where the bytes of a sequence file come from: a file or a pipe, plain, gzip or bgzip. Whole, or refused."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...core.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
# bgzip ends a file with an empty block, always these 28 bytes (SAM specification, section 4.1.2).
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Source:
    """A file to read."""

    path: Path  # absolute; of a temporary copy, if the bytes came through a pipe
    name: str  # what messages call it
    stamp: tuple[int, ...]  # size, time of the last change and inode, when it was opened

    def open(self) -> io.BufferedReader | gzip.GzipFile:
        """The bytes, decompressed if they are gzip or bgzip by their first bytes, whatever the name."""
        with self.path.open("rb") as stream:
            is_gzip = stream.read(2) == GZIP_MAGIC
        return gzip.open(self.path, "rb") if is_gzip else self.path.open("rb")

    def open_text(self) -> io.TextIOWrapper:
        """The text, decompressed. Carriage returns are kept; bytes that are not UTF-8 become lone surrogates."""
        return io.TextIOWrapper(self.open(), encoding="utf-8-sig", errors="surrogateescape", newline="\n")

    def blocks(self) -> Iterator[bytes]:
        """The decompressed bytes, some 100 kB at a time. Raises InputError if they cannot be had in full."""
        try:
            self._check_bgzip_end()
            with self.open() as stream:
                while block := stream.read(_BLOCK):
                    yield block
        except EOFError:
            stop = "truncated: the compressed data stop in the middle"
            raise InputError(f"{self.name}: {stop}; get the file again") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self.name}: damaged gzip data ({error}); get the file again") from None
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def line_at(self, offset: int) -> int:
        """The line (from 1) of the decompressed byte at `offset`."""
        with self.open() as stream:
            sizes = [_BLOCK] * (offset // _BLOCK) + [offset % _BLOCK]
            return 1 + sum(stream.read(size).count(b"\n") for size in sizes)

    def check_unchanged(self) -> None:
        """Raises InputError if the file is no longer the one that was opened."""
        if _stamp(self.path) != self.stamp:
            raise InputError(f"{self.name}: changed while it was read; read it again when it is complete")

    def _check_bgzip_end(self) -> None:
        """Raises InputError if a bgzip file lacks its last block: a cut between two blocks shows nowhere else."""
        with self.path.open("rb") as stream:
            head = stream.read(16)
            is_bgzip = head.startswith(GZIP_MAGIC) and head[12:14] == b"BC"
            if is_bgzip and stream.seek(0, 2) >= len(_BGZF_END):
                stream.seek(-len(_BGZF_END), 2)
                if stream.read() != _BGZF_END:
                    missing = "truncated: the block that ends a bgzip file is missing"
                    raise InputError(f"{self.name}: {missing}; get the file again")


@contextmanager
def opened(path: str | Path) -> Iterator[Source]:
    """The source at `path`; "-" is standard input. What comes through a pipe is copied to a temporary file meanwhile.

    Raises InputError if there is no such file, or if it is a folder or a device.
    """
    name = str(path)
    if name == "-":
        if sys.stdin is None:
            raise InputError("standard input: is closed; give a file, or send the sequences through a pipe")
        with _spooled(sys.stdin.buffer, "standard input") as source:
            yield source
        return
    path = Path(path)
    try:
        _check_kind(path)
        pipe = path.open("rb") if path.is_fifo() else None
    except OSError as error:
        raise _unreadable(name, error) from None
    if pipe is None:
        yield Source(path.absolute(), name, _stamp(path))
    else:
        with pipe, _spooled(pipe, name) as source:
            yield source


class CountedLines:
    """A text's lines, for the parsers of Biopython; `number` is that of the line given last, from 1."""

    def __init__(self, text: io.TextIOWrapper):
        self._text = text
        self.number = 0

    def read(self, size: int) -> str:
        return self._text.read(size)

    def readline(self) -> str:
        line = self._text.readline()
        self.number += bool(line)
        return line

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")


def _check_kind(path: Path) -> None:
    """Raises InputError unless `path` is a file or a pipe."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file of sequences")
    if not (path.is_file() or path.is_fifo()):
        raise InputError(f"{path}: is neither a file nor a pipe; write the sequences to a file first")


@contextmanager
def _spooled(stream: BinaryIO, name: str) -> Iterator[Source]:
    """A temporary copy of what `stream` gives: a source is read more than once."""
    with tempfile.NamedTemporaryFile(prefix="polymamba-") as copy:
        try:
            shutil.copyfileobj(stream, copy, _BLOCK)
            copy.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise InputError(f"{name}: cannot be copied to {folder} ({error.strerror}); give a file") from None
        yield Source(Path(copy.name), name, _stamp(copy.name))


def _stamp(path: str | Path) -> tuple[int, ...]:
    """Size, time of the last change in ns, and inode; () if the file is gone."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(f"{name}: cannot be read ({error.strerror or error})")
