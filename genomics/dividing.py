"""Dividing a labelled data set into train, valid and test, from the flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.errors import InputError
from .commands import Dividing
from .dataset import LabelledSequences, read_splits
from .similarity import similar_groups
from .splits import deal_chromosomes, joined_keys, sequence_keys, split_by_chromosome, stratified_split

# As in `chr1:100-200(+)`, `site7::chr1:100-200` (bedtools getfasta -name) or `NC_003070.9:c500-40` (NCBI).
_COORDINATES = re.compile(r"(?:.*(?:::|\|))?(.+?):c?\d.*")


def divide(data: LabelledSequences, how: Dividing, seed: int) -> LabelledSequences:
    """The records with a part each: the parts that they have stay, missing ones are set aside from train.

    Raises InputError if train is missing, if another part has a class that train lacks, if the shares or chromosomes
    named cannot be, or if a class has too few records to be in each part.
    """
    if data.target == "multiclass" and len(data.classes) < 2:
        names = ", ".join(data.classes)
        raise InputError(f"{len(data.classes)} class ({names}) is too few to classify; give two or more")
    if how.splits is not None:
        if replace(how, splits=None) != Dividing():
            raise InputError(
                f"--splits {how.splits} says all of who is in which part; leave the other flags for it out"
            )
        return _as_in_splits(data, how.splits)
    parts = set(data.split.tolist())
    if "train" not in parts:
        raise InputError(f"the data have a {' and a '.join(sorted(parts))} part but no train part")
    _require_known_classes(data)
    shares = {"valid": how.valid_fraction, "test": how.test_fraction}
    if not (all(share >= 0 for share in shares.values()) and sum(shares.values()) < 1):
        words = " and ".join(f"{part} {share:g}" for part, share in shares.items())
        raise InputError(f"the shares {words} must not be negative, and add up to less than 1")
    missing = {part: share for part, share in shares.items() if part not in parts}
    train = np.flatnonzero(data.split == "train")
    split = data.split.copy()
    split[train] = _parts(data.take(train), how, missing, seed)
    return replace(data, split=split)


def chromosome_of(name: str) -> str:
    """What stands before a record's coordinates, as in `chr1:100-200(+)` or `site7::chr1:100-200`; else the name."""
    match = _COORDINATES.fullmatch(name)
    return name if match is None else match[1]


def _parts(data: LabelledSequences, how: Dividing, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """The part of each record (n,)."""
    named = {"valid": how.valid_chromosomes, "test": how.test_chromosomes}
    if how.split_by == "chromosome":
        chromosomes = [chromosome_of(name) for name in data.names]
        if not any(named.values()):
            return deal_chromosomes(chromosomes, shares, seed)
        for part in named:
            if named[part] and part not in shares:
                raise InputError(f"--{part}-chromosomes: the data have a {part} part already")
            if not named[part] and shares.get(part, 0) > 0:
                wish = f"name its chromosomes too, or set --{part}-fraction 0 for none"
                raise InputError(f"--{part}-chromosomes: missing beside those of the other part; {wish}")
        return split_by_chromosome(chromosomes, {part: names for part, names in named.items() if names})
    if any(named.values()):
        raise InputError("--valid-chromosomes and --test-chromosomes need --split-by chromosome")
    keys, unit = sequence_keys(data.tokens), "distinct sequences"
    if how.split_by == "cluster":
        unit = "groups of similar sequences"
        keys = joined_keys(keys, similar_groups(data.tokens, threshold=how.similarity).tolist())
    # Shares of each class; records with several labels, or with a number, are dealt out without regard to them.
    classes = data.label_texts() if data.target == "multiclass" else ["all"] * len(data.names)
    return stratified_split(keys, classes, shares, seed, unit=unit)


def _as_in_splits(data: LabelledSequences, path: Path) -> LabelledSequences:
    """The parts of a splits.tsv, record by record."""
    rows = {(row.name, row.source): row.split for row in read_splits(path)}
    by_name: dict[str, set[str]] = {}
    for (name, _), split in rows.items():
        by_name.setdefault(name, set()).add(split)
    parts = []
    for name, source in zip(data.names, data.sources, strict=True):
        # The files may have moved since: a name that is in one part only needs no file.
        found = {rows[name, source]} if (name, source) in rows else by_name.get(name, set())
        if len(found) != 1:
            problem = "not in this file" if not found else f"in {' and '.join(sorted(found))}, in other files"
            raise InputError(f"{path}: record {name!r} of {source} is {problem}")
        parts += found
    if len(rows) != len(parts):
        raise InputError(f"{path}: has {len(rows)} records, but {len(parts)} were read; are some files missing?")
    return replace(data, split=np.array(parts, dtype="<U5"))


def _require_known_classes(data: LabelledSequences) -> None:
    """Raises InputError if a class has no record in train."""
    for name, members in data.members().items():
        if members.any() and not members[data.split == "train"].any():
            source = data.sources[int(np.flatnonzero(members)[0])]
            known = [other for other, them in data.members().items() if them[data.split == "train"].any()]
            raise InputError(f"{source}: class {name!r} is not in train, which has {', '.join(known)}")
