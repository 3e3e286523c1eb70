"""Dividing a genome into train, valid and test: stretches of its chromosomes, none of which two parts share.

Who says which part a base is of, the first of these that does:
    a BED file with a column split       (columns by name, see reading/regions.py); what no region covers is left out
    the path of a file                   train/a.fa, valid.fa
    chromosomes named on the command line
Parts that are still missing are taken from train: whole chromosomes, or blocks of them. Which ones follows from the
seed and the names and places alone, by a hash; chromosomes of one name in several files (species, aligned) go together.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.errors import InputError
from ..core.files import save_tsv
from ..core.inputs import PARTS, named_part
from .language_commands import GenomeDividing
from .reading.chromosomes import match_names
from .reading.genome import Genome
from .reading.regions import first_places, read_regions


class Stretch(NamedTuple):
    """Bases start .. end - 1, from 0, of a contig of a genome."""

    contig: int
    start: int
    end: int
    part: str  # one of PARTS

    @property
    def n_bases(self) -> int:
        return self.end - self.start


def divide_genome(genome: Genome, how: GenomeDividing, seed: int) -> list[Stretch]:
    """The parts of a genome, sorted by contig and place.

    Raises InputError for regions that are none of the genome's or that two parts share, for chromosomes that it has
    not, and if too little is left to take the missing parts from.
    """
    stretches = parts_given(genome, how.regions)
    stretches = _with_named_chromosomes(genome, stretches, how)
    found = {stretch.part for stretch in stretches}
    if "train" not in found:
        raise InputError(f"the genome has a {' and a '.join(sorted(found))} part, but no train part")
    shares = {"valid": how.valid_fraction, "test": how.test_fraction}
    missing = {part: share for part, share in shares.items() if part not in found and share > 0}
    if missing:
        stretches = _taken_from_train(genome, stretches, missing, how, seed)
    return _joined(stretches)


def parts_given(genome: Genome, regions: Sequence[Path]) -> list[Stretch]:
    """The parts that BED files, or else the files' paths, say; train where they say nothing. Regions may overlap."""
    if regions:
        return _of_regions(genome, regions)
    return [Stretch(i, 0, contig.length, named_part(contig.path) or "train") for i, contig in enumerate(genome.contigs)]


def write_splits_bed(path: Path, genome: Genome, stretches: Sequence[Stretch]) -> None:
    """Who is in which part, as a BED file that `--regions` reads: #chrom, start, end, split, file."""
    rows = ((genome.contigs[s.contig].name, s.start, s.end, s.part, genome.contigs[s.contig].path) for s in stretches)
    save_tsv(path, ["#chrom", "start", "end", "split", "file"], rows, errors="surrogateescape")


def describe_parts(stretches: Sequence[Stretch]) -> str:
    """Stretches and bases of each part, as a table."""
    lines = []
    for part in PARTS:
        sizes = [s.n_bases for s in stretches if s.part == part]
        lines.append(f"{part:<6}{len(sizes):>9,} stretches {sum(sizes):>16,} bases")
    return "\n".join(lines)


def _of_regions(genome: Genome, paths: Sequence[Path]) -> list[Stretch]:
    regions = [region for path in paths for region in read_regions(path)]
    numbers = contig_numbers(genome, first_places(regions))
    last: dict[int, tuple[Stretch, str]] = {}  # contig -> of the regions so far, the one that reaches farthest
    stretches = []
    for region in sorted(regions, key=lambda r: (numbers[r.chromosome], r.start, r.end)):
        contig = numbers[region.chromosome]
        region.require_within(genome.contigs[contig].length)
        stretch = Stretch(contig, region.start, region.end, region.split or "train")
        if contig in last and last[contig][0].end > stretch.start and last[contig][0].part != stretch.part:
            other, there = last[contig]
            both = f"the {stretch.part} region overlaps the {other.part} region of {there}"
            raise InputError(f"{region.where}: {both}; a base may be of one part only")
        if contig not in last or last[contig][0].end <= stretch.end:
            last[contig] = stretch, region.where
        stretches.append(stretch)
    return stretches


def contig_numbers(genome: Genome, wanted: Mapping[str, str], *, skip_unknown: bool = False) -> dict[str, int]:
    """Wanted chromosome -> its number; as for match_names. Raises InputError where two files hold it, too."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for i, contig in enumerate(genome.contigs):
        numbers[contig.name].append(i)
    matches = match_names(wanted, numbers, skip_unknown=skip_unknown)
    for name, match in matches.items():
        if len(numbers[match]) > 1:
            files = " and ".join(str(genome.contigs[i].path) for i in numbers[match][:2])
            raise InputError(f"{wanted[name]}: chromosome {name!r} stands in {files}; give one file, or rename one")
    return {name: numbers[match][0] for name, match in matches.items()}


def _with_named_chromosomes(genome: Genome, stretches: list[Stretch], how: GenomeDividing) -> list[Stretch]:
    part_of: dict[str, str] = {}
    names = {contig.name for contig in genome.contigs}
    for part, wanted in (("valid", how.valid_chromosomes), ("test", how.test_chromosomes)):
        matches = match_names(dict.fromkeys(wanted, f"--{part}-chromosomes"), names)
        for name, match in matches.items():
            if part_of.setdefault(match, part) != part:
                raise InputError(f"--{part}-chromosomes {name}: named for the {part_of[match]} part, too")
    return [s._replace(part=part_of.get(genome.contigs[s.contig].name, s.part)) for s in stretches]


def _taken_from_train(
    genome: Genome, stretches: Sequence[Stretch], shares: Mapping[str, float], how: GenomeDividing, seed: int
) -> list[Stretch]:
    """Let some of the train part, about these shares of its bases, change to other parts: at least one unit each."""
    block = how.block if how.split_by == "block" else max(contig.length for contig in genome.contigs)
    kept, units = [], defaultdict(list)  # (chromosome, number of the block) -> its stretches
    for stretch in stretches:
        if stretch.part != "train":
            kept.append(stretch)
            continue
        for k in range(stretch.start // block, (stretch.end - 1) // block + 1):
            start, end = max(stretch.start, k * block), min(stretch.end, (k + 1) * block)
            units[genome.contigs[stretch.contig].name, k].append(stretch._replace(start=start, end=end))
    if len(units) <= len(shares):
        what = f"{len(units)} chromosome{'s'[: len(units) > 1]}" if how.split_by == "chromosome" else "so few blocks"
        how_else = "use --split-by block" if how.split_by == "chromosome" else f"give a --block smaller than {block}"
        raise InputError(f"{what} cannot be divided into train and {' and '.join(shares)}; {how_else}")
    order = sorted(units, key=lambda unit: hashlib.sha256(f"{seed} {unit}".encode()).digest())
    total = sum(s.n_bases for pieces in units.values() for s in pieces)
    for i, (part, share) in enumerate(shares.items()):
        n_left = len(shares) - i  # the parts to come and train want one each
        size = 0
        while len(order) > n_left and (not size or size < share * total):
            pieces = units[order.pop(0)]
            size += sum(s.n_bases for s in pieces)
            kept += [s._replace(part=part) for s in pieces]
    return [*kept, *(s for unit in order for s in units[unit])]


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Sorted, those of a part that touch or overlap made one."""
    joined: list[Stretch] = []
    for stretch in sorted(stretches):
        if joined and joined[-1][::3] == stretch[::3] and joined[-1].end >= stretch.start:
            joined[-1] = joined[-1]._replace(end=max(joined[-1].end, stretch.end))
        else:
            joined.append(stretch)
    return joined
