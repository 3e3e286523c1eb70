"""Spoiled text, to see how a model bears it: the noises of MambaByte (arXiv 2401.13660, table 6).

    drop       a character is left out                          repeat      a character comes twice
    swap       a character changes places with the next one     uppercase   a character is capitalised
    randomcase every character's case is drawn anew             antspeak    all capitals, a space after each character

The first four befall each character with a given probability, alone of its neighbours' (a swapped pair is left alone).
Characters are those of UTF-8; bytes that are none count as a character each, and pass unchanged in value.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Chance = np.ndarray  # bool (characters,): which ones are befallen


class Noise(NamedTuple):
    """A noise at a strength."""

    name: str
    probability: float  # for each character

    def __str__(self) -> str:
        return f"{self.name} {self.probability:g}"


def drop(text: str, chance: Chance) -> str:
    return "".join([c for c, befallen in zip(text, chance, strict=True) if not befallen])


def repeat(text: str, chance: Chance) -> str:
    return "".join([c + c if befallen else c for c, befallen in zip(text, chance, strict=True)])


def swap(text: str, chance: Chance) -> str:
    characters, i = list(text), 0
    while i < len(characters) - 1:
        if chance[i]:
            characters[i], characters[i + 1] = characters[i + 1], characters[i]
            i += 1
        i += 1
    return "".join(characters)


def uppercase(text: str, chance: Chance) -> str:
    return "".join([c.upper() if befallen else c for c, befallen in zip(text, chance, strict=True)])


def randomcase(text: str, chance: Chance) -> str:
    return "".join([c.upper() if befallen else c.lower() for c, befallen in zip(text, chance, strict=True)])


def antspeak(text: str, chance: Chance) -> str:
    return "".join([f"{c.upper()} " for c in text])


NOISES: dict[str, Callable[[str, Chance], str]] = {
    noise.__name__: noise for noise in (drop, repeat, swap, uppercase, randomcase, antspeak)
}
TABLE = [
    *(Noise(name, probability) for name in ("drop", "repeat", "swap", "uppercase") for probability in (0.05, 0.3)),
    Noise("randomcase", 0.5),
    Noise("antspeak", 1.0),
]


def spoil(data: bytes, noise: Noise, seed: int) -> bytes:
    """A document under a noise; the same one for the same arguments."""
    text = data.decode("utf-8", "surrogateescape")
    chance = np.random.default_rng((seed, len(text))).random(len(text)) < noise.probability
    return NOISES[noise.name](text, chance).encode("utf-8", "surrogateescape")
