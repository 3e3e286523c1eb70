"""Tables with a header line, TSV or CSV -> labels, or labelled sequences, record by record.

The header's delimiter, a tab, comma or semicolon, is that of the table. Fields may be quoted with `"`; blanks at
their ends do not count, empty lines neither. Columns are told by name, in any order and either case:

    id          id, name, seq_id
    label       label, class, target
    sequence    sequence, seq, dna
    split       split, set, partition; its values are train, valid (or val, validation, dev) and test

Other columns are passed over. Files are UTF-8, plain, gzip or bgzip.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...core.errors import InputError
from ..alphabet import LetterError, tokenize
from ..config import PART_OF
from .text import read_lines

_ID = ("id", "name", "seq_id")
_LABEL = ("label", "class", "target")
_SEQUENCE = ("sequence", "seq", "dna")
_SPLIT = ("split", "set", "partition")
_DELIMITERS = "\t,;"


class LabelRow(NamedTuple):
    """The label of one record."""

    id: str  # unique in the table
    label: str
    split: str  # one of PARTS; "" if the table has no such column
    line: int  # in the table, from 1


class SequenceRow(NamedTuple):
    """One labelled sequence."""

    id: str  # unique in the table
    sequence: str  # as in the table, lower case kept
    tokens: np.ndarray  # uint8 (L,), read-only; the ids of alphabet.tokenize
    label: str
    split: str  # one of PARTS; "" if the table has no such column
    line: int  # in the table, from 1


def read_label_table(path: str | Path) -> list[LabelRow]:
    """The rows of a table with columns id and label, perhaps split.

    Raises InputError that names file and line: a missing or doubled column, a row with more or fewer fields than the
    header, an empty field, an unknown split, an id that stands twice, a table without rows.
    """
    path = Path(path)
    columns = {"id": _ID, "label": _LABEL, "split": _SPLIT}
    rows = []
    for line, cells in read_table(path, columns, required=("id", "label")):
        rows.append(LabelRow(cells["id"], cells["label"], _split(path, line, cells), line))
    _require_unique(path, rows)
    return rows


def read_sequence_table(path: str | Path) -> list[SequenceRow]:
    """The rows of a table with columns sequence and label, perhaps id and split.

    Without an id column the rows are numbered, from 1. Raises InputError as read_label_table does, and for a letter
    that alphabet.tokenize refuses.
    """
    path = Path(path)
    columns = {"id": _ID, "sequence": _SEQUENCE, "label": _LABEL, "split": _SPLIT}
    rows = []
    for line, cells in read_table(path, columns, required=("sequence", "label")):
        name = cells.get("id") or str(len(rows) + 1)
        try:
            tokens = tokenize(cells["sequence"])
        except LetterError as error:
            raise InputError(f"{path}, record {name!r}, line {line}: {error}") from None
        rows.append(SequenceRow(name, cells["sequence"], tokens, cells["label"], _split(path, line, cells), line))
    _require_unique(path, rows)
    return rows


def match_labels(names: Iterable[str], rows: Sequence[LabelRow], path: str | Path) -> list[LabelRow]:
    """The row of each record, in the order of `names`; `path` is the table's.

    Raises InputError unless every record has a row, and every row one record.
    """
    names = list(names)
    row_of = {row.id: row for row in rows}
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        what = f"{_some(doubled)} name more than one of the sequences"
        raise InputError(f"{path}: {what}, so it is unclear which one is meant; rename the sequences")
    problems = []
    if unlabelled := [name for name in names if name not in row_of]:
        problems.append(f"{len(unlabelled)} of {len(names)} sequences have no row ({_some(unlabelled)})")
    if unused := list(row_of.keys() - set(names)):
        unused.sort(key=lambda name: row_of[name].line)
        problems.append(f"{len(unused)} of {len(rows)} rows have no sequence ({_some(unused)})")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}; ids must equal the names of the sequences")
    return [row_of[name] for name in names]


def part_at(where: str, word: str) -> str:
    """One of PARTS, from a word for it in either case, which stands at `where` (file and line). Raises InputError."""
    if word.lower() not in PART_OF:
        raise InputError(f"{where}: split {word!r} is none of train, valid (or val, validation, dev) and test")
    return PART_OF[word.lower()]


def read_table(
    path: Path, columns: Mapping[str, tuple[str, ...]], required: Collection[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """For each row its line, from 1, and its fields by the keys of `columns` (see find_columns), none of them empty.

    Raises InputError as read_label_table does.
    """
    (header_line, header), *rows = _parse(path, columns)
    found = find_columns(header, columns, required, f"{path}, line {header_line}")
    if not rows:
        raise InputError(f"{path}: has no row below its header")
    for line, cells in rows:
        if len(cells) != len(header):
            wrong = f"{len(cells)} fields, but the header has {len(header)}"
            raise InputError(f"{path}, line {line}: {wrong}; quote a field that holds the delimiter")
        for key, column in found.items():
            if not cells[column]:
                raise InputError(f"{path}, line {line}: no {key}; fill the column {header[column]!r} in every row")
        yield line, {key: cells[column] for key, column in found.items()}


def find_columns(
    header: Sequence[str], columns: Mapping[str, tuple[str, ...]], required: Collection[str], where: str
) -> dict[str, int]:
    """Key -> place in the header, from 0, for the keys of `columns` that it has; their values are the names allowed.

    Raises InputError if one of `required` is missing, or two columns of the header have the same meaning.
    """
    plain = [_plain(name) for name in header]
    found = {}
    for key, allowed in columns.items():
        places = [i for i, name in enumerate(plain) if name in allowed]
        if len(places) > 1:
            both = " and ".join(repr(header[i]) for i in places)
            raise InputError(f"{where}: columns {both} may both be the {key}; rename one of them")
        if places:
            found[key] = places[0]
        elif key in required:
            has = ", ".join(header)
            raise InputError(f"{where}: no column for the {key} ({' or '.join(allowed)}); the header has {has}")
    return found


def _plain(name: str) -> str:
    """A column's name without case, blanks around it and the `#` that may begin a header."""
    return name.strip().removeprefix("#").strip().lower()


def _parse(path: Path, columns: Mapping[str, tuple[str, ...]]) -> list[tuple[int, list[str]]]:
    """The fields of each line, the header first, with the line's number; a row of several lines has its first one's."""
    lines = [line + "\n" for line in read_lines(path)]
    header = next((line for line in lines if line.strip()), "")
    rows = []
    line = 1
    usual_limit = csv.field_size_limit(sys.maxsize)  # a field may hold a chromosome; csv stops at 131,072 letters
    try:
        reader = csv.reader(lines, delimiter=_delimiter(header, columns), skipinitialspace=True, strict=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if cells not in ([], [""]):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: quotes that do not match ({error})") from None
    finally:
        csv.field_size_limit(usual_limit)
    if not rows:
        raise InputError(f"{path}: is empty; expected a table with a header line")
    return rows


def _delimiter(header: str, columns: Mapping[str, tuple[str, ...]]) -> str:
    """The delimiter with which most columns are known, or else which makes most columns."""
    known = {name for names in columns.values() for name in names}

    def fit(delimiter: str) -> tuple[int, int]:
        names = [_plain(name) for name in next(csv.reader([header], delimiter=delimiter))]
        return len(known.intersection(names)), len(names)

    return max(_DELIMITERS, key=fit)


def _split(path: Path, line: int, cells: Mapping[str, str]) -> str:
    return part_at(f"{path}, line {line}", cells["split"]) if "split" in cells else ""


def _require_unique(path: Path, rows: Iterable[LabelRow | SequenceRow]) -> None:
    first: dict[str, int] = {}
    for row in rows:
        line = first.setdefault(row.id, row.line)
        if line != row.line:
            raise InputError(f"{path}, line {row.line}: id {row.id!r} stands in line {line} too; ids must be unique")


def _some(names: Sequence[str]) -> str:
    """The first few names, in words."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
