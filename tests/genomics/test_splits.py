"""Division into parts: nothing shared, shares kept, the same on every machine and in any order."""

from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.splits import (
    deal_chromosomes,
    group_numbers,
    join_groups,
    joined_keys,
    sequence_keys,
    split_by_chromosome,
    straddling,
    stratified_split,
)

FRACTIONS = {"valid": 0.1, "test": 0.1}


def random_sequences(n: int, seed: int = 0, length: int = 30) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), length)) for _ in range(n)]


def keys_of(sequences: list[str]) -> list[bytes]:
    return sequence_keys([tokenize(sequence) for sequence in sequences])


@given(st.lists(st.text("ACN", max_size=4), max_size=12))
def test_keys_are_equal_for_the_same_molecule_only(sequences):
    keys = keys_of(sequences)
    for i, j in combinations(range(len(sequences)), 2):
        same = sequences[j] in (sequences[i], str(Seq(sequences[i]).reverse_complement()))
        assert (keys[i] == keys[j]) == same


def test_straddling_counts_distinct_sequences():
    keys = keys_of(["AAC", "AAC", "GTT", "CCC", "CCC", "TTT"])  # GTT is AAC from the other strand
    split = np.array(["train", "train", "test", "test", "valid", "test"])
    assert straddling(keys, split, "train", "test") == 1
    assert straddling(keys, split, "valid", "test") == 1
    assert straddling(keys, split, "train", "valid") == 0


@given(
    copies=st.lists(st.tuples(st.integers(1, 9), st.sampled_from("abc")), min_size=9, max_size=40),
    seed=st.integers(0, 2**40),
)
def test_groups_stay_whole_and_no_part_of_a_class_is_empty(copies, seed):
    sequences, classes = [], []
    for sequence, (n, name) in zip(random_sequences(len(copies)), copies, strict=True):
        flipped = str(Seq(sequence).reverse_complement())
        sequences += [sequence if i % 2 else flipped for i in range(n)]
        classes += [name] * n
    groups = Counter(name for _, name in copies)
    if min(groups.values()) < 3:
        with pytest.raises(InputError, match="at least 3 are needed"):
            stratified_split(keys_of(sequences), classes, FRACTIONS, seed)
        return
    split = stratified_split(keys_of(sequences), classes, FRACTIONS, seed)
    parts_of = defaultdict(set)
    for sequence, part in zip(sequences, split, strict=True):
        parts_of[min(sequence, str(Seq(sequence).reverse_complement()))].add(str(part))
    assert all(len(parts) == 1 for parts in parts_of.values())
    for name in groups:
        assert {str(part) for part, c in zip(split, classes, strict=True) if c == name} == {"train", "valid", "test"}


@pytest.mark.parametrize("sizes", [{"a": 100, "b": 1000}, {"a": 37, "b": 41, "c": 3}, {"a": 10, "b": 14}])
@pytest.mark.parametrize("fractions", [FRACTIONS, {"valid": 0.25}, {"valid": 0.0, "test": 0.3}])
def test_each_class_gives_its_share(sizes, fractions):
    classes = [name for name, n in sizes.items() for _ in range(n)]
    split = stratified_split(keys_of(random_sequences(len(classes))), classes, fractions, seed=1)
    for name, n in sizes.items():
        counts = Counter(part for part, c in zip(split.tolist(), classes, strict=True) if c == name)
        expected = {part: max(1, round(share * n)) for part, share in fractions.items() if share}
        assert counts == {"train": n - sum(expected.values()), **expected}


def test_shares_hold_with_many_copies():
    rng = np.random.default_rng(0)
    sequences = [s for s in random_sequences(300) for _ in range(rng.integers(1, 6))]
    split = stratified_split(keys_of(sequences), ["a"] * len(sequences), FRACTIONS, seed=0)
    for part in FRACTIONS:
        assert np.mean(split == part) == pytest.approx(0.1, abs=0.005)


def test_sequence_with_two_labels_stays_whole():
    sequences = random_sequences(40)
    sequences[20:23] = sequences[0:3]
    classes = ["a"] * 20 + ["b"] * 20
    for seed in range(20):
        split = stratified_split(keys_of(sequences), classes, {"valid": 0.3, "test": 0.3}, seed)
        assert split[20:23].tolist() == split[0:3].tolist()


def test_depends_on_sequences_and_seed_only():
    sequences = random_sequences(200)
    classes = ["a", "b"] * 100
    order = np.random.default_rng(5).permutation(200)
    split = stratified_split(keys_of(sequences), classes, FRACTIONS, seed=3)
    other = stratified_split(keys_of([sequences[i] for i in order]), [classes[i] for i in order], FRACTIONS, seed=3)
    assert other.tolist() == split[order].tolist()
    assert stratified_split(keys_of(sequences), classes, FRACTIONS, seed=4).tolist() != split.tolist()


def test_is_the_same_on_every_machine():
    sequences = ["".join("ACGT"[i >> 2 * j & 3] for j in range(6)) for i in range(0, 2000, 50)]
    split = stratified_split(keys_of(sequences), ["a", "b"] * 20, FRACTIONS, seed=0)
    assert {part: np.flatnonzero(split == part).tolist() for part in FRACTIONS} == {
        "valid": [5, 16, 17, 36],
        "test": [18, 20, 25, 39],
    }


def test_too_few_distinct_sequences():
    sequences = ["ACGTT", "ACGTT", "AACGT", "CCCCC", *random_sequences(5)]  # AACGT is ACGTT from the other strand
    with pytest.raises(InputError) as error:
        stratified_split(keys_of(sequences), ["rare"] * 4 + ["common"] * 5, FRACTIONS, seed=0)
    assert str(error.value) == (
        "class 'rare': 2 distinct sequences of its own are too few to be split; "
        "at least 3 are needed (for train, valid, test)"
    )


# Groups of any kind


def test_group_numbers_follow_first_appearance():
    assert group_numbers(["b", None, "b", "a", b"b"]).tolist() == [0, 1, 0, 2, 3]
    assert group_numbers([]).dtype == np.int64


@given(groups=st.lists(st.integers(0, 7), min_size=8, max_size=8), links=st.lists(st.tuples(*[st.integers(0, 7)] * 2)))
def test_join_groups(groups, links):
    expected = list(groups)
    for i, j in links:
        expected = [expected[i] if group == expected[j] else group for group in expected]
    one, other = np.array(links, dtype=np.int64).reshape(-1, 2).T
    joined = join_groups(np.array(groups), one, other)
    assert group_numbers(joined.tolist()).tolist() == group_numbers(expected).tolist()


LETTERS = st.sampled_from(["A", "C", "G", "AC", "GT"])


@given(st.lists(st.tuples(LETTERS, st.integers(0, 4), st.sampled_from("xyz")), max_size=14), st.randoms())
def test_joined_keys_tear_no_grouping(records, random):
    sequences, clusters, chromosomes = map(list, zip(*records, strict=True)) if records else ([], [], [])
    joined = joined_keys(keys_of(sequences), clusters, chromosomes)
    # Two records share a key if and only if a chain of shared groups leads from one to the other.
    groups = list(range(len(records)))
    for grouping in (keys_of(sequences), clusters, chromosomes):
        for i, j in combinations(range(len(records)), 2):
            if grouping[i] == grouping[j]:
                groups = [groups[i] if group == groups[j] else group for group in groups]
    for i, j in combinations(range(len(records)), 2):
        assert (joined[i] == joined[j]) == (groups[i] == groups[j])
    # Neither the order of the records nor the names of the groups matter.
    order = random.sample(range(len(records)), len(records))
    other = joined_keys(
        keys_of([sequences[i] for i in order]), [-clusters[i] for i in order], [chromosomes[i] * 2 for i in order]
    )
    assert other == [joined[i] for i in order]


def test_joined_keys_of_nothing_else_tell_molecules_apart():
    keys = keys_of(["AAC", "GTT", "CCC", "AAC"])
    assert joined_keys(keys) == keys


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whole_clusters_come_close_to_the_shares(seed):
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(260), rng.integers(1, 12, 260)).tolist()
    clusters += [1000] * 300 + [1001] * 60  # and large ones
    classes = [str(c) for c in rng.choice(["a", "b", "c"], len(clusters), p=[0.6, 0.3, 0.1])]
    keys = joined_keys(keys_of(random_sequences(len(clusters), seed)), clusters)
    split = stratified_split(keys, classes, FRACTIONS, seed)
    assert len(set(zip(clusters, split.tolist(), strict=True))) == 262
    for name in "abc":
        of_class = split[np.array(classes) == name]
        for part in FRACTIONS:
            assert np.mean(of_class == part) == pytest.approx(0.1, abs=0.015)


def test_class_that_lives_in_mixed_groups_only_is_no_error():
    classes = ["rare", "common", "common"] * 9
    keys = joined_keys(keys_of(random_sequences(27)), [i // 3 for i in range(27)])
    split = stratified_split(keys, classes, FRACTIONS, seed=0)
    for name in ("rare", "common"):
        assert {p for p, c in zip(split.tolist(), classes, strict=True) if c == name} == {"train", "valid", "test"}


def test_error_names_the_unit():
    keys = joined_keys(keys_of(random_sequences(30)), [0] * 5 + [1] * 5 + list(range(20)))
    with pytest.raises(InputError) as error:
        stratified_split(keys, ["rare"] * 10 + ["common"] * 20, FRACTIONS, seed=0, unit="groups of similar sequences")
    assert "groups of similar sequences of its own are too few" in str(error.value)


# Chromosomes

CHROMOSOMES = ["chr1"] * 50 + ["chr2"] * 30 + ["chr3"] * 12 + ["chrX"] * 8


def test_chromosomes_by_name():
    split = split_by_chromosome(CHROMOSOMES, {"valid": ["chr3"], "test": ["chrX", "chr2"]})
    assert Counter(zip(CHROMOSOMES, split.tolist(), strict=True)) == {
        ("chr1", "train"): 50,
        ("chr2", "test"): 30,
        ("chr3", "valid"): 12,
        ("chrX", "test"): 8,
    }


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({"test": ["22"]}, "test: chromosome '22' has no record; there are 4: chr1, chr2, chr3, chrX"),
        ({"valid": ["chr1"], "test": ["chr2", "chr1"]}, "chromosome 'chr1': named for both valid and test; keep one"),
        ({"valid": [], "test": ["chr2"]}, "valid: no chromosome is named; there are 4: chr1, chr2, chr3, chrX"),
        (
            {"test": ["chr1", "chr2", "chr3", "chrX"]},
            "train: no chromosome is left; there are 4: chr1, chr2, chr3, chrX",
        ),
    ],
)
def test_chromosomes_by_name_that_cannot_be(held_out, message):
    with pytest.raises(InputError) as error:
        split_by_chromosome(CHROMOSOMES, held_out)
    assert str(error.value) == message


def test_chromosomes_by_share():
    split = deal_chromosomes(CHROMOSOMES, FRACTIONS, seed=0)
    assert dict(zip(CHROMOSOMES, split.tolist(), strict=True)) == {
        "chr1": "train",
        "chr2": "train",
        "chr3": "valid",
        "chrX": "test",
    }
    assert set(deal_chromosomes(CHROMOSOMES, {"valid": 0.0, "test": 0.3}, seed=0).tolist()) == {"train", "test"}


@given(sizes=st.lists(st.integers(1, 60), min_size=3, max_size=24), seed=st.integers(0, 9))
def test_chromosomes_by_share_stay_whole(sizes, seed):
    chromosomes = [f"chr{i}" for i, n in enumerate(sizes) for _ in range(n)]
    split = deal_chromosomes(chromosomes, FRACTIONS, seed)
    assert len(set(zip(chromosomes, split.tolist(), strict=True))) == len(sizes)
    assert set(split.tolist()) == {"train", "valid", "test"}
    order = np.random.default_rng(seed).permutation(len(chromosomes))
    assert deal_chromosomes([chromosomes[i] for i in order], FRACTIONS, seed).tolist() == split[order].tolist()


def test_seed_decides_among_chromosomes_of_one_size():
    chromosomes = [f"chr{i % 20}" for i in range(400)]
    splits = {tuple(deal_chromosomes(chromosomes, FRACTIONS, seed).tolist()) for seed in range(5)}
    assert len(splits) == 5
    assert all(Counter(split) == {"train": 320, "valid": 40, "test": 40} for split in splits)


def test_too_few_chromosomes():
    with pytest.raises(InputError, match="too few chromosomes for train, valid, test; there are 2: chr1, chr2"):
        deal_chromosomes(CHROMOSOMES[:60], FRACTIONS, seed=0)
