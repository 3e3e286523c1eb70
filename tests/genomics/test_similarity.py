"""Groups of similar sequences and what leaks, against a twin by brute force on strings and sets."""

import functools
import json
from fractions import Fraction
from importlib.resources import files as package_files
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics import similarity as module
from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.reading.fasta import read_fasta
from polymamba.genomics.similarity import describe_leakage, leakage, similar_groups, similarity

SPLICE = Path(str(package_files("polymamba.genomics") / "examples" / "splice"))

# Few letters and short pieces, so that k-mers are shared often.
PIECES = st.lists(st.sampled_from(["A", "C", "N", "ACG", "CGT", "GATTACA", "TTC", "AAAA"]), max_size=6).map("".join)
THRESHOLDS = st.sampled_from(
    [Fraction(0), Fraction(1, 10), Fraction(3, 10), Fraction(1, 2), Fraction(3, 4), Fraction(1)]
)


def flipped(sequence: str) -> str:
    return str(Seq(sequence).reverse_complement())


@functools.cache
def kmers_of(sequence: str, k: int) -> set[str]:
    windows = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
    return {min(window, flipped(window)) for window in windows if "N" not in window}


def linked(one: str, other: str, k: int, threshold: Fraction) -> bool:
    if one in (other, flipped(other)):
        return True
    mine, others = kmers_of(one, k), kmers_of(other, k)
    return len(mine & others) >= max(1, threshold * min(len(mine), len(others)))


def by_brute_force(sequences: list[str], k: int, threshold: Fraction) -> list[int]:
    groups = list(range(len(sequences)))
    for i, j in combinations(range(len(sequences)), 2):
        if linked(sequences[i], sequences[j], k, threshold):
            groups = [groups[i] if group == groups[j] else group for group in groups]
    return [groups.index(group) for group in groups]  # a group is called after its first record


def partition(groups: np.ndarray) -> list[int]:
    return [groups.tolist().index(group) for group in groups.tolist()]


def groups_of(sequences: list[str], k: int, threshold: Fraction = Fraction(1, 10)) -> np.ndarray:
    return similar_groups([tokenize(sequence) for sequence in sequences], k=k, threshold=float(threshold))


def random_sequences(n: int, length: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), length)) for _ in range(n)]


def mutated(sequence: str, rate: float, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(list("ACGT")) if rng.random() < rate else base for base in sequence)


# Groups


@pytest.mark.parametrize(("block", "pair_block"), [(1 << 20, 1 << 24), (3, 5)])
@given(sequences=st.lists(PIECES, max_size=12), k=st.integers(1, 6), threshold=THRESHOLDS)
def test_groups_are_those_of_brute_force(block, pair_block, sequences, k, threshold):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_PAIR_BLOCK", pair_block)
        found = similarity([tokenize(s) for s in sequences], k=k, threshold=float(threshold))
    assert partition(found.groups) == by_brute_force(sequences, k, threshold)
    assert list(dict.fromkeys(found.groups.tolist())) == list(range(len(set(found.groups.tolist()))))
    assert (found.scaled, found.frequent_kmers) == (1, 0)
    assert found.without_kmers == sum(not kmers_of(s, k) for s in sequences)


@pytest.mark.parametrize("k", [13, 20, 31, 32])
@pytest.mark.parametrize("threshold", [Fraction(0), Fraction(1, 5), Fraction(1, 2)])
def test_longer_sequences(k, threshold):
    sequences = random_sequences(8, 90)
    rates = [0, 0.01, 0.02, 0.04, 0.1, 0.3]
    sequences += [mutated(s, rate, i) for i, (s, rate) in enumerate(zip(sequences, rates, strict=False))]
    sequences += [flipped(sequences[6][:50]) + sequences[7][20:60], "N" * 90, "ACGT" * 20]
    groups = groups_of(sequences, k, threshold)
    assert partition(groups) == by_brute_force(sequences, k, threshold)
    assert 8 < len(set(groups.tolist())) < len(sequences)


def test_a_canonical_kmer_is_the_smaller_strand_in_base_4():
    sequence = random_sequences(1, 70)[0][:40] + "N" + random_sequences(1, 70)[0][40:]
    for k in (1, 2, 7, 20, 31, 32):
        positions, codes = module._canonical_kmers(tokenize(sequence), k)
        expected = {
            i: int(min(w, flipped(w)).translate(str.maketrans("ACGT", "0123")), 4)
            for i in range(len(sequence) - k + 1)
            if "N" not in (w := sequence[i : i + k])
        }
        assert dict(zip(positions.tolist(), codes.tolist(), strict=True)) == expected


@pytest.mark.parametrize("most_records", [1, 256])
@given(sequences=st.lists(PIECES, max_size=10), k=st.integers(1, 5), threshold=THRESHOLDS, seed=st.integers(0, 99))
def test_neither_order_nor_strand_matters(most_records, sequences, k, threshold, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sequences))
    others = [flipped(sequences[i]) if rng.random() < 0.5 else sequences[i] for i in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_RECORDS", most_records)
        groups = groups_of(sequences, k, threshold)
        assert partition(groups_of(others, k, threshold)) == partition(groups[order])


def test_copies_are_together_even_where_there_is_no_kmer():
    sequences = ["ACG", "CGT", "NNNNNNNNNNNN", "ACG", "NNNNNNNNNNNN", "", "ACGT", ""]
    found = similarity([tokenize(s) for s in sequences], k=5, threshold=0)
    assert found.groups.tolist() == [0, 0, 1, 0, 1, 2, 3, 2]
    assert found.without_kmers == 8


def test_a_share_that_is_met_exactly_links():
    shared, *rest = random_sequences(4, 30, seed=3)
    one, other = shared[:12] + rest[0], rest[1] + shared[:12]  # 3 of 33 10-mers shared
    assert len(kmers_of(one, 10) & kmers_of(other, 10)) == 3
    assert len(kmers_of(one, 10)) == len(kmers_of(other, 10)) == 33
    assert similar_groups([tokenize(one), tokenize(other)], k=10, threshold=3 / 33).tolist() == [0, 0]
    assert similar_groups([tokenize(one), tokenize(other)], k=10, threshold=3.01 / 33).tolist() == [0, 1]


# The two bounds


@given(sequences=st.lists(PIECES, max_size=12), k=st.integers(1, 5), threshold=THRESHOLDS, most=st.integers(1, 3))
def test_frequent_kmers_are_counted_and_link_nothing_wrongly(sequences, k, threshold, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_RECORDS", most)
        found = similarity([tokenize(s) for s in sequences], k=k, threshold=float(threshold))
    molecules = {min(s, flipped(s)) for s in sequences}
    holders = [
        sum(kmer in kmers_of(s, k) for s in molecules) for kmer in set().union(*(kmers_of(s, k) for s in molecules))
    ]
    expected = by_brute_force(sequences, k, threshold)
    assert found.frequent_kmers == (sum(n > most for n in holders) if threshold else 0)
    if not found.frequent_kmers:
        assert partition(found.groups) == expected
    # Finer than what brute force says, or equal: each group lies within one of its groups.
    assert len(set(zip(found.groups.tolist(), expected, strict=True))) == len(set(found.groups.tolist()))


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_families_whose_kmers_are_all_frequent_stay_together(monkeypatch, threshold):
    ancestors = random_sequences(3, 120)
    sequences = [mutated(ancestor, 0.005, i) for i in range(40) for ancestor in ancestors]
    monkeypatch.setattr(module, "_MOST_RECORDS", 5)
    found = similarity([tokenize(s) for s in sequences], threshold=threshold)
    assert found.frequent_kmers > 200
    expected = by_brute_force(sequences, 20, Fraction(str(threshold)))
    assert partition(found.groups) == expected
    assert len(set(expected)) < 10


def test_many_kmers_are_sketched(monkeypatch):
    ancestors = random_sequences(6, 3000)
    sequences = [*ancestors, *(mutated(s, 0.01, i) for i, s in enumerate(ancestors)), "ACGTT", flipped("ACGTT")]
    monkeypatch.setattr(module, "_MOST_KMERS", 5000)
    found = similarity([tokenize(s) for s in sequences], threshold=0.5)
    assert found.scaled == 8  # 35,772 k-mers to at most 5,000
    assert found.groups.tolist() == [*range(6), *range(6), 6, 6]
    owners, hashes = module._sketches([tokenize(s) for s in ancestors], 20, 8)
    assert np.bincount(owners) == pytest.approx(np.full(6, 2981 / 8), rel=0.2)
    all_owners, all_hashes = module._sketches([tokenize(s) for s in ancestors], 20, 1)
    below = all_hashes < 2**61
    assert (owners.tolist(), hashes.tolist()) == (all_owners[below].tolist(), all_hashes[below].tolist())


@pytest.mark.parametrize(("k", "threshold"), [(0, 0.5), (33, 0.5), (20, -0.1), (20, 1.5), (20, float("nan"))])
def test_what_is_allowed(k, threshold):
    with pytest.raises(InputError, match="allowed are"):
        similarity([tokenize("ACGT")], k=k, threshold=threshold)


# What leaks


@given(
    records=st.lists(st.tuples(PIECES, st.sampled_from(["train", "valid", "test"])), max_size=12),
    k=st.integers(2, 5),
    threshold=THRESHOLDS,
)
def test_leakage_is_that_of_brute_force(records, k, threshold):
    sequences, parts = [s for s, _ in records], [part for _, part in records]
    report = leakage([tokenize(s) for s in sequences], np.array(parts, dtype="<U5"), k=k, threshold=float(threshold))
    assert json.loads(json.dumps(report)) == report
    levels = {
        "identical": sequences,
        "reverse_complement": [min(s, flipped(s)) for s in sequences],
        "similar": by_brute_force(sequences, k, threshold),
    }
    present = [part for part in ("train", "valid", "test") if part in parts]
    assert list(report["pairs"]) == [f"{one}/{other}" for one, other in combinations(present, 2)]
    for pair, kinds in report["pairs"].items():
        one, other = pair.split("/")
        seen = set()
        for kind, group in levels.items():
            both = set.intersection(*({g for g, p in zip(group, parts, strict=True) if p == x} for x in (one, other)))
            concerned = {i for i, g in enumerate(group) if g in both and parts[i] in (one, other)} - seen
            seen |= concerned
            row = kinds[kind]
            assert (row["groups"], row["records"]) == (len({group[i] for i in concerned}), len(concerned))
            assert len(row["examples"]) == min(3, row["groups"])
            for i, j in row["examples"]:
                assert (parts[i], parts[j]) == (one, other)
                assert group[i] == group[j]
                assert {i, j} & concerned


def test_splice_official_split():
    """The README of the example speaks of 69 groups of identical sequences that straddle its split."""
    files = sorted(SPLICE.glob("*/*.fa.gz"))
    records = [(record, path.parent.name) for path in files for record in read_fasta(path)]
    split = np.array([part for _, part in records])
    report = leakage([record.tokens for record, _ in records], split)
    across = {}
    for record, part in records:
        across.setdefault(record.sequence, set()).add(part)
    straddling = {sequence for sequence, parts in across.items() if len(parts) == 2}
    found = report["pairs"]["train/test"]
    assert found["identical"]["groups"] == len(straddling) == 69
    assert found["identical"]["records"] == sum(record.sequence in straddling for record, _ in records)
    assert found["reverse_complement"]["groups"] == 0
    assert found["similar"]["groups"] > 50
    i, j = found["identical"]["examples"][0]
    assert records[i][0].sequence == records[j][0].sequence


def test_description(monkeypatch):
    a, b, c = random_sequences(3, 60)
    sequences = [a, a, b, flipped(b), c, c[:40], "ACGT"]
    split = np.array(["train", "test"] * 3 + ["train"])
    text = describe_leakage(leakage([tokenize(s) for s in sequences], split), list("abcdefg"))
    assert text.splitlines() == [
        "parts           in both             groups  records  examples",
        "train and test  identical                1        2  a / b",
        "train and test  reverse complement       1        2  c / d",
        "train and test  similar                  1        2  e / f",
        "similar: linked, perhaps through others, by sharing at least 10 % of the 20-mers of the one with fewer",
        "records without a 20-mer to compare, of which only copies are found: 1",
    ]
    monkeypatch.setattr(module, "_MOST_RECORDS", 1)
    monkeypatch.setattr(module, "_MOST_KMERS", 100)
    report = leakage([tokenize(s) for s in sequences], split, threshold=0.5)
    assert (report["scaled"], report["frequent_kmers"] > 0) == (2, True)
    assert "estimated on one 20-mer in 2\n" in describe_leakage(report, list("abcdefg"))
    assert "20-mers stand in more than 1 sequences each" in describe_leakage(report, list("abcdefg"))
