"""Noises: what they may do to a text and what not, how often, and that a seed gives the same one again."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymamba.bytes.noise import NOISES, TABLE, Noise, spoil

TEXT = ("Whether I shall turn out to be the hero of my own life, 日本語 😀 é, these pages must show. " * 60).encode()


def test_the_table_is_the_papers():
    assert [str(noise) for noise in TABLE] == [
        *("drop 0.05", "drop 0.3", "repeat 0.05", "repeat 0.3", "swap 0.05", "swap 0.3"),
        *("uppercase 0.05", "uppercase 0.3", "randomcase 0.5", "antspeak 1"),
    ]


def test_what_each_does():
    def of(name, chance, text="aBcé"):
        return NOISES[name](text, [bool(int(c)) for c in chance])

    assert of("drop", "0101") == "ac"
    assert of("repeat", "0101") == "aBBcéé"
    assert of("swap", "1010") == "Baéc"
    assert of("swap", "1101") == "Bacé"  # the second is swapped away already, the last has no next one
    assert of("uppercase", "1001") == "ABcÉ"
    assert of("randomcase", "1010") == "AbCé"
    assert of("antspeak", "1111") == "A B C É "


@pytest.mark.parametrize("noise", TABLE, ids=str)
def test_how_often(noise):
    clean, text = TEXT.decode(), spoil(TEXT, noise, 5).decode()
    n = len(clean)
    if noise.name == "drop":
        assert len(text) / n == pytest.approx(1 - noise.probability, abs=0.03)
    elif noise.name == "repeat":
        assert len(text) / n == pytest.approx(1 + noise.probability, abs=0.03)
    elif noise.name == "swap":
        assert Counter(text) == Counter(clean)
        # a pair is taken with probability p / (1 + p) per character, and changes both unless they are equal
        changed = sum(a != b for a, b in zip(text, clean, strict=True)) / n
        assert changed == pytest.approx(2 * noise.probability / (1 + noise.probability), abs=0.05)
    elif noise.name == "antspeak":
        assert text == "".join(c + " " for c in clean.upper())
    else:
        assert text.lower() == clean.lower()
        lower = [(a, b) for a, b in zip(clean, text, strict=True) if a.islower()]
        assert sum(b.isupper() for _, b in lower) / len(lower) == pytest.approx(noise.probability, abs=0.05)


@given(st.binary(max_size=40), st.sampled_from(TABLE), st.integers(0, 3))
def test_any_bytes(data, noise, seed):
    spoiled = spoil(data, noise, seed)
    assert spoiled == spoil(data, noise, seed)
    if noise.name == "repeat":
        assert set(spoiled) <= set(data)  # of characters it does not hold: a broken one, repeated, may become whole
        assert len(spoiled) >= len(data)
    assert spoil(data, Noise("drop", 0.0), seed) == data
    assert spoil(data, Noise("drop", 1.0), seed) == b""


def test_seeds_differ():
    assert len({spoil(TEXT, Noise("drop", 0.3), seed) for seed in range(4)}) == 4
