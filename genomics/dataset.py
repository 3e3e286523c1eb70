"""Labelled DNA as it is trained on and measured: tokens, labels, and parts (train, valid, test)."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.files import save_tsv
from ..core.inputs import PARTS
from .alphabet import N
from .config import Target
from .splits import sequence_keys, straddling

_SPLIT_COLUMNS = ["id", "class", "split", "source"]
NO_LABEL = "."  # of a sequence to which none of several labels applies


class LabelledRow(NamedTuple):
    """One labelled sequence as a file gives it."""

    name: str
    tokens: np.ndarray  # uint8 (L,)
    label: str
    split: str  # one of PARTS, or "" where the file does not say
    source: str  # path of its file


@dataclass(frozen=True, eq=False)
class LabelledSequences:
    """n labelled sequences, in the order of their files.

    labels    multiclass: int64 (n,), indices into classes; multilabel: bool (n, K); regression: float64 (n,)
    classes   K names; for regression the one name of the value
    records   int (n,): windows of one record have one number; None: each sequence is a record
    starts    int (n,): where in its record each window begins; None: each sequence is a record
    """

    names: list[str]  # unique within a source only
    tokens: list[np.ndarray]  # uint8 (L,) each
    labels: np.ndarray
    classes: tuple[str, ...]
    split: np.ndarray  # str (n,), each one of PARTS
    sources: list[str]  # path of each record's file
    target: Target = "multiclass"
    records: np.ndarray | None = None
    starts: np.ndarray | None = None

    def take(self, chosen: np.ndarray) -> LabelledSequences:
        """The sequences of these indices, in this order, with the same classes."""
        return replace(
            self,
            names=[self.names[i] for i in chosen],
            tokens=[self.tokens[i] for i in chosen],
            labels=self.labels[chosen],
            split=self.split[chosen],
            sources=[self.sources[i] for i in chosen],
            records=None if self.records is None else self.records[chosen],
            starts=None if self.starts is None else self.starts[chosen],
        )

    def subset(self, split: str) -> LabelledSequences:
        """The records of one part, with the same classes."""
        return self.take(np.flatnonzero(self.split == split))

    def label_texts(self) -> list[str]:
        """Each record's label as a file would give it."""
        if self.target == "multiclass":
            return [self.classes[label] for label in self.labels]
        if self.target == "multilabel":
            return [";".join([self.classes[k] for k in np.flatnonzero(row)]) or NO_LABEL for row in self.labels]
        return [f"{value:g}" for value in self.labels]

    def with_classes(self, classes: Sequence[str]) -> LabelledSequences:
        """The same records, labelled by their place in `classes` (a model's). Raises InputError for others."""
        if self.target == "regression":
            return replace(self, classes=tuple(classes))
        if unknown := sorted(set(self.classes) - set(classes)):
            raise InputError(f"class {', '.join(unknown)}: not among the known classes {', '.join(classes)}")
        place = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        if self.target == "multiclass":
            return replace(self, labels=place[self.labels], classes=tuple(classes))
        labels = np.zeros((len(self.labels), len(classes)), dtype=bool)
        labels[:, place] = self.labels
        return replace(self, labels=labels, classes=tuple(classes))

    def digest(self) -> str:
        """A checksum of all that matters of the records, whatever files they came from."""
        digest = hashlib.sha256()
        for row in zip(self.names, self.label_texts(), self.split.tolist(), self.tokens, strict=True):
            digest.update("\t".join(row[:3]).encode() + b"\n" + row[3].tobytes() + b"\n")
        return digest.hexdigest()

    def members(self) -> dict[str, np.ndarray]:
        """Class -> which records are of it, bool (n,); of a regression nothing."""
        if self.target == "regression":
            return {}
        return {
            name: self.labels == k if self.target == "multiclass" else self.labels[:, k]
            for k, name in enumerate(self.classes)
        }

    def summary(self) -> dict[str, Any]:
        """What is in the data, JSON-safe: a row of figures for each class, one for all, and what the parts share.

        shared    how many distinct sequences two parts have in common, either strand
        with_N    how many sequences hold an N or another ambiguity code
        """
        rows = [self._row(name, chosen) for name, chosen in self.members().items()]
        keys = sequence_keys(self.tokens)
        pairs = combinations([part for part in PARTS if np.any(self.split == part)], 2)
        return {
            "rows": [*rows, self._row("all", np.ones(len(self.labels), dtype=bool))],
            "distinct": len(set(keys)),
            "shared": {f"{one}/{other}": straddling(keys, self.split, one, other) for one, other in pairs},
        }

    def _row(self, name: str, chosen: np.ndarray) -> dict[str, Any]:
        tokens = [self.tokens[i] for i in np.flatnonzero(chosen)]
        lengths = [len(ids) for ids in tokens] or [0]
        return {
            "class": name,
            **{part: int(np.sum(self.split[chosen] == part)) for part in PARTS},
            "shortest": min(lengths),
            "median": int(np.median(lengths)),
            "longest": max(lengths),
            "with_N": sum(bool((ids == N).any()) for ids in tokens),
        }

    def describe(self) -> str:
        """`summary` as a table to print."""
        summary = self.summary()
        table = [["class", *PARTS, "shortest", "median", "longest", "with N"]]
        table += [[str(value) for value in row.values()] for row in summary["rows"]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        lines.append(f"{summary['distinct']} distinct sequences, either strand")
        for pair, count in summary["shared"].items():
            if count:
                lines.append(f"{count} of them stand in both {pair.replace('/', ' and ')}")
        return "\n".join(lines)

    def write_splits_tsv(self, path: str | Path) -> None:
        """Which record went to which part: columns id, class, split, source; id and source together are unique."""
        rows = zip(self.names, self.label_texts(), self.split.tolist(), self.sources, strict=True)
        save_tsv(path, _SPLIT_COLUMNS, rows)


class SplitRow(NamedTuple):
    """One line of splits.tsv."""

    name: str
    label: str  # class name
    split: str
    source: str


def read_splits(path: str | Path) -> list[SplitRow]:
    """The rows of a splits.tsv. Raises InputError that names the line."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not lines or lines[0] != _SPLIT_COLUMNS:
        raise InputError(f"{path}, line 1: expected the columns {', '.join(_SPLIT_COLUMNS)}, separated by tabs")
    lines_of: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(_SPLIT_COLUMNS) or line[2] not in PARTS:
            raise InputError(f"{path}, line {number}: expected id, class, one of {', '.join(PARTS)}, and source")
        first = lines_of.setdefault((line[0], line[3]), number)
        if first != number:
            raise InputError(f"{path}, line {number}: record {line[0]!r} of {line[3]} stands in line {first} too")
    return [SplitRow(*line) for line in lines[1:]]


def labelled(
    rows: Iterable[LabelledRow], target: Target = "multiclass", classes: Sequence[str] | None = None
) -> LabelledSequences:
    """Rows as one data set; the classes are those of `classes`, or sorted by name.

    A multilabel label holds names separated by ";", or "." for none of them; a regression's label is a number.
    A row without a part is of train. Raises InputError that names the record whose label does not fit.
    """
    rows = list(rows)
    with_part, without = (next((row for row in rows if bool(row.split) is given), None) for given in (True, False))
    if with_part is not None and without is not None:
        where = f"{with_part.source} says it of record {with_part.name!r}, {without.source} not of {without.name!r}"
        raise InputError(f"only some records have a part (train, valid or test): {where}; give it for all or none")
    texts = [row.label for row in rows]
    if target == "regression":
        names = ("value",) if classes is None else tuple(classes)
        labels = np.array([_number(row) for row in rows], dtype=np.float64)
    else:
        sets = [[text] if target == "multiclass" else _names_in(text) for text in texts]
        names = tuple(sorted({name for names in sets for name in names}) if classes is None else classes)
        place = {name: k for k, name in enumerate(names)}
        if target == "multiclass":
            labels = np.array([place[text] for text in texts], dtype=np.int64)
        else:
            labels = np.zeros((len(rows), len(names)), dtype=bool)
            for row, found in zip(labels, sets, strict=True):
                row[[place[name] for name in found]] = True
    split = np.array([row.split or "train" for row in rows], dtype="<U5")
    sources = [row.source for row in rows]
    return LabelledSequences(
        [row.name for row in rows], [row.tokens for row in rows], labels, names, split, sources, target
    )


def _names_in(text: str) -> list[str]:
    return [] if text == NO_LABEL else [name.strip() for name in text.split(";") if name.strip()]


def _number(row: LabelledRow) -> float:
    try:
        value = float(row.label)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{row.source}, record {row.name!r}: label {row.label!r} is no finite number")
    return value
