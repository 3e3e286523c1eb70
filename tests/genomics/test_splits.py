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
from polymamba.genomics.splits import sequence_keys, straddling, stratified_split

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
