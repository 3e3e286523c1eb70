"""FASTQ: four lines a record, or sequence and qualities over several lines. The qualities are checked, not kept.

The parser is Biopython's, which refuses what kseq (pysam) skips in silence: text between two records, a quality line
too many, a `+` line that names another record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TextIO, cast

from ...core.errors import InputError
from .format import Format
from .source import CountedLines, Source

_BLANK = re.compile(r"\s", re.ASCII)


def _entries(source: Source) -> Iterator[tuple[str, str, str]]:
    from Bio.SeqIO.QualityIO import FastqGeneralIterator  # here: FASTA need not wait for Biopython

    n_read = 0
    with source.open_text() as text:
        records = FastqGeneralIterator(text)
        while True:
            try:
                title, sequence, quality = next(records, ("", "", None))
            except ValueError as error:
                raise _error(source, n_read + 1, str(error).rstrip(".")) from None
            if quality is None:
                return
            n_read += 1
            if not (quality.isascii() and quality.isprintable() and " " not in quality):
                raise _error(source, n_read, "a quality that is none of the characters from '!' to '~'")
            name, *description = _BLANK.split(title, maxsplit=1)
            yield name, "".join(description), sequence


def _error(source: Source, number: int, problem: str) -> InputError:
    line = _line_of(source, number, 0)
    return InputError(f"{source.name}, record {number}, line {line}: {problem}; the file is damaged or no FASTQ")


def _line_of(source: Source, number: int, position: int) -> int:
    from Bio.SeqIO.QualityIO import FastqGeneralIterator

    with source.open_text() as text:
        lines = CountedLines(text)
        if number == 1:
            lines.readline()
        else:  # the parser has read the next header when it gives a record
            next(islice(FastqGeneralIterator(cast(TextIO, lines)), number - 2, None))
        bases = 0
        while bases < position and (line := lines.readline()):
            bases += len(line.rstrip())
        return lines.number


FASTQ = Format("FASTQ", b"@", _entries, _line_of)
