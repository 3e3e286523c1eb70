"""GenBank and EMBL flat files, by Biopython. Only name, definition and sequence are read; features are passed over.

The parser only warns of a file that stops in the middle, skips text between two records, and makes one record of two
where the end of the first is missing. Here these are errors.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ...core.errors import InputError
from .format import Format
from .source import CountedLines, Source

if TYPE_CHECKING:
    from Bio.GenBank.Scanner import InsdcScanner

_LOCUS, _ID = "LOCUS       ", "ID   "
_END = "//"


def _genbank_scanner() -> InsdcScanner:
    from Bio.GenBank.Scanner import GenBankScanner  # here: FASTA need not wait for Biopython

    return GenBankScanner()


def _embl_scanner() -> InsdcScanner:
    from Bio.GenBank.Scanner import EmblScanner

    return EmblScanner()


def _entries(source: Source, start: str, scanner: Callable[[], InsdcScanner]) -> Iterator[tuple[str, str, str]]:
    with source.open_text() as text:
        lines = _Lines(text, start, source.name)
        records = scanner().parse_records(lines, do_features=False)
        while True:
            try:
                with _fatal_warnings():
                    record = next(records, None)
            except InputError:
                raise
            except Exception as error:  # the parser raises whatever its lines of code meet
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"{source.name}, record in line {lines.first}: {reason}; get the file again") from None
            if record is None:
                return
            name, description = str(record.id), record.description
            sequence = record.seq
            if not (sequence and sequence.defined):
                problem = "no sequence; get the full record, in which ORIGIN or SQ and the bases follow the features"
                raise InputError(f"{source.name}, record {name!r}, line {lines.first}: {problem}")
            yield name, "" if description == "." else description, str(sequence)


@contextmanager
def _fatal_warnings() -> Iterator[None]:
    """Where the parser warns that bases are missing, raise the warning; what else it warns of is not read here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for beginning in ("Expected sequence length", "Premature end of file"):
            warnings.filterwarnings("error", beginning)
        yield


def _line_of(source: Source, number: int, position: int, start: str) -> int:
    records = bases = 0
    in_sequence = False
    with source.open_text() as text:
        lines = CountedLines(text)
        for line in lines:
            if line.startswith(start):
                records += 1
            elif line.startswith(("ORIGIN", "SQ ")):
                in_sequence = True
            elif in_sequence and records == number:
                bases += sum(len(word) for word in line.split() if not word.isdigit())  # less the coordinate
            in_sequence &= line.rstrip() != _END
            if records == number and bases >= position:
                break
        return lines.number


class _Lines(CountedLines):
    """The lines of a flat file, each of whose records must go from its first line to `//`, with nothing between two."""

    def __init__(self, text: io.TextIOWrapper, start: str, name: str):
        super().__init__(text)
        self.first = 0  # the first line of the record that was begun last
        self._start = start
        self._name = name
        self._inside = False

    def readline(self) -> str:
        line = super().readline()
        begins = line.startswith(self._start)
        if begins and self._inside:
            raise InputError(f"{self._name}, line {self.number}: the record of line {self.first} has no end, {_END!r}")
        if not (begins or self._inside or line.isspace() or not line):
            raise InputError(f"{self._name}, line {self.number}: expected {self._start!r}, which begins a record")
        if begins:
            self.first = self.number
        self._inside = (begins or self._inside) and line.rstrip() != _END
        return line


GENBANK = Format(
    "GenBank", b"LOCUS", partial(_entries, start=_LOCUS, scanner=_genbank_scanner), partial(_line_of, start=_LOCUS)
)
EMBL = Format("EMBL", b"ID   ", partial(_entries, start=_ID, scanner=_embl_scanner), partial(_line_of, start=_ID))
