"""Dividing labelled sequences into train, valid and test parts that share no sequence.

Copies of a sequence, and its reverse complement, which is the same molecule read from the other strand, form a group;
a group is never torn apart. Which part it goes to follows from its bases and the seed alone, by a hash: not from the
order of the files, the machine or a library's random numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from ..core.errors import InputError
from .alphabet import reverse_complement

SPLITS = ("train", "valid", "test")


def sequence_keys(tokens: Sequence[np.ndarray]) -> list[bytes]:
    """16 bytes a sequence, equal for sequences that are identical or reverse complements of each other."""
    strands = ((ids.tobytes(), reverse_complement(ids).tobytes()) for ids in tokens)
    return [hashlib.blake2b(min(pair), digest_size=16).digest() for pair in strands]


def straddling(keys: Sequence[bytes], split: np.ndarray, one: str, other: str) -> int:
    """How many distinct sequences stand in both of two parts."""
    members = {part: {key for key, name in zip(keys, split, strict=True) if name == part} for part in (one, other)}
    return len(members[one] & members[other])


def stratified_split(
    keys: Sequence[bytes], classes: Sequence[str], fractions: Mapping[str, float], seed: int
) -> np.ndarray:
    """The part of each record (n,): "train", or a part of `fractions`, with that share of each class's records.

    keys       (n) from `sequence_keys`; records with equal keys go to the same part
    classes    (n) class name of each record
    fractions  part -> its share; at 0 a part stays empty, else each class gets at least one sequence in it

    Raises InputError if a class has fewer groups of its own than there are parts to fill.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for record, key in enumerate(keys):
        groups[key].append(record)
    strata = _strata(groups, classes)
    split = np.full(len(keys), "train", dtype="<U5")
    wanted = {part: share for part, share in fractions.items() if share > 0}
    for name in sorted(set(classes)):
        # Large groups first, while there is room for them; among equals the order is the hash's.
        ordered = sorted(strata[name], key=lambda key: (-len(groups[key]), _shuffle_hash(key, seed)))
        if len(ordered) <= len(wanted):
            parts = ", ".join(("train", *wanted))
            raise InputError(
                f"class {name!r}: {len(ordered)} distinct sequences of its own are too few to be split; "
                f"at least {len(wanted) + 1} are needed (for {parts})"
            )
        for key, part in zip(ordered, _fill([len(groups[key]) for key in ordered], wanted), strict=True):
            split[groups[key]] = part
    return split


def _strata(groups: Mapping[bytes, list[int]], classes: Sequence[str]) -> dict[str, list[bytes]]:
    """Class name -> its groups. A group with records of several classes counts for the rarest of them."""
    size = Counter(classes)
    strata: dict[str, list[bytes]] = defaultdict(list)
    for key, records in groups.items():
        strata[min({classes[r] for r in records}, key=lambda name: (size[name], name))].append(key)
    return strata


def _fill(sizes: Sequence[int], fractions: Mapping[str, float]) -> list[str]:
    """The part of each group of one class, given the groups' sizes: always the part that lacks most records."""
    total = sum(sizes)
    lacking = {part: max(1, round(share * total)) for part, share in fractions.items()}
    lacking = {"train": total - sum(lacking.values()), **lacking}
    empty = set(lacking)
    parts = []
    for left in range(len(sizes), 0, -1):
        candidates = [p for p in lacking if p in empty or left > len(empty)]  # the last ones must fill what is empty
        part = max(candidates, key=lambda p: lacking[p])
        lacking[part] -= sizes[len(parts)]
        empty.discard(part)
        parts.append(part)
    return parts


def _shuffle_hash(key: bytes, seed: int) -> bytes:
    return hashlib.blake2b(key, key=str(seed).encode(), digest_size=16).digest()
