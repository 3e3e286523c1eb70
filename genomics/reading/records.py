"""Files of sequences -> records, whatever the format: told by what a file holds, not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .fasta import FASTA
from .fastq import FASTQ
from .flatfile import EMBL, GENBANK
from .format import Record, read
from .source import Source

_FORMATS = (FASTA, FASTQ, GENBANK, EMBL)


def read_records(path: str | Path | Source) -> Iterator[Record]:
    """The records of a FASTA, FASTQ, GenBank or EMBL file: plain, gzip or bgzip, with LF or CRLF line ends; streamed.

    "-" reads standard input; it and other pipes are copied to a temporary file meanwhile, for a file is read twice.
    An opened source may be read again, and is the same then, or an error.
    Raises InputError, one line that names file, record and line, for whatever cannot be read in full: a missing, empty,
    truncated or foreign file (before the first record), then a record that has no name, no sequence, an illegal letter
    or the name of an earlier record, and a file that changes meanwhile.
    """
    return read(path, _FORMATS)
