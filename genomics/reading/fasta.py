"""FASTA: plain, gzip or bgzip, any line width, LF or CRLF line ends.

pysam's FastxFile (htslib's kseq) parses at the speed of C, but it forgives, and so loses data in silence: a NUL ends a
sequence early, a line that begins with `@` or `+` turns FASTA into FASTQ, text before the first `>` is skipped, a bgzip
file that was cut between two blocks is taken for whole; given a directory it crashes the interpreter. What it would
forgive is therefore looked for first (source.py, format.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pysam

from ...core.errors import InputError
from .format import Format, Record, read
from .source import Source


def read_fasta(path: str | Path) -> Iterator[Record]:
    """The records of a FASTA file, as records.read_records gives them; any other format is an InputError."""
    return read(path, [FASTA])


def _entries(source: Source) -> Iterator[tuple[str, str, str]]:
    n_read = 0
    try:
        with quiet_htslib(), pysam.FastxFile(str(source.path), persist=False) as entries:
            for entry in entries:
                description, sequence = entry.comment or "", entry.sequence or ""
                # kseq drops the carriage return of a CRLF, except where nothing stands before it.
                yield entry.name or "", "" if description == "\r" else description, sequence.removeprefix("\r")
                n_read += 1
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}, which is not UTF-8 text"
        raise InputError(f"{source.name}, record in line {_line_of(source, n_read + 1, 0)}: {byte}") from None
    except (ValueError, OSError):
        raise InputError(f"{source.name}: damaged after {n_read} good records; get the file again") from None


def _line_of(source: Source, number: int, position: int) -> int:
    """Reads the file again: lines are not counted on the way, as only an error asks for one."""
    line = headers = bases = 0
    with source.open() as stream:
        for text in stream:
            line += 1
            if text.startswith(b">") or (not headers and b">" in text):  # blanks may come before the first
                headers += 1
            elif headers == number:
                bases += len(text.rstrip(b"\r\n"))
            if headers == number and bases >= position:
                break
    return line


@contextmanager
def quiet_htslib() -> Iterator[None]:
    """Keep htslib from writing to stderr beside our own message, in all threads."""
    verbosity = pysam.set_verbosity(0)
    try:
        yield
    finally:
        pysam.set_verbosity(verbosity)


FASTA = Format("FASTA", b">", _entries, _line_of, misread=b"@+")
