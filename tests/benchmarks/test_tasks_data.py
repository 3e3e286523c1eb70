"""The synthetic tasks' generators against brute force: what is asked is worked out anew from the tokens alone."""

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "tasks"))

from generators import (
    LETTERS,
    NONE,
    PADDING,
    SEPARATOR,
    associative_recall,
    copying,
    induction_heads,
    ngram_lookup,
    selective_copying,
)
from listops import NAMES, listops


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(batch) -> list[tuple[list[int], dict[int, int]]]:
    """Of each sequence its tokens, and place -> answer."""
    return [
        (tokens.tolist(), {p: a for p, a in zip(places.tolist(), answers.tolist(), strict=True) if a != NONE})
        for tokens, places, answers in zip(*batch, strict=True)
    ]


GENERATORS = {
    "selective copying": lambda g: selective_copying(9, 41, 5, 8, g),
    "induction heads": lambda g: induction_heads(9, 17, 6, g),
    "associative recall": lambda g: associative_recall(9, 31, (2, 5, 10), 64, g),
    "copying": lambda g: copying(9, 3, 11, g),
    "suffix key": lambda g: ngram_lookup(9, 12, 23, 2, 3, False, g),
    "prefix key": lambda g: ngram_lookup(9, 12, 23, 2, 3, True, g),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_batch_follows_from_its_seed(name):
    first, again, other = (GENERATORS[name](seeded(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.tokens, other.tokens)


def test_selective_copying():
    for tokens, answers in rows(selective_copying(200, 41, 5, 8, seeded())):
        body, markers = tokens[:36], tokens[36:]
        assert markers == [7] * 5
        copied = [token for token in body if token != 0]
        assert all(1 <= token < 7 for token in copied)
        assert answers == dict(zip(range(36, 41), copied, strict=True))


def test_induction_heads():
    places = set()
    for tokens, answers in rows(induction_heads(300, 17, 6, seeded())):
        first = tokens.index(5)
        assert [i for i, token in enumerate(tokens) if token == 5] == [first, 16]
        assert answers == {16: tokens[first + 1]}
        places.add(first)
    assert places == set(range(15))


def test_associative_recall():
    seen = set()
    for tokens, answers in rows(associative_recall(300, 31, (2, 5, 10), 64, seeded())):
        n_pairs = len(answers)
        keys, values = tokens[: 2 * n_pairs : 2], tokens[1 : 2 * n_pairs : 2]
        assert len(set(keys)) == n_pairs
        queries = {i: token for i, token in enumerate(tokens) if i >= 2 * n_pairs and token < 32}
        assert sorted(queries.values()) == sorted(keys)
        assert min(values) >= 32
        assert answers == {i: dict(zip(keys, values, strict=True))[token] for i, token in queries.items()}
        seen.add(n_pairs)
    assert seen == {2, 5, 10}


def test_copying():
    lengths = set()
    for tokens, answers in rows(copying(200, 3, 11, seeded())):
        n = tokens.index(SEPARATOR)
        letters = tokens[:n]
        assert max(letters) < LETTERS
        assert tokens == [*letters, SEPARATOR, *letters[:-1], *[PADDING] * (22 - 2 * n)]
        assert answers == {n + i: letter for i, letter in enumerate(letters)}
        lengths.add(n)
    assert lengths == set(range(3, 12))


@pytest.mark.parametrize("prefix", [False, True])
def test_ngram_lookup(prefix):
    lengths = set()
    for tokens, answers in rows(ngram_lookup(300, 12, 23, 2, 3, prefix, seeded())):
        tokens = [token for token in tokens if token != PADDING]
        parts = [[]]
        for token in tokens:
            parts.append([]) if token == SEPARATOR else parts[-1].append(token)
        if prefix:
            key, letters, shown = parts
            first = len(tokens) - 3
        else:
            letters, (*key, a, b) = parts
            shown, first = [a, b], len(tokens) - 3
        found = [i for i in range(len(letters) - 1) if letters[i : i + 2] == key]
        assert len(found) == 1
        following = letters[found[0] + 2 : found[0] + 5]
        assert shown == following[:2]
        assert answers == dict(zip(range(first, first + 3), following, strict=True))
        lengths.add(len(letters))
    assert lengths == set(range(12, 24))


def value_of(words: list[str]) -> tuple[int, list[str], int]:
    """The value of the tree that `words` begin with, what comes after it, and its depth."""
    head, *rest = words
    if head.isdigit():
        return int(head), rest, 1
    arguments, depths = [], []
    while rest[0] != "]":
        value, rest, depth = value_of(rest)
        arguments.append(value)
        depths.append(depth)
    assert 2 <= len(arguments) <= 10
    operation = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}
    return operation[head](arguments), rest[1:], 1 + max(depths)


def test_listops():
    tokens, lengths, answers = listops(150, seed=5, shortest=20, longest=200)
    deepest = 0
    for row, n, answer in zip(tokens, lengths, answers, strict=True):
        assert 20 < n < 200
        assert all(NAMES[token] == "<pad>" for token in row[n:])
        value, rest, depth = value_of([NAMES[token] for token in row[:n]])
        assert rest == []
        assert value == answer
        deepest = max(deepest, depth)
    assert deepest <= 10
    again, other = listops(150, seed=5, shortest=20, longest=200), listops(150, seed=6, shortest=20, longest=200)
    assert np.array_equal(again[0], tokens)
    assert not np.array_equal(other[0], tokens)
    assert len(set(answers.tolist())) == 10
