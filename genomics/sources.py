"""The ways in which people hold labelled DNA -> labelled sequences, with the parts that the files give."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np

from ..core.errors import InputError
from .alphabet import hard_masked
from .commands import Source
from .config import Target
from .dataset import LabelledRow, LabelledSequences, labelled
from .reading.files import files_of, find_files, given_once
from .reading.folders import files_in_folder
from .reading.format import Record
from .reading.regions import Region, cut, read_benchmark_folder, read_regions, region_name
from .reading.several import read_each
from .reading.tables import match_labels, part_at, read_label_table, read_sequence_table

NO_CLASS = "all"  # the label of sequences that are only looked at


def class_files(files: Mapping[str, Sequence[str | Path]], *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """The records of files given by class. Raises InputError for a file given twice."""
    yield from _rows(
        ((path, label, "") for label, words in files.items() for word in words for path in find_files(str(word))),
        hard_mask,
    )


def folder(path: str | Path, *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """The records of a folder with one file, or one folder of them, for each class, perhaps below its parts."""
    yield from _rows(((file.path, file.label, file.split) for file in files_in_folder(path)), hard_mask)


def _rows(files: Iterable[tuple[Path, str, str]], hard_mask: bool) -> Iterator[LabelledRow]:
    placed = list(files)
    given_once(path for path, _, _ in placed)
    read = read_each([path for path, _, _ in placed], lambda record: (record.name, tokens_of(record, hard_mask)))
    for (path, label, split), records in zip(placed, read, strict=True):
        for name, tokens in records:
            yield LabelledRow(name, tokens, label, split, str(path))


def header_pattern(words: Sequence[str], pattern: str, *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """Records whose header says the class: `pattern` is a regular expression, found anywhere in the header.

    Its group `label`, or else its first group, is the class; a group `split` is the part.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--label-pattern {pattern}: no regular expression ({error})") from None
    if not compiled.groups:
        raise InputError(f"--label-pattern {pattern}: has no group; put the class in brackets, as in 'class=(\\w+)'")
    group = "label" if "label" in compiled.groupindex else 1
    paths = files_of(words)
    read = read_each(paths, lambda record: (record.name, record.description, tokens_of(record, hard_mask)))
    for path, records in zip(paths, read, strict=True):
        for name, description, tokens in records:
            header = f"{name} {description}".rstrip()
            match = compiled.search(header)
            if match is None or not match[group]:
                raise InputError(f"{path}, record {name!r}: no class in the header {header!r} by {pattern!r}")
            part = match["split"] if "split" in compiled.groupindex else None
            split = part_at(f"{path}, record {name!r}", part) if part else ""
            yield LabelledRow(name, tokens, match[group], split, str(path))


def label_table(words: Sequence[str], table: Path, *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """Records whose class stands in a table, by their name. Every record has a row there and every row a record."""
    found = list(_rows(((path, "", "") for path in files_of(words)), hard_mask))
    rows = match_labels([record.name for record in found], read_label_table(table), table)
    for record, row in zip(found, rows, strict=True):
        yield record._replace(label=row.label, split=row.split)


def sequence_table(table: Path, *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """The rows of a table of sequences and their labels."""
    for row in read_sequence_table(table):
        tokens = hard_masked(row.tokens, row.sequence) if hard_mask else row.tokens
        yield LabelledRow(row.id, tokens, row.label, row.split, str(table))


def genome_regions(
    genome: Sequence[str], regions: Sequence[Path], features: Sequence[str] = (), *, hard_mask: bool = False
) -> Iterator[LabelledRow]:
    """Stretches of a genome that BED or GFF files name and label."""
    found = [region for path in regions for region in read_regions(path, features)]
    yield from _cut(genome, found, hard_mask)


def benchmark_folder(genome: Sequence[str], path: Path, *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """A data set of Genomic Benchmarks: train and test folders with a file of intervals for each class."""
    yield from _cut(genome, read_benchmark_folder(path), hard_mask)


def _cut(genome: Sequence[str], regions: Sequence[Region], hard_mask: bool) -> Iterator[LabelledRow]:
    paths = [path for word in genome for path in find_files(word)]
    seen: Counter[str] = Counter()
    for region, tokens in cut(paths, regions, hard_mask=hard_mask):
        if not region.label:
            raise InputError(f"{region.where}: no label; BED has it in column 4")
        name = region_name(region)
        seen[name] += 1  # a stretch may stand twice, as shared exons do
        name += f"#{seen[name]}" if seen[name] > 1 else ""
        yield LabelledRow(name, tokens, region.label, region.split, str(region.path))


def unlabelled(words: Sequence[str], *, hard_mask: bool = False) -> Iterator[LabelledRow]:
    """The records of files that are only looked at, all of one class."""
    yield from _rows(((path, NO_CLASS, "") for word in words for path in find_files(word)), hard_mask)


def example_folder(name: str) -> Path:
    """A data set that comes with the package (genomics/examples)."""
    examples = Path(str(package_files("polymamba.genomics") / "examples"))
    names = sorted(entry.name for entry in examples.iterdir() if entry.is_dir())
    if name not in names:
        raise InputError(f"no example {name!r}; there is {', '.join(names)}")
    return examples / name


def read_source(source: Source, target: Target = "multiclass", *, hard_mask: bool = False) -> LabelledSequences:
    """What the flags of a command name, not yet divided: records are of the part that the files say, or of train.

    Raises InputError unless the flags say it in exactly one way.
    """
    ways = {
        "example": source.example,
        "data": source.data,
        "class": source.classes,
        "fasta": source.fasta,
        "table": source.table,
        "regions": source.regions,
    }
    given = [name for name, value in ways.items() if value]
    if len(given) != 1:
        wrong = f"{' and '.join(f'--{name}' for name in given)} together" if given else "none of them"
        raise InputError(f"say where the sequences are in one of these ways: --{', --'.join(ways)}; got {wrong}")
    _refuse_idle_flags(source, given[0])
    classes = None
    if source.example:
        rows = folder(example_folder(source.example), hard_mask=hard_mask)
    elif source.data and source.genome:
        rows = benchmark_folder(source.genome, source.data, hard_mask=hard_mask)
    elif source.data:
        rows = folder(source.data, hard_mask=hard_mask)
    elif source.classes:
        files = _by_class(source.classes)
        rows = class_files(files, hard_mask=hard_mask)
        classes = tuple(files) if target == "multiclass" else None
    elif source.table:
        rows = sequence_table(source.table, hard_mask=hard_mask)
    elif source.regions:
        rows = genome_regions(source.genome, source.regions, source.features, hard_mask=hard_mask)
    elif source.labels:
        rows = label_table(source.fasta, source.labels, hard_mask=hard_mask)
    elif source.label_pattern:
        rows = header_pattern(source.fasta, source.label_pattern, hard_mask=hard_mask)
    else:
        rows = unlabelled(source.fasta, hard_mask=hard_mask)
    return labelled(rows, target, classes)


def _refuse_idle_flags(source: Source, way: str) -> None:
    """A flag that the chosen way does not read would be ignored in silence: it is refused instead."""
    reads = {"fasta": ("labels", "label_pattern"), "regions": ("genome", "features"), "data": ("genome",)}.get(way, ())
    for name in ("labels", "label_pattern", "genome", "features"):
        if getattr(source, name) and name not in reads:
            raise InputError(f"--{name.replace('_', '-')} says nothing about --{way}; leave it out")
    if source.labels and source.label_pattern:
        raise InputError("--labels and --label-pattern both say the class; give one of them")
    if way == "regions" and not source.genome:
        raise InputError("--regions needs --genome, the FASTA file that they are stretches of")


def _by_class(words: Sequence[str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for word in words:
        label, separator, path = word.partition("=")
        if not (label and separator and path):
            raise InputError(f"--class {word}: expected NAME=FASTA, as in --class donor=donors.fa.gz")
        files.setdefault(label, []).append(path)
    return files


def tokens_of(record: Record, hard_mask: bool) -> np.ndarray:
    """The record's tokens; with hard_mask the lower-case letters are N."""
    return hard_masked(record.tokens, record.sequence) if hard_mask else record.tokens
