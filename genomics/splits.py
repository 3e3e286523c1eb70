"""Dividing labelled sequences into train, valid and test parts that share no sequence.

Copies of a sequence, and its reverse complement, which is the same molecule read from the other strand, form a group;
so may similar sequences, or those of a chromosome. A group is never torn apart. Which part it goes to follows from its
bases and the seed alone, by a hash: not from the order of the files, the machine or a library's random numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..core.errors import InputError
from .alphabet import reverse_complement


def sequence_keys(tokens: Sequence[np.ndarray]) -> list[bytes]:
    """16 bytes a sequence, equal for sequences that are identical or reverse complements of each other."""
    strands = ((ids.tobytes(), reverse_complement(ids).tobytes()) for ids in tokens)
    return [hashlib.blake2b(min(pair), digest_size=16).digest() for pair in strands]


def straddling(keys: Sequence[bytes], split: np.ndarray, one: str, other: str) -> int:
    """How many distinct sequences stand in both of two parts."""
    members = {part: {key for key, name in zip(keys, split, strict=True) if name == part} for part in (one, other)}
    return len(members[one] & members[other])


def group_numbers(values: Iterable[Hashable]) -> np.ndarray:
    """Equal values -> equal numbers, int64 (n,), counted from 0 in the order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def join_groups(groups: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The groups (n,) after those of record one[i] and of record other[i] are made one, for each i; each below n."""
    n = len(groups)
    links = coo_array((np.ones(len(one), dtype=bool), (groups[one], groups[other])), shape=(n, n))
    return connected_components(links, directed=False)[1].astype(np.int64)[groups]


def joined_keys(keys: Sequence[bytes], *groupings: Sequence[Hashable]) -> list[bytes]:
    """Keys for `stratified_split` that tear no group of any grouping: records that share a group anywhere share a key.

    keys       (n) from `sequence_keys`, a grouping too
    groupings  (n) each: clusters of similar sequences, chromosomes, genes, patients...

    The key of a joined group is the smallest of its records' keys: it does not depend on the order of the records or
    on the groups' names.
    """
    groups = np.arange(len(keys))
    for grouping in (keys, *groupings):
        numbers = group_numbers(grouping)
        first = np.unique(numbers, return_index=True)[1]
        groups = join_groups(groups, np.arange(len(keys)), first[numbers])
    smallest: dict[int, bytes] = {}
    for group, key in zip(groups.tolist(), keys, strict=True):
        smallest[group] = min(key, smallest.get(group, key))
    return [smallest[group] for group in groups.tolist()]


def stratified_split(
    keys: Sequence[bytes],
    classes: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    *,
    unit: str = "distinct sequences",
) -> np.ndarray:
    """The part of each record (n,): "train", or a part of `fractions`, with that share of each class's records.

    keys       (n) from `sequence_keys` or `joined_keys`; records with equal keys, a group, go to the same part
    classes    (n) class name of each record
    fractions  part -> its share; at 0 a part stays empty, else each class gets at least one group in it
    unit       what a group is called in the error

    Large groups may make the exact shares impossible; then they are met as closely as dealing the groups out one by
    one, largest first, can. Raises InputError if a class has too few groups for the parts to fill.
    """
    groups: dict[bytes, Counter[str]] = defaultdict(Counter)
    for key, name in zip(keys, classes, strict=True):
        groups[key][name] += 1
    part_of = _deal(groups, fractions, seed)
    split = np.array([part_of[key] for key in keys], dtype="<U5")
    parts = ["train", *(part for part, share in fractions.items() if share > 0)]
    filled = set(zip(classes, split.tolist(), strict=True))
    for name in sorted(set(classes)):
        if any((name, part) not in filled for part in parts):
            own = sum(counts.keys() == {name} for counts in groups.values())
            raise InputError(
                f"class {name!r}: {own} {unit} of its own are too few to be split; "
                f"at least {len(parts)} are needed (for {', '.join(parts)})"
            )
    return split


def split_by_chromosome(chromosomes: Sequence[str], held_out: Mapping[str, Sequence[str]]) -> np.ndarray:
    """The part of each record (n,): the part that holds out its chromosome, else "train".

    chromosomes  (n) chromosome of each record
    held_out     part -> names of its chromosomes: {"valid": ["chr21"], "test": ["chr22"]}

    Raises InputError if a chromosome has no record or is in two parts, or if a part, train included, would be empty.
    """
    present = set(chromosomes)
    part_of: dict[str, str] = {}
    for part, names in held_out.items():
        if not names:
            raise InputError(f"{part}: no chromosome is named; {_listed(present)}")
        for name in names:
            if name not in present:
                raise InputError(f"{part}: chromosome {name!r} has no record; {_listed(present)}")
            if part_of.setdefault(name, part) != part:
                raise InputError(f"chromosome {name!r}: named for both {part_of[name]} and {part}; keep one")
    if present <= part_of.keys():
        raise InputError(f"train: no chromosome is left; {_listed(present)}")
    return np.array([part_of.get(name, "train") for name in chromosomes], dtype="<U5")


def deal_chromosomes(chromosomes: Sequence[str], fractions: Mapping[str, float], seed: int) -> np.ndarray:
    """The part of each record (n,): whole chromosomes, with about the share of records that each part is to have.

    They are dealt out largest first, each to the part that lacks most records; `seed` decides among those of one size.
    Raises InputError if there are fewer chromosomes than parts.
    """
    sizes = Counter(chromosomes)
    parts = ["train", *(part for part, share in fractions.items() if share > 0)]
    if len(sizes) < len(parts):
        raise InputError(f"too few chromosomes for {', '.join(parts)}; {_listed(sizes)}")
    part_of = _deal({name.encode(): Counter({"": n}) for name, n in sizes.items()}, fractions, seed)
    return np.array([part_of[name.encode()] for name in chromosomes], dtype="<U5")


def _listed(chromosomes: Iterable[str]) -> str:
    names = sorted(chromosomes)
    return f"there are {len(names)}: {', '.join(names[:30])}{', ...' if len(names) > 30 else ''}"


def _deal(groups: Mapping[bytes, Counter[str]], fractions: Mapping[str, float], seed: int) -> dict[bytes, str]:
    """The part of each group, given how many records of each class it has.

    A group goes to the part where it brings the classes' shares closest to those wanted: where the squares of what the
    parts lack, in units of the class's size, sum up to the least. Each part gets a group of each class, while there are
    groups enough; a group of several classes is held back for the rarest of them.
    """
    total = sum(groups.values(), Counter())
    lacking = {
        p: {c: max(1, round(share * n)) for c, n in total.items()} for p, share in fractions.items() if share > 0
    }
    lacking = {"train": {c: n - sum(of[c] for of in lacking.values()) for c, n in total.items()}, **lacking}
    rarest = {key: min(counts, key=lambda c: (total[c], c)) for key, counts in groups.items()}
    left = Counter(rarest.values())
    empty = {c: set(lacking) for c in total}
    part_of = {}
    # Large groups first, while there is room for them; among equals the order is the hash's.
    for key in sorted(groups, key=lambda key: (-groups[key].total(), _shuffle_hash(key, seed))):
        counts, own = sorted(groups[key].items()), rarest[key]
        open_parts = [
            p for p in lacking if p in empty[own] or left[own] > len(empty[own])
        ]  # the last fill what is empty
        part = max(open_parts, key=lambda p: sum(n * lacking[p][c] / total[c] for c, n in counts))
        for c, n in counts:
            lacking[part][c] -= n
            empty[c].discard(part)
        left[own] -= 1
        part_of[key] = part
    return part_of


def _shuffle_hash(key: bytes, seed: int) -> bytes:
    return hashlib.blake2b(key, key=str(seed).encode(), digest_size=16).digest()
