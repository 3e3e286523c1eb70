"""FASTA files -> records: plain, gzip or bgzip, any line width, LF or CRLF line ends. A file is read whole or refused.

pysam's FastxFile (htslib's kseq) parses at the speed of C, but it forgives, and so loses data in silence: a NUL ends a
sequence early, a line that begins with `@` or `+` turns FASTA into FASTQ, text before the first `>` is skipped, a bgzip
file that was cut between two blocks is taken for whole; given a directory it crashes the interpreter. So the bytes of a
file are checked first (`_check_bytes`), and each record as it comes (`_checked`).
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pysam

from ...core.errors import InputError
from ..alphabet import LetterError, tokenize

_GZIP_MAGIC = b"\x1f\x8b"
# bgzip ends a file with an empty block, always these 28 bytes (SAM specification, section 4.1.2).
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 1 << 18

# What people hand over in place of FASTA, by its first bytes.
_LOOKS = {
    b"@": "FASTQ",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    _GZIP_MAGIC: "gzip data, compressed twice",
    b"BAM\x01": "BAM alignments",
    b"LOCUS": "GenBank",
    b"ID   ": "EMBL",
    b"##": "VCF or GFF",
    b"<": "HTML or XML",
    b"{": "JSON",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class Record(NamedTuple):
    """One FASTA record."""

    name: str  # the first word of the header
    description: str  # the rest of the header line, "" if there is none
    sequence: str  # as in the file, lower case kept
    tokens: np.ndarray  # uint8 (L,), read-only; the ids of alphabet.tokenize


def read_fasta(path: str | Path) -> Iterator[Record]:
    """The records of one file, in its order, streamed.

    Raises InputError, one line that names file, record and line, for whatever cannot be read in full: a missing, empty,
    truncated or foreign file (before the first record), then a record that has no name, no sequence, an illegal letter
    or the name of an earlier record.
    """
    path = Path(path)
    _check_bytes(path)
    numbers: dict[str, int] = {}  # record name -> its number in the file, from 1
    with _quiet_htslib(), pysam.FastxFile(str(path)) as entries:
        while (entry := _next_entry(entries, path, len(numbers))) is not None:
            number = len(numbers) + 1
            record = _checked(path, number, *entry)
            first = numbers.setdefault(record.name, number)
            if first != number:
                lines = f"lines {_line_of(path, first)} and {_line_of(path, number)}"
                raise InputError(f"{path}, record {record.name!r}: the name stands twice, in {lines}")
            yield record


def _checked(path: Path, number: int, name: str, description: str, sequence: str) -> Record:
    """Record `number` (from 1) of the file. Raises InputError."""
    position = 0
    if not name:
        problem = "no name after '>'"
    elif "\r" in description:
        problem = "a bare carriage return in the header; convert the line ends"
    elif not sequence:
        problem = "no sequence after the header"
    else:
        try:
            return Record(name, description, sequence, tokenize(sequence))
        except LetterError as error:
            problem, position = str(error), error.position
    raise InputError(f"{path}, record {name or number!r}, line {_line_of(path, number, position)}: {problem}")


@contextmanager
def _quiet_htslib() -> Iterator[None]:
    """Keep htslib from writing to stderr beside our own message."""
    verbosity = pysam.set_verbosity(0)
    try:
        yield
    finally:
        pysam.set_verbosity(verbosity)


def _next_entry(entries: pysam.FastxFile, path: Path, n_read: int) -> tuple[str, str, str] | None:
    """Name, description and sequence of the next entry; None at the end of the file."""
    try:
        entry = next(entries, None)
        return None if entry is None else (entry.name or "", entry.comment or "", entry.sequence or "")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}, which is not UTF-8 text"
        raise InputError(f"{path}, record in line {_line_of(path, n_read + 1)}: {byte}") from None
    except (ValueError, OSError):
        raise InputError(f"{path}: damaged after {n_read} good records; get the file again") from None


def _check_bytes(path: Path) -> None:
    """Reads the file once for what the parser would not tell. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a FASTA file")
    if not path.is_file():
        raise InputError(f"{path}: is no ordinary file (a pipe or device); write the sequences to a file first")
    try:
        _check_bgzip_end(path)
        with _open(path) as stream:
            _check_blocks(path, stream)
    except EOFError:
        raise InputError(f"{path}: truncated: the compressed data stop in the middle; get the file again") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip data ({error}); get the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _check_blocks(path: Path, stream: io.BufferedIOBase) -> None:
    """Raises InputError if `stream`, decompressed, does not begin as FASTA does or holds bytes that stop the parser."""
    n_lines = 0  # line ends in the blocks before this one
    previous = b"\n"  # the byte before this block
    started = False
    while block := stream.read(_BLOCK):
        if not started:
            started = _starts_with_header(path, block.removeprefix(_BYTE_ORDER_MARK))
        # One-byte searches run at memory speed; only a block with a hit is looked at closely.
        if b"\0" in block or b"@" in block or b"+" in block:
            joined = previous + block
            if found := re.search(rb"\0|\n[@+]", joined):
                line = n_lines + joined.count(b"\n", 1, found.end()) + 1
                if found[0] == b"\0":
                    raise InputError(f"{path}, line {line}: a NUL byte; the file is damaged or binary")
                raise InputError(f"{path}, line {line}: begins with {chr(found[0][1])!r} as in FASTQ; expected FASTA")
        n_lines += block.count(b"\n")
        previous = block[-1:]
    if not started:
        raise InputError(f"{path}: is empty; expected FASTA, which begins with '>'")


def _starts_with_header(path: Path, block: bytes) -> bool:
    """True if the first byte that is not blank is `>`, False if all are blank; else raises InputError."""
    start = block.lstrip()
    if start and not start.startswith(b">"):
        raise InputError(f"{path}: is not FASTA, which begins with '>'; it looks like {_look_of(start)}")
    return bool(start)


def _look_of(start: bytes) -> str:
    """In words, what a file that begins with these bytes may be."""
    for magic, look in _LOOKS.items():
        if start.startswith(magic):
            return look
    if b"\0" in start[:1000]:
        return "binary data"
    line = start.split(b"\n", 1)[0][:40].decode("ascii", errors="backslashreplace").rstrip()
    kind = "a tab-separated table" if "\t" in line else "a comma-separated table" if "," in line else "other text"
    return f"{kind}, beginning {line!r}"


def _check_bgzip_end(path: Path) -> None:
    """Raises InputError if a bgzip file lacks the block that ends it. A cut between two blocks shows nowhere else."""
    with path.open("rb") as stream:
        head = stream.read(16)
        is_bgzip = head.startswith(_GZIP_MAGIC) and head[12:14] == b"BC"
        if is_bgzip and stream.seek(0, 2) >= len(_BGZF_END):
            stream.seek(-len(_BGZF_END), 2)
            if stream.read() != _BGZF_END:
                raise InputError(f"{path}: truncated: the block that ends a bgzip file is missing; get the file again")


def _open(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if it is gzip or bgzip by its first bytes, whatever its name."""
    with path.open("rb") as stream:
        is_gzip = stream.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def _line_of(path: Path, number: int, position: int = 0) -> int:
    """The line (from 1) that holds base `position` (from 1) of record `number` (from 1); position 0 is its header line.

    Reads the file again: lines are not counted on the way, as only an error asks for one.
    """
    line = headers = bases = 0
    with _open(path) as stream:
        for text in stream:
            line += 1
            if text.startswith(b">") or (not headers and b">" in text):  # blanks may come before the first
                headers += 1
            elif headers == number:
                bases += len(text.rstrip(b"\r\n"))
            if headers == number and bases >= position:
                break
    return line
