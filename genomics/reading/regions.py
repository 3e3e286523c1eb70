"""Regions of a genome, from BED, bedGraph, GFF3 and GTF files or folders of the Genomic Benchmarks, and their bases.

All are held as BED counts: from 0, the end left out (half-open). GFF and GTF count from 1, the end taken in. The blocks
of a BED12 line are not cut out, and the exons of a transcript not joined: a region goes from its start to its end.

Columns of a BED file are told by its header line, with or without `#`, in any order and either case:

    chromosome  chrom, chr, chromosome, region
    start, end  start or chromStart, end or chromEnd
    label       label, class or target; name if there is none of them
    strand      strand
    split       split, set, partition

Without a header they are those of BED: chromosome, start, end, label (its name), score, strand; a file has three or
more of them, the same number in every line. bedGraph is read as a BED file whose fourth column is the value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from ...core.errors import InputError
from ...core.inputs import PARTS
from ..alphabet import reverse_complement
from .chromosomes import read_chromosomes
from .tables import find_columns, part_at, read_table
from .text import read_lines

STRANDS = ("+", "-", ".")

_COLUMNS = {
    "chromosome": ("chrom", "chr", "chromosome", "region"),
    "start": ("start", "chromstart"),
    "end": ("end", "chromend"),
    "label": ("label", "class", "target"),
    "strand": ("strand",),
    "split": ("split", "set", "partition"),
}
_REQUIRED = ("chromosome", "start", "end")
_FORMAT = re.compile(r".+\.(bed|bedgraph|bdg|gff3?|gtf)(\.gz|\.bgz)?", re.IGNORECASE)
_COMMENT = re.compile(r"\s*(#|(track|browser)( |$)|$)")
_INTEGER = re.compile(r"[0-9]{1,18}")
_GFF_COLUMNS = 9
# GFF3 writes `key=value;...` with %-escapes, GTF `key "value"; key number;`.
_GFF3_ATTRIBUTE = re.compile(r"\s*([^\s=;]+)=([^;]*)")
_GTF_ATTRIBUTE = re.compile(r'([^\s;"]+)\s+(?:"([^"]*)"|([^\s";]+))')
_CLASS_FILE = re.compile(r"(.+)\.csv(\.gz)?", re.IGNORECASE)
_DOCUMENT = re.compile(r"\..*|(README|LICEN[CS]E).*|.*\.(txt|md|ya?ml|json)", re.IGNORECASE)


class Region(NamedTuple):
    """A stretch of a chromosome, from 0, half-open: bases start .. end - 1."""

    chromosome: str  # as the file names it
    start: int
    end: int  # > start
    strand: str  # one of STRANDS; "." is unknown, and read as "+"
    label: str  # as the file has it, a "." too; "" if the file has none
    split: str  # one of PARTS; "" if the file has none
    path: Path  # the file that the region came from
    line: int  # in that file, from 1

    @property
    def where(self) -> str:
        """As messages name it."""
        return f"{self.path}, line {self.line}"

    def require_within(self, n_bases: int) -> None:
        """Raise InputError if its chromosome, of so many bases, ends before it."""
        if self.end > n_bases:
            beyond = f"ends at {self.end}, but chromosome {self.chromosome!r} has {n_bases} bases"
            raise InputError(f"{self.where}: {beyond}; is it the same assembly?")


def first_places(regions: Iterable[Region]) -> dict[str, str]:
    """Of each chromosome, where it is named first."""
    places: dict[str, str] = {}
    for region in regions:
        places.setdefault(region.chromosome, region.where)
    return places


def region_name(region: Region) -> str:
    """As in `chr1:100-200(+)`, from 0, half-open: the FASTA header that `bedtools getfasta -s` gives the region."""
    return f"{region.chromosome}:{region.start}-{region.end}({region.strand})"


def read_regions(path: str | Path, features: Collection[str] = ()) -> list[Region]:
    """The regions of a file, in its order; the name's ending tells which: .bed, .bedgraph, .bdg, .gff, .gff3 or .gtf.

    features    types to take from a GFF or GTF file (its third column), such as CDS; each must be there; all if empty

    The label of a GFF or GTF feature is its attribute `label`, or else its type; its split the attribute `split`.
    Raises InputError that names file and line: another file name, a missing column, coordinates that are no integers or
    in the wrong order, an unknown strand or split, a split that only some features have, a file without regions.
    """
    path = Path(path)
    match = _FORMAT.fullmatch(path.name)
    if match is None:
        raise InputError(
            f"{path}: regions are read from .bed, .bedgraph, .gff, .gff3 or .gtf files, also with .gz; rename the file"
        )
    if match[1].lower().startswith("b"):
        if features:
            raise InputError(f"{path}: a BED file has no feature types to choose from ({', '.join(features)})")
        regions = list(_read_bed(path))
    else:
        regions = list(_read_gff(path, features))
    if not regions:
        raise InputError(f"{path}: holds no region")
    return regions


def read_benchmark_folder(path: str | Path) -> list[Region]:
    """The regions of a Genomic Benchmarks data set: a file `<class>.csv.gz` (or .csv) a class, below train and test.

    Its columns are region (the chromosome), start, end (from 0, half-open) and strand; the ids are passed over. The
    order is that of split and class. Raises InputError for another layout, and as read_regions does.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
    folders: dict[str, Path] = {}
    for entry in _data_entries(path):
        split = part_at(str(entry), entry.name)
        if split in folders:
            raise InputError(f"{path}: folders {folders[split].name} and {entry.name} both name the {split} part")
        folders[split] = entry
    if not folders:
        raise InputError(f"{path}: holds no folder train or test")
    files = {split: _class_files(folders[split]) for split in PARTS if split in folders}
    return [
        region
        for split, classes in files.items()
        for label, file in classes.items()
        for region in _read_benchmark_file(file, label, split)
    ]


def cut(
    genome: Sequence[str | Path], regions: Sequence[Region], *, hard_mask: bool = False
) -> Iterator[tuple[Region, np.ndarray]]:
    """Each region with its tokens, uint8 (end - start,), in the order of `regions`; strand "-" is reverse-complemented.

    The regions' chromosomes become those of the genome, so that one chromosome has one name.

    genome       the files that hold the chromosomes; their names may differ from those of the regions (match_names)
    hard_mask    lower-case letters are read as N

    Raises InputError as read_chromosomes does, and for a region that ends beyond its chromosome.
    """
    chromosomes = read_chromosomes(genome, first_places(regions), hard_mask=hard_mask)
    for region in regions:
        name, tokens = chromosomes[region.chromosome]
        region.require_within(len(tokens))
        piece = tokens[region.start : region.end]
        # A copy either way: a view would keep the chromosome in memory for as long as the piece is.
        piece = reverse_complement(piece) if region.strand == "-" else piece.copy()
        yield region._replace(chromosome=name), piece


def _read_bed(path: Path) -> Iterator[Region]:
    columns: dict[str, int] = {}
    n_columns = 0  # once it is known, by the header or the first region
    for line, text in enumerate(read_lines(path), 1):
        where = f"{path}, line {line}"
        if not n_columns and _is_header(header := _fields(text.lstrip("#"))):
            columns, n_columns = _columns_by_name(header, where), len(header)
        elif not _COMMENT.match(text):
            fields = _fields(text)
            if not n_columns:
                columns, n_columns = _columns_by_place(len(fields), where), len(fields)
            if len(fields) != n_columns:
                wrong = f"{len(fields)} columns, but {n_columns} in the lines before"
                raise InputError(f"{where}: {wrong}; separate columns by tabs if one holds a blank")
            yield _region(path, line, {key: fields[column] for key, column in columns.items()})


def _fields(text: str) -> list[str]:
    """Columns end at tabs if there is one in the line, or else at blanks."""
    return [field.strip() for field in text.split("\t")] if "\t" in text else text.split()


def _is_header(fields: Sequence[str]) -> bool:
    names = {name.lower() for name in fields}
    return all(names.intersection(_COLUMNS[key]) for key in _REQUIRED)


def _columns_by_name(header: Sequence[str], where: str) -> dict[str, int]:
    found = find_columns(header, _COLUMNS, _REQUIRED, where)
    return found if "label" in found else found | find_columns(header, {"label": ("name",)}, (), where)


def _columns_by_place(n: int, where: str) -> dict[str, int]:
    if n < len(_REQUIRED):
        raise InputError(f"{where}: {n} columns; a BED file has at least 3, chromosome, start and end")
    places = {"chromosome": 0, "start": 1, "end": 2, "label": 3, "strand": 5}
    return {key: column for key, column in places.items() if column < n}


def _read_gff(path: Path, features: Collection[str]) -> Iterator[Region]:
    types = set()
    with_split = without_split = None  # the first region of either kind
    for line, text in enumerate(read_lines(path), 1):
        if text.startswith("##FASTA"):
            break
        if not text.strip() or text.startswith("#"):
            continue
        fields = [field.strip() for field in text.split("\t")]
        if len(fields) != _GFF_COLUMNS:
            wrong = f"{len(fields)} columns; a GFF or GTF line has {_GFF_COLUMNS}, separated by tabs"
            raise InputError(f"{path}, line {line}: {wrong}")
        feature = unquote(fields[2])
        types.add(feature)
        if features and feature not in features:
            continue
        region = _gff_region(path, line, fields, feature)
        with_split, without_split = (with_split or region, without_split) if region.split else (with_split, region)
        if with_split and without_split:
            other = f"the feature of line {with_split.line} has one"
            raise InputError(f"{path}, line {without_split.line}: no attribute split, but {other}; give all a split")
        yield region
    if types and (missing := sorted(set(features) - types)):
        raise InputError(f"{path}: no feature of type {', '.join(missing)}; there is {', '.join(sorted(types))}")


def _gff_region(path: Path, line: int, fields: Sequence[str], feature: str) -> Region:
    chromosome, _, _, start, end, _, strand, _, attributes = fields
    if _INTEGER.fullmatch(start):  # anything else is left for _region to refuse
        if int(start) == 0:
            raise InputError(f"{path}, line {line}: start 0, but GFF and GTF count from 1")
        start = str(int(start) - 1)
    cells = {"chromosome": unquote(chromosome), "start": start, "end": end, "strand": strand, "label": feature}
    return _region(path, line, cells | _attributes(attributes))


def _attributes(text: str) -> dict[str, str]:
    """Attributes `label` and `split`, as far as they are there."""
    if _GFF3_ATTRIBUTE.match(text):
        pairs = [(key, unquote(value.strip())) for key, value in _GFF3_ATTRIBUTE.findall(text)]
    else:
        pairs = [(key, quoted or bare) for key, quoted, bare in _GTF_ATTRIBUTE.findall(text)]
    return {key.lower(): value for key, value in pairs if key.lower() in ("label", "split")}


def _region(path: Path, line: int, cells: Mapping[str, str]) -> Region:
    """A region from its cells: chromosome, start, end (from 0, half-open), and if they are there strand, label, split.

    Raises InputError.
    """
    where = f"{path}, line {line}"
    if not cells["chromosome"]:
        raise InputError(f"{where}: no chromosome")
    for key in ("start", "end"):
        if not _INTEGER.fullmatch(cells[key]):
            raise InputError(f"{where}: {key} {cells[key]!r} is no whole number, 0 or more")
    start, end = int(cells["start"]), int(cells["end"])
    if start >= end:
        raise InputError(f"{where}: the region is empty or backwards, {start}-{end} (counted from 0, the end left out)")
    strand = cells.get("strand", ".").replace("?", ".")  # GFF3's "?": it has one, but which is unknown
    if strand not in STRANDS:
        raise InputError(f"{where}: strand {strand!r} is none of {' '.join(STRANDS)}")
    split = part_at(where, cells["split"]) if "split" in cells else ""
    return Region(cells["chromosome"], start, end, strand, cells.get("label", ""), split, path, line)


def _class_files(folder: Path) -> dict[str, Path]:
    """Class name -> its file."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder of files a class")
    files: dict[str, Path] = {}
    for entry in _data_entries(folder):
        match = _CLASS_FILE.fullmatch(entry.name)
        if match is None or entry.is_dir():
            raise InputError(f"{entry}: not named <class>.csv.gz or <class>.csv; rename it or move it away")
        if match[1] in files:
            raise InputError(f"{entry}: a second file for class {match[1]!r} in {folder}")
        files[match[1]] = entry
    if not files:
        raise InputError(f"{folder}: holds no file <class>.csv.gz or <class>.csv")
    return files


def _read_benchmark_file(path: Path, label: str, split: str) -> Iterator[Region]:
    columns = {key: _COLUMNS[key] for key in (*_REQUIRED, "strand")}
    for line, cells in read_table(path, columns, required=columns):
        yield _region(path, line, cells | {"label": label, "split": split})


def _data_entries(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted by name, without hidden files and documents."""
    return sorted(entry for entry in folder.iterdir() if not _DOCUMENT.fullmatch(entry.name))
