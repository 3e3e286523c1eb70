"""What all formats share: records, the checks of them, and telling a format by its first bytes.

A format gives `entries`, which parses, and `line_of`, which finds a line again for an error message; `read` does the
rest, so that a sequence means the same in whatever file it comes.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...core.errors import InputError
from ..alphabet import LetterError, tokenize
from .source import GZIP_MAGIC, Source, opened

_UNDECODED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are not UTF-8
_PROTEIN_ONLY = frozenset("EFILPQZ")  # amino acids whose letters are no IUPAC code of DNA

# What people hand over in place of sequences, by its first bytes.
_LOOKS = {
    b"@": "FASTQ",
    b"LOCUS": "GenBank",
    b"ID   ": "EMBL",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    GZIP_MAGIC: "gzip data, compressed twice",
    b"BAM\x01": "BAM alignments",
    b"##": "VCF or GFF",
    b"<": "HTML or XML",
    b"{": "JSON",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class Record(NamedTuple):
    """One record of a sequence file."""

    name: str  # FASTA, FASTQ: the first word of the header; GenBank, EMBL: accession.version
    description: str  # the rest of the header line, or the definition; "" if there is none
    sequence: str  # as in the file, lower case kept (Biopython gives GenBank and EMBL in upper case)
    tokens: np.ndarray  # uint8 (L,), read-only; the ids of alphabet.tokenize


class Format(NamedTuple):
    """A file format."""

    name: str
    start: bytes  # how each file of it begins
    entries: Callable[[Source], Iterator[tuple[str, str, str]]]  # name, description, sequence of each record, unchecked
    line_of: Callable[[Source, int, int], int]  # the line (from 1) of record `number` (from 1) and its base `position`
    #                                             (from 1; 0 is the record's first line); called for error messages
    misread: bytes = b""  # characters at the start of a line that would lead the parser astray


def read(path: str | Path | Source, formats: Sequence[Format]) -> Iterator[Record]:
    """The records of a file in one of `formats`, in its order, streamed; "-" reads standard input, once.

    An opened source may be read again, and is the same then, or an error.

    Raises InputError, one line that names file, record and line, for whatever cannot be read in full: a missing, empty,
    truncated or foreign file (before the first record), then a record that has no name, no sequence, an illegal letter
    or the name of an earlier record, and a file that changes meanwhile.
    """
    with nullcontext(path) if isinstance(path, Source) else opened(path) as source:
        try:
            yield from _records(source, _checked_format(source, formats))
        except Exception:
            source.check_unchanged()  # if it changed, that is the reason
            raise
        source.check_unchanged()


def _records(source: Source, format: Format) -> Iterator[Record]:
    names: dict[str, None] = {}  # a set in the order of the file
    for name, description, sequence in format.entries(source):
        try:
            record = Record(name, description, sequence, tokenize(sequence))
        except LetterError as error:
            problem = _refused_letter(sequence, error)
            raise _record_error(source, format, len(names) + 1, name, problem, error.position) from None
        if problem := _problem(record):
            raise _record_error(source, format, len(names) + 1, name, problem)
        if name in names:
            lines = [format.line_of(source, number, 0) for number in (list(names).index(name) + 1, len(names) + 1)]
            raise InputError(
                f"{source.name}, record {name!r}: the name stands twice, in lines {lines[0]} and {lines[1]}"
            )
        names[name] = None
        yield record


def _problem(record: Record) -> str:
    """What is wrong with a record whose letters are legal; "" if nothing is."""
    if not record.name:
        return "no name in the header"
    if "\r" in record.description:
        return "a bare carriage return in the header; convert the line ends"
    for text in (record.name, record.description):
        if not text.isascii() and (undecoded := _UNDECODED.search(text)):
            return _not_utf8(undecoded[0])
    if not record.sequence:
        return "no sequence after the header"
    return ""


def _refused_letter(sequence: str, error: LetterError) -> str:
    letter = sequence[error.position - 1]
    if _UNDECODED.match(letter):
        return _not_utf8(letter)
    looks_like_protein = len(_PROTEIN_ONLY.intersection(sequence.upper())) > 1
    return f"{error}{'; it looks like protein' if looks_like_protein else ''}"


def _not_utf8(surrogate: str) -> str:
    return f"byte 0x{ord(surrogate) - 0xDC00:02x}, which is not UTF-8 text"


def _record_error(
    source: Source, format: Format, number: int, name: str, problem: str, position: int = 0
) -> InputError:
    line = format.line_of(source, number, position)
    return InputError(f"{source.name}, record {name or number!r}, line {line}: {problem}")


# The first look at a file


def _checked_format(source: Source, formats: Sequence[Format]) -> Format:
    """The format of a file. Reads all its bytes once, for what the parsers would not tell. Raises InputError."""
    format = None
    offset = 0
    previous = b"\n"  # the byte before the block
    for block in source.blocks():
        if format is None:  # and if that is so after the first block, all was blank so far
            start = (block if offset else block.removeprefix(codecs.BOM_UTF8)).lstrip()
            format = _format_that_starts(start, source, formats) if start else None
        _check_block(source, offset, previous, block, format.misread if format else b"")
        offset += len(block)
        previous = block[-1:]
    if format is None:
        raise InputError(f"{source.name}: is empty; expected {_expected(formats)}")
    return format


def _format_that_starts(start: bytes, source: Source, formats: Sequence[Format]) -> Format:
    for format in formats:
        if start.startswith(format.start):
            return format
    raise InputError(f"{source.name}: is not {_expected(formats)}; it looks like {_look_of(start)}")


def _check_block(source: Source, offset: int, previous: bytes, block: bytes, misread: bytes) -> None:
    """Raises InputError if `block`, at `offset` of the file, holds a NUL or has `misread` at the start of a line."""
    # One-byte searches run at memory speed; only a block with a hit is looked at closely.
    if not any(byte in block for byte in b"\0" + misread):
        return
    pattern = rb"\0|\n[%b]" % re.escape(misread) if misread else rb"\0"
    if found := re.search(pattern, previous + block):
        where = f"{source.name}, line {source.line_at(offset + found.end() - 2)}"
        if found[0] == b"\0":
            raise InputError(f"{where}: a NUL byte; the file is damaged or binary")
        raise InputError(f"{where}: begins with {chr(found[0][1])!r} as in FASTQ; expected FASTA")


def _expected(formats: Sequence[Format]) -> str:
    """In words, with how each begins."""
    words = [f"{format.name} (which begins with {format.start.decode().rstrip()!r})" for format in formats]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
