"""What is known of single bases: the regions of BED, GFF, GTF and bedGraph files, laid over a genome.

multiclass   A base is of one class: the label of the region that covers it, or NONE. Of several labels that which was
             named first counts; unless they were named, regions of unlike labels may not overlap.
multilabel   Of any number of labels: those of all regions that cover it.
regression   A number, the label of its region (bedGraph's value column); a base that no region covers has none.

stranded     A region's label is one of its strand, LABEL(+) or LABEL(-): a reverse complement has them exchanged.

K classes or labels, n bases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.errors import InputError
from .config import Target
from .parts import contig_numbers
from .reading.genome import Genome
from .reading.regions import Region, first_places, read_regions

NONE = "none"  # the class of a base that no region covers


class _Runs(NamedTuple):
    """Stretches of one contig: sorted, none of which touch or overlap if they are of one value."""

    starts: np.ndarray  # int64 (m,)
    ends: np.ndarray
    values: np.ndarray  # float64 (m,): of a regression


class Annotation:
    """Labels of a genome's bases.

    classes     K names in the order of a model's outputs; of a regression the one name of the value
    n_skipped   regions of chromosomes that the genome has not
    """

    def __init__(self, classes: tuple[str, ...], target: Target, runs: Sequence[dict[int, _Runs]], n_skipped: int = 0):
        """runs   for each label (multiclass: those after NONE) contig -> where it is"""
        self.classes, self.target, self.runs, self.n_skipped = classes, target, runs, n_skipped

    def of(self, contig: int, start: int, end: int) -> np.ndarray:
        """Of bases start .. end - 1: classes int64 (n,), labels bool (n, K) or values float64 (n,), nan without one."""
        n = end - start
        if self.target == "regression":
            found = np.full(n, np.nan)
            for places, values in self._covered(0, contig, start, end):
                found[places] = values
            return found
        if self.target == "multilabel":
            found = np.zeros((n, len(self.classes)), dtype=bool)
            for k in range(len(self.classes)):
                for places, _ in self._covered(k, contig, start, end):
                    found[places, k] = True
            return found
        found = np.zeros(n, dtype=np.int64)
        for k in reversed(range(len(self.runs))):  # the first one has the last word
            for places, _ in self._covered(k, contig, start, end):
                found[places] = k + 1
        return found

    def _covered(self, k: int, contig: int, start: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places from 0 of the window's bases that have label k, and their values; nothing if there are none."""
        if contig not in self.runs[k]:
            return
        starts, ends, values = self.runs[k][contig]
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, end)
        if first >= last:
            return
        starts, ends = np.maximum(starts[first:last], start) - start, np.minimum(ends[first:last], end) - start
        sizes = ends - starts
        before = np.cumsum(sizes) - sizes
        yield np.arange(sizes.sum()) + np.repeat(starts - before, sizes), np.repeat(values[first:last], sizes)


def read_annotation(
    paths: Sequence[Path], genome: Genome, target: Target, classes: Sequence[str] = (), *, stranded: bool = False
) -> Annotation:
    """The annotation that files give.

    classes   labels to take, others being passed over, the first of several on a base counting; all, by name, if empty

    A region without a label is of the class that its file is named after (exons.bed: exons). Raises InputError that
    names file and line: as read_regions does, for regions beyond a chromosome, for a label that is no number or two
    values of one base (regression), for a region without a strand (stranded), for unlike labels of one base that
    `classes` does not rank; and if the genome has none of the chromosomes.
    """
    regions = [region for path in paths for region in read_regions(path)]
    places = first_places(regions)
    numbers = contig_numbers(genome, places, skip_unknown=True)
    by_label: dict[str, dict[int, list[Region]]] = defaultdict(lambda: defaultdict(list))
    n_skipped = 0
    for region in regions:
        if region.chromosome not in numbers:
            n_skipped += 1
            continue
        contig = numbers[region.chromosome]
        region.require_within(genome.contigs[contig].length)
        label = "value" if target == "regression" else region.label or region.path.name.split(".")[0]
        if classes and target != "regression" and label not in classes:
            continue
        if stranded:
            if region.strand == ".":
                raise InputError(f"{region.where}: no strand, but the labels are to be of a strand (--stranded)")
            label = f"{label}({region.strand})"
        by_label[label][contig].append(region)
    if n_skipped == len(regions):
        there = ", ".join(sorted(places)[:5])
        raise InputError(f"{paths[0]}: no region is on a chromosome of the genome; they are on {there}")
    if target == "regression":
        runs = [{contig: _values(found) for contig, found in by_label["value"].items()}]
        return Annotation(("value",), target, runs, n_skipped)
    names = tuple(classes) or tuple(sorted({label.removesuffix("(+)").removesuffix("(-)") for label in by_label}))
    if stranded:
        names = tuple(f"{name}({strand})" for name in names for strand in "+-")
    if target == "multiclass":
        names = tuple(name for name in names if name != NONE)
        if not classes:
            _require_apart([found for name in names for found in by_label[name].items()])
    runs = [{contig: _joined(found) for contig, found in by_label[name].items()} for name in names]
    return Annotation((NONE, *names) if target == "multiclass" else names, target, runs, n_skipped)


def _joined(regions: Sequence[Region]) -> _Runs:
    """The bases that any of the regions covers."""
    spans = np.array(sorted((region.start, region.end) for region in regions), dtype=np.int64)
    starts, reach = spans[:, 0], np.maximum.accumulate(spans[:, 1])
    first = np.flatnonzero(np.concatenate(([True], starts[1:] > reach[:-1])))
    return _Runs(starts[first], np.maximum.reduceat(spans[:, 1], first), np.zeros(len(first)))


def _values(regions: Sequence[Region]) -> _Runs:
    ordered = sorted(regions, key=lambda region: region.start)
    for one, other in pairwise(ordered):
        if other.start < one.end:
            raise InputError(f"{other.where}: overlaps the region of line {one.line}; a base may have one value")
    values = []
    for region in ordered:
        try:
            values.append(float(region.label))
        except ValueError:
            values.append(np.nan)
        if not np.isfinite(values[-1]):
            raise InputError(f"{region.where}: label {region.label!r} is no finite number")
    spans = np.array([(region.start, region.end) for region in ordered], dtype=np.int64)
    return _Runs(spans[:, 0], spans[:, 1], np.array(values))


def _require_apart(by_contig: Sequence[tuple[int, list[Region]]]) -> None:
    """Raises InputError if regions of unlike labels overlap. by_contig: contig and the regions of one label there."""
    of_contig: dict[int, list[tuple[int, int, int, Region]]] = defaultdict(list)
    for label, (contig, regions) in enumerate(by_contig):
        of_contig[contig] += [(region.start, region.end, label, region) for region in regions]
    for found in of_contig.values():
        farthest: dict[int, tuple[int, Region]] = {}  # label -> the region of it that reaches farthest
        for start, end, label, region in sorted(found, key=lambda item: item[:3]):
            for other, (reach, there) in farthest.items():
                if other != label and reach > start:
                    both = f"overlaps {there.label or there.path.name!r} of line {there.line}"
                    rank = "say by --classes which counts, the first ones first, or learn both (--target multilabel)"
                    raise InputError(f"{region.where}: {both}; {rank}")
            if label not in farthest or farthest[label][0] < end:
                farthest[label] = end, region
