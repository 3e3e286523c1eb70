"""Labelled DNA: from FASTA files, one or more a class, to tokens, labels and parts (train, valid, test)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files as package_files
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.files import written_whole
from .alphabet import N
from .reading.fasta import read_fasta
from .reading.folders import LabelledFile, files_in_folder
from .splits import SPLITS, sequence_keys, straddling, stratified_split

_SPLIT_COLUMNS = ["id", "class", "split", "source"]


@dataclass(frozen=True, eq=False)
class LabelledSequences:
    """n labelled sequences, in the order of their files."""

    names: list[str]  # unique within a source only
    tokens: list[np.ndarray]  # uint8 (L,) each
    labels: np.ndarray  # int64 (n,), indices into classes
    classes: tuple[str, ...]
    split: np.ndarray  # str (n,), each one of SPLITS
    sources: list[str]  # path of each record's file

    def subset(self, split: str) -> LabelledSequences:
        """The records of one part, with the same classes."""
        records = np.flatnonzero(self.split == split)
        return replace(
            self,
            names=[self.names[i] for i in records],
            tokens=[self.tokens[i] for i in records],
            labels=self.labels[records],
            split=self.split[records],
            sources=[self.sources[i] for i in records],
        )

    def with_classes(self, classes: Sequence[str]) -> LabelledSequences:
        """The same records, labelled by their place in `classes` (a model's). Raises InputError for others."""
        if unknown := sorted(set(self.classes) - set(classes)):
            raise InputError(f"class {', '.join(unknown)}: not among the known classes {', '.join(classes)}")
        new_label = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        return replace(self, labels=new_label[self.labels], classes=tuple(classes))

    def summary(self) -> dict[str, Any]:
        """What is in the data, JSON-safe: a row of figures for each class, one for all, and what the parts share.

        shared    how many distinct sequences two parts have in common, either strand
        with_N    how many sequences hold an N or another ambiguity code
        """
        rows = [self._row(name, self.labels == label) for label, name in enumerate(self.classes)]
        keys = sequence_keys(self.tokens)
        pairs = combinations([part for part in SPLITS if np.any(self.split == part)], 2)
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
            **{part: int(np.sum(self.split[chosen] == part)) for part in SPLITS},
            "shortest": min(lengths),
            "median": int(np.median(lengths)),
            "longest": max(lengths),
            "with_N": sum(bool((ids == N).any()) for ids in tokens),
        }

    def describe(self) -> str:
        """`summary` as a table to print."""
        summary = self.summary()
        table = [["class", *SPLITS, "shortest", "median", "longest", "with N"]]
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
        with written_whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(_SPLIT_COLUMNS)
            names = [self.classes[label] for label in self.labels]
            writer.writerows(zip(self.names, names, self.split.tolist(), self.sources, strict=True))


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
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(_SPLIT_COLUMNS) or line[2] not in SPLITS:
            raise InputError(f"{path}, line {number}: expected id, class, one of {', '.join(SPLITS)}, and source")
    return [SplitRow(*line) for line in lines[1:]]


# Ways in


def from_class_files(
    files: Mapping[str, Sequence[str | Path]],
    *,
    split: bool = True,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> LabelledSequences:
    """Read FASTA files by class name; the classes keep the order of `files`.

    With split=True a valid and a test part are set aside, stratified (splits.py); it takes two classes at least. With
    split=False, as for the evaluation of a model, every record stays in "train".
    Raises InputError for files that cannot be read, a class with no file or too few records, or a file given twice.
    """
    classes = tuple(files)
    if split:
        _require_two_classes(classes)
    for name, paths in files.items():
        if not paths:
            raise InputError(f"class {name!r}: no file given")
    data = _read([LabelledFile("train", name, Path(path)) for name, paths in files.items() for path in paths], classes)
    return _set_aside(data, {"valid": valid_fraction, "test": test_fraction}, seed) if split else data


def from_folder(
    path: str | Path,
    *,
    split: bool = True,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> LabelledSequences:
    """Read a folder that holds one FASTA file, or one folder of them, for each class; the classes are sorted by name.

    These may lie one level down, in folders train, valid (or val, validation, dev) and test. With split=True a part
    that is missing is set aside from the train records, stratified (splits.py); given parts stay as they are. With
    split=False nothing is set aside.
    Raises InputError as from_class_files does, and for classes that train lacks or files that are no FASTA by name.
    """
    files = files_in_folder(path)
    if not split:
        return _read(files, tuple(sorted({file.label for file in files})))
    parts = {file.split for file in files}
    if "train" not in parts:
        raise InputError(f"{path}: has a {' and a '.join(sorted(parts))} part but no folder train")
    classes = tuple(sorted({file.label for file in files if file.split == "train"}))
    _require_two_classes(classes, f"{path}: ")
    for file in files:
        if file.label not in classes:
            raise InputError(f"{file.path}: class {file.label!r} is not in train, which has {', '.join(classes)}")
    fractions = {"valid": valid_fraction, "test": test_fraction}
    missing = {part: share for part, share in fractions.items() if part not in parts}
    return _set_aside(_read(files, classes), missing, seed)


def example(name: str, *, valid_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0) -> LabelledSequences:
    """A data set that comes with the package (genomics/examples), read as any folder is."""
    folder = Path(str(package_files("polymamba.genomics") / "examples"))
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if name not in names:
        raise InputError(f"no example {name!r}; there is {', '.join(names)}")
    return from_folder(folder / name, valid_fraction=valid_fraction, test_fraction=test_fraction, seed=seed)


def _read(files: Iterable[LabelledFile], classes: tuple[str, ...]) -> LabelledSequences:
    names, tokens, labels, split, sources = [], [], [], [], []
    seen = set()
    for file in files:
        if file.path.resolve() in seen:
            raise InputError(f"{file.path}: given twice")
        seen.add(file.path.resolve())
        for record in read_fasta(file.path):
            names.append(record.name)
            tokens.append(record.tokens)
            labels.append(classes.index(file.label))
            split.append(file.split)
            sources.append(str(file.path))
    label_ids, parts = np.array(labels, dtype=np.int64), np.array(split, dtype="<U5")
    return LabelledSequences(names, tokens, label_ids, classes, parts, sources)


def _set_aside(data: LabelledSequences, fractions: Mapping[str, float], seed: int) -> LabelledSequences:
    """Move shares of the train records to other parts."""
    if not (all(share >= 0 for share in fractions.values()) and sum(fractions.values()) < 1):
        shares = " and ".join(f"{part} {share:g}" for part, share in fractions.items())
        raise InputError(f"the shares {shares} must not be negative, and add up to less than 1")
    train = np.flatnonzero(data.split == "train")
    keys = sequence_keys([data.tokens[i] for i in train])
    split = data.split.copy()
    split[train] = stratified_split(keys, [data.classes[data.labels[i]] for i in train], fractions, seed)
    return replace(data, split=split)


def _require_two_classes(classes: Sequence[str], where: str = "") -> None:
    if len(classes) < 2:
        raise InputError(f"{where}{len(classes)} class ({', '.join(classes)}) is too few to classify; give two or more")
