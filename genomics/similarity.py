"""Which sequences resemble each other, by the k-mers that they share, and what leaks from one part into another.

Two sequences are linked when they share at least the share `threshold` of the k-mers of the one that has fewer; groups
are the connected components, so two members of a group need not resemble each other directly. A k-mer is a window of k
bases; it and its reverse complement are one (the canonical k-mer), each counts once a sequence, and windows with an N
are left out. At threshold 0 one shared k-mer links. What a threshold means, roughly: a share of 0.1 is an overlap of a
tenth of the shorter sequence, or, all along it, one substitution every 9 bases (the share is about identity ** k, that
is 0.9 ** 20). Long sequences share single k-mers by their repeats alone: threshold 0 is for sequences below a thousand
bases or so. Identical sequences and reverse complements are in one group always, whatever their length and letters.

Two bounds keep time and memory in hand; `Similarity` tells whether they were met, and up to them all is exact:

_MOST_KMERS    Above as many k-mers in all the sequences are sketched: of all k-mers only those are kept whose hash is
               below 1/scaled of its range, the same ones in every sequence, and shares are estimated on them; at
               threshold 0, sequences that share only a few k-mers may then stay apart
               (FracMinHash; Irber et al. 2022, bioRxiv 2022.01.11.475838; sourmash's `scaled`).
_MOST_RECORDS  A k-mer that stands in more sequences (a repeat, or the common core of many genomes of a species) does
               not propose all pairs of them, but each one with two others: with its neighbour in the order of smallest
               hashes, in which close relatives tend to stand side by side (MinHash), and with the most typical one,
               the centre of a star (as in Linclust; Steinegger and Söding 2018). No pair is linked wrongly for it: the
               share is always counted over all k-mers. A pair that shares nothing but such k-mers, and that no others
               connect, stays apart; at thresholds well below 1 that is rare. Threshold 0 has no such bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from ..core.errors import InputError
from ..core.inputs import PARTS
from .alphabet import VOCAB_SIZE, A, C, G, N, T
from .splits import group_numbers, join_groups, sequence_keys

K = 20
THRESHOLD = 0.1

_MOST_KMERS = 1 << 25  # one to three GB
_MOST_RECORDS = 256
_BLOCK = 1 << 20  # bases at a time
_PAIR_BLOCK = 1 << 24  # k-mers compared at a time
_EXAMPLES = 3
_KINDS = ("identical", "reverse_complement", "similar")  # in the order of closeness

_NO_BASE = 4
_DIGIT = np.full(VOCAB_SIZE, _NO_BASE, dtype=np.uint8)
_DIGIT[[A, C, G, T]] = range(4)  # the complement of digit d is 3 - d


@dataclass(frozen=True, eq=False)
class Similarity:
    """Groups of similar sequences, and whether they are exact: they are if `scaled` is 1 and `frequent_kmers` 0."""

    groups: np.ndarray  # int64 (n,), numbered by first appearance
    scaled: int  # one k-mer in as many was looked at
    frequent_kmers: int  # that stand in too many sequences for all pairs to be compared
    without_kmers: int  # records with no k-mer to look at: too short, full of N, or lost to the sketch


def similar_groups(tokens: Sequence[np.ndarray], *, k: int = K, threshold: float = THRESHOLD) -> np.ndarray:
    """The group of each sequence, int64 (n,); see `similarity`."""
    return similarity(tokens, k=k, threshold=threshold).groups


def similarity(tokens: Sequence[np.ndarray], *, k: int = K, threshold: float = THRESHOLD) -> Similarity:
    """Groups of sequences that share k-mers.

    tokens     (n) uint8 (L,) each, ids of alphabet.py
    k          bases in a k-mer, 1 to 32
    threshold  share of the k-mers of the sequence with fewer, 0 to 1; at 0 one shared k-mer is enough

    Raises InputError for another k or threshold.
    """
    if not 1 <= k <= 32:
        raise InputError(f"k {k}: allowed are 1 to 32 bases")
    if not 0 <= threshold <= 1:
        raise InputError(f"similarity threshold {threshold:g}: allowed are 0 (one shared k-mer is enough) to 1")
    keys = sequence_keys(tokens)
    # One record of each molecule, in the order of the keys, so that nothing depends on the order of the records.
    record_of = dict(sorted({key: record for record, key in enumerate(keys)}.items()))
    molecules = [tokens[record] for record in record_of.values()]
    windows = sum(max(0, len(ids) - k + 1) for ids in molecules)
    scaled = 1 << (max(0, windows - 1) // _MOST_KMERS).bit_length()
    owners, hashes = _sketches(molecules, k, scaled)
    groups, frequent = _linked(owners, hashes, len(molecules), threshold)

    number = {key: place for place, key in enumerate(record_of)}
    molecule = np.array([number[key] for key in keys], dtype=np.int64)
    empty = np.bincount(owners, minlength=len(molecules))[molecule] == 0
    return Similarity(group_numbers(groups[molecule].tolist()), scaled, frequent, int(empty.sum()))


# From bases to hashes


def _sketches(tokens: Sequence[np.ndarray], k: int, scaled: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct hashed k-mers of each sequence: owner and hash of each, (m,) both, sorted by hash, then by owner.

    All sequences are laid end to end, each with an N behind it, and cut into blocks that overlap by k - 1 bases.
    """
    separator = np.array([N], dtype=np.uint8)
    bases = np.concatenate([separator[:0], *(part for ids in tokens for part in (ids, separator))])
    ends = np.cumsum([len(ids) + 1 for ids in tokens])
    limit = np.uint64((1 << 64) // scaled - 1)
    sketches = [(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint64))]
    for start in range(0, len(bases), _BLOCK):
        positions, codes = _canonical_kmers(bases[start : start + _BLOCK + k - 1], k)
        hashes = _mixed(codes)
        kept = hashes <= limit
        owners = np.searchsorted(ends, start + positions[kept], side="right").astype(np.int32)
        sketches.append(_distinct(owners, hashes[kept]))
    owners, hashes = (np.concatenate(column) for column in zip(*sketches, strict=True))
    return _distinct(owners, hashes)


def _canonical_kmers(bases: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, codes) of the windows of k bases without N: the base-4 number of the strand where it is smaller."""
    if len(bases) < k:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    digits = _DIGIT[bases]
    others = np.concatenate([[0], np.cumsum(digits == _NO_BASE)])
    whole = others[k:] == others[:-k]
    codes = np.minimum(_windows(digits, k), _windows(3 - digits[::-1], k)[::-1])
    return np.flatnonzero(whole), codes[whole]


def _windows(digits: np.ndarray, k: int) -> np.ndarray:
    """The base-4 number of each window of k digits, uint64 (L - k + 1,): a window of 2w is two windows of w."""
    digits = digits.astype(np.uint64)
    codes, width = digits, 1
    for bit in f"{k:b}"[1:]:
        codes = (codes[:-width] << np.uint64(2 * width)) | codes[width:]
        width *= 2
        if bit == "1":
            codes = (codes[:-1] << np.uint64(2)) | digits[width:]
            width += 1
    return codes


def _mixed(codes: np.ndarray) -> np.ndarray:
    """A well-mixed permutation of the 64-bit numbers, uint64: the finaliser of MurmurHash3 (Appleby, public domain)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        codes = (codes ^ (codes >> np.uint64(33))) * np.uint64(factor)
    return codes ^ (codes >> np.uint64(33))


def _distinct(owners: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of owner and hash once, sorted by hash, then by owner."""
    order = np.lexsort((owners, hashes))
    owners, hashes = owners[order], hashes[order]
    new = np.ones(len(owners), dtype=bool)
    new[1:] = (owners[1:] != owners[:-1]) | (hashes[1:] != hashes[:-1])
    return owners[new], hashes[new]


# From hashes to groups


def _linked(owners: np.ndarray, hashes: np.ndarray, n: int, threshold: float) -> tuple[np.ndarray, int]:
    """The group of each of n sequences (n,), and how many k-mers are too frequent for all their pairs."""
    groups = np.arange(n)
    sizes = np.bincount(owners, minlength=n)  # distinct k-mers of each sequence
    kmers = np.cumsum(np.diff(hashes, prepend=hashes[:1]) != 0)  # the k-mers' numbers, in the order of their hashes
    if threshold == 0:
        first_holder = owners[np.searchsorted(kmers, kmers)]
        return join_groups(groups, owners, first_holder), 0

    holders = np.bincount(kmers)  # sequences of each k-mer
    several = holders[kmers] > 1
    owners, kmers = owners[several], (np.cumsum(holders > 1) - 1)[kmers[several]]
    holders = holders[holders > 1]
    table = csr_array((np.ones(len(owners), dtype=np.int32), (owners, kmers)), shape=(n, len(holders)))
    frequent = holders > _MOST_RECORDS
    candidates = chain(_sharing_pairs(table[:, ~frequent]), _frequent_pairs(owners, kmers, holders))
    for one, other, shared in candidates:
        needed = np.maximum(1, np.ceil(threshold * np.minimum(sizes[one], sizes[other]) - 1e-9))
        if frequent.any():
            unsure = np.flatnonzero((shared < needed) & (groups[one] != groups[other]))
            shared[unsure] = _shared(table, one[unsure], other[unsure])
        close = shared >= needed
        groups = join_groups(groups, one[close], other[close])
    return groups, int(frequent.sum())


_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # one, other, k-mers that they share at least; (m,) each


def _sharing_pairs(table: csr_array) -> Iterator[_Pairs]:
    """All pairs of rows that share a column, in blocks of rows whose product is of bounded size."""
    by_kmer = table.T.tocsr()
    work = np.cumsum(table @ np.diff(by_kmer.indptr).astype(np.int64))
    edges = [0, *(np.flatnonzero(np.diff(work // _PAIR_BLOCK)) + 1).tolist(), len(work)]
    for start, stop in pairwise(edges):
        product = (table[start:stop] @ by_kmer).tocoo()
        one, other = product.row.astype(np.int64) + start, product.col.astype(np.int64)
        once = one < other
        yield one[once], other[once], product.data[once]


def _frequent_pairs(owners: np.ndarray, kmers: np.ndarray, holders: np.ndarray) -> Iterator[_Pairs]:
    """For each frequent k-mer, each of its holders with its neighbour by smallest hash, and with the most typical one.

    The most typical one has the most k-mers, each weighted by its number of holders.
    """
    typical = np.bincount(owners, weights=holders[kmers])
    holder, first = np.unique(owners, return_index=True)
    smallest = np.zeros(len(typical), dtype=np.int64)
    smallest[holder] = kmers[first]  # k-mers are numbered in the order of their hashes
    frequent = holders[kmers] > _MOST_RECORDS
    owners, kmers = owners[frequent].astype(np.int64), kmers[frequent]

    by_hash = owners[np.lexsort((owners, smallest[owners], kmers))]
    by_type = owners[np.lexsort((owners, -typical[owners], kmers))]
    same = kmers[1:] == kmers[:-1]  # in either order: the k-mers were sorted before
    most_typical = by_type[np.searchsorted(kmers, kmers)]
    neighbours = np.unique(by_hash[:-1][same] * len(typical) + by_hash[1:][same])
    pairs = np.union1d(neighbours, np.unique(most_typical * len(typical) + by_type))
    for start in range(0, len(pairs), _BLOCK):
        one, other = np.divmod(pairs[start : start + _BLOCK], len(typical))
        yield one, other, np.zeros(len(one), dtype=np.int32)


def _shared(table: csr_array, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many columns two rows share, for each pair of rows, int32 (m,)."""
    step = max(1, _PAIR_BLOCK // (2 * int(np.diff(table.indptr).max())))
    shared = [
        table[one[start : start + step]].multiply(table[other[start : start + step]]).sum(axis=1)
        for start in range(0, len(one), step)
    ]
    return np.concatenate([np.empty(0, dtype=np.int32), *shared])


# What leaks


def leakage(
    tokens: Sequence[np.ndarray], split: np.ndarray, *, k: int = K, threshold: float = THRESHOLD
) -> dict[str, Any]:
    """What two parts have in common, JSON-safe; a record counts once, for the closest kind of those it belongs to.

    tokens  (n) uint8 (L,) each
    split   (n,) part of each record, each one of PARTS
    k, threshold, scaled, frequent_kmers, without_kmers: see `similarity`

    pairs   "train/test" -> kind -> `groups` that straddle the two parts, their `records` in these, and up to three
            `examples`, each a record's index in the one part and one's in the other
        identical           groups of records with the same sequence
        reverse_complement  the same molecule, read from either strand
        similar             groups of `similarity`, with a record that is none of the above

    Raises InputError as `similarity` does.
    """
    found = similarity(tokens, k=k, threshold=threshold)
    exact = group_numbers([blake2b(ids.tobytes(), digest_size=16).digest() for ids in tokens])
    levels: dict[str, np.ndarray] = dict(
        zip(_KINDS, (exact, group_numbers(sequence_keys(tokens)), found.groups), strict=True)
    )
    parts = sorted(set(split.tolist()), key=PARTS.index)
    return {
        "k": k,
        "threshold": threshold,
        "scaled": found.scaled,
        "frequent_kmers": found.frequent_kmers,
        "without_kmers": found.without_kmers,
        "pairs": {
            f"{one}/{other}": _overlap(levels, split == one, split == other) for one, other in combinations(parts, 2)
        },
    }


def _overlap(levels: Mapping[str, np.ndarray], in_one: np.ndarray, in_other: np.ndarray) -> dict[str, dict[str, Any]]:
    """`levels`: kind -> the group of each record (n,), from the closest kind to the loosest."""
    counted = ~(in_one | in_other)
    overlap = {}
    for kind, groups in levels.items():
        straddling = np.intersect1d(groups[in_one], groups[in_other])
        records = np.flatnonzero(~counted & np.isin(groups, straddling))
        counted[records] = True
        ids, first = np.unique(groups[records], return_index=True)
        examples = []
        for record in sorted(records[first].tolist())[:_EXAMPLES]:
            others = in_other if in_one[record] else in_one
            partner = int(np.flatnonzero(others & (groups == groups[record]))[0])
            examples.append([record, partner] if in_one[record] else [partner, record])
        overlap[kind] = {"groups": len(ids), "records": len(records), "examples": examples}
    return overlap


def describe_leakage(report: Mapping[str, Any], names: Sequence[str]) -> str:
    """The report of `leakage` as a table to print, with `names` (n) of the records in its examples."""
    table = [["parts", "in both", "groups", "records"]]
    examples = ["examples"]
    for pair, kinds in report["pairs"].items():
        for kind, row in kinds.items():
            table.append([pair.replace("/", " and "), kind.replace("_", " "), str(row["groups"]), str(row["records"])])
            examples.append(", ".join(f"{names[one]} / {names[other]}" for one, other in row["examples"]))
    parts, kind, groups, records = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [
        f"{row[0]:<{parts}}  {row[1]:<{kind}}  {row[2]:>{groups}}  {row[3]:>{records}}  {shown}".rstrip()
        for row, shown in zip(table, examples, strict=True)
    ]
    return "\n".join([*lines, *_notes(report)])


def _notes(report: Mapping[str, Any]) -> list[str]:
    mers = f"{report['k']}-mers"
    link = (
        f"{100 * report['threshold']:g} % of the {mers} of the one with fewer"
        if report["threshold"]
        else f"one {mers[:-1]}"
    )
    notes = [f"similar: linked, perhaps through others, by sharing at least {link}"]
    if report["scaled"] > 1:
        notes.append(f"shares are estimated on one {mers[:-1]} in {report['scaled']}")
    if report["frequent_kmers"]:
        notes.append(
            f"{report['frequent_kmers']} {mers} stand in more than {_MOST_RECORDS} sequences each; "
            "not all pairs of those were compared"
        )
    if report["without_kmers"]:
        notes.append(
            f"records without a {mers[:-1]} to compare, of which only copies are found: {report['without_kmers']}"
        )
    return notes
