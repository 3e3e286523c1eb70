"""VCF as text: every line as it came, with entries added to its INFO column.

htslib (pysam) reads records and writes them anew, which is not the same: values that a header does not fit become
missing in silence, numbers are written in another way, and a record with an undeclared tag or contig cannot be written
at all. Here a record keeps every letter. BCF, which is binary, comes by way of pysam: htslib wrote it anyway.
Files are plain, gzip or bgzip. Positions are from 0 here, from 1 in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pysam

from ...core.errors import InputError
from .fasta import quiet_htslib
from .source import Source
from .text import lines_of

COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
_POSITION = re.compile("[0-9]{1,10}")
_BASES = re.compile("[ACGTNURYSWKMBDHV]+", re.IGNORECASE)
_INFO_ID = re.compile(r"##INFO=<ID=([^,>]+)")


class Variant(NamedTuple):
    """A record: its cells as they stand in the file, and what of them is looked at here."""

    cells: list[str]
    line: int  # in the file, from 1; of BCF the number of the record

    @property
    def chromosome(self) -> str:
        return self.cells[0]

    @property
    def position(self) -> int:
        """Of the first letter of `reference`, from 0; -1 is before the chromosome (POS 0)."""
        return int(self.cells[1]) - 1

    @property
    def reference(self) -> str:
        return self.cells[3]

    @property
    def alternatives(self) -> list[str]:
        """As they stand there: bases, <DEL>, *, breakends; none for "."."""
        return [] if self.cells[4] == "." else self.cells[4].split(",")

    def with_info(self, entries: Sequence[str]) -> str:
        """The line with entries KEY=VALUE after those that it has."""
        info = [*([] if self.cells[7] == "." else [self.cells[7]]), *entries]
        return "\t".join([*self.cells[:7], ";".join(info) or ".", *self.cells[8:]])

    def info(self, key: str) -> str | None:
        """The value of an INFO entry as text, "" of a flag; None if it is not there."""
        for entry in self.cells[7].split(";"):
            name, _, value = entry.partition("=")
            if name == key:
                return value
        return None


class VariantFile:
    """The header and the records of a VCF or BCF file; to be iterated over once.

    Raises InputError, one line that names file and line, for what is no VCF, for a record with another number of
    columns than the header, an empty chromosome, a position that is no number, a reference that is no bases, and what
    `lines_of` refuses.
    """

    def __init__(self, source: Source):
        self.source = source
        self._lines = _bcf_lines(source) if _is_bcf(source) else enumerate(lines_of(source), 1)
        self.header: list[str] = []
        for line, text in self._lines:
            if line == 1 and not text.startswith("##fileformat=VCF"):
                begins = f"expected ##fileformat=VCF... in its first line, found {text[:40]!r}"
                raise InputError(f"{source.name}: not a VCF file; {begins}")
            self.header.append(text)
            if not text.startswith("##"):
                break
        if not self.header:
            raise InputError(f"{source.name}: is empty; expected a VCF file")
        columns = self.header[-1].split("\t")
        if tuple(columns[: len(COLUMNS)]) != COLUMNS:
            where = f"{source.name}, line {len(self.header)}"
            raise InputError(f"{where}: expected the line of columns, {' '.join(COLUMNS)} ..., separated by tabs")
        self._n_columns = len(columns)

    @property
    def declared(self) -> set[str]:
        """The INFO entries that the header declares."""
        return {match[1] for line in self.header if (match := _INFO_ID.match(line))}

    def is_flag(self, key: str) -> bool:
        """Whether the header declares an INFO entry that is there or not, without a value."""
        lines = (line for line in self.header if line.startswith(f"##INFO=<ID={key},"))
        return any("Type=Flag" in line for line in lines)

    def __iter__(self) -> Iterator[Variant]:
        for line, text in self._lines:
            if text:
                yield self._checked(Variant(text.split("\t"), line))

    def _checked(self, variant: Variant) -> Variant:
        cells, where = variant.cells, f"{self.source.name}, line {variant.line}"
        if len(cells) != self._n_columns:
            raise InputError(
                f"{where}: {len(cells)} columns, but {self._n_columns} in the header; separate them by tabs"
            )
        if empty := [name for name, cell in zip(COLUMNS, cells, strict=False) if not cell]:
            raise InputError(f"{where}: {empty[0].removeprefix('#')} is empty; write . for what is missing")
        if not _POSITION.fullmatch(cells[1]):
            raise InputError(f"{where}: POS {cells[1]!r} is no whole number, 0 or more")
        if not _BASES.fullmatch(cells[3]):
            raise InputError(f"{where}: REF {cells[3][:40]!r} is not one or more bases")
        if "" in variant.alternatives:
            raise InputError(f"{where}: ALT {cells[4][:40]!r} has an empty allele")
        return variant


def header_with(header: Sequence[str], lines: Sequence[str]) -> list[str]:
    """A VCF header with further ## lines, which stand last before the line of columns."""
    return [*header[:-1], *lines, header[-1]]


def index_if_sorted(path: Path, beside: Path) -> bool:
    """Make PATH.tbi for the bgzip VCF that is written `beside`, unless its records are out of order.

    An index of what stood at PATH before is removed in any case.
    """
    Path(f"{path}.tbi").unlink(missing_ok=True)
    try:
        with quiet_htslib():
            pysam.tabix_index(str(beside), preset="vcf", index=f"{path}.tbi", force=True)
    except (OSError, pysam.SamtoolsError):
        return False
    return True


def _is_bcf(source: Source) -> bool:
    try:
        with source.open() as stream:
            return stream.read(3) == b"BCF"
    except (OSError, EOFError):
        return False  # whoever reads the lines says what is wrong


def _bcf_lines(source: Source) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with quiet_htslib(), pysam.VariantFile(str(source.path)) as records:
            yield from enumerate(str(records.header).rstrip("\n").split("\n"), 1)
            for number, record in enumerate(records, 1):
                yield number, str(record).rstrip("\n")
    except (OSError, ValueError):
        raise InputError(f"{source.name}: damaged after {number} good records; get the file again") from None
