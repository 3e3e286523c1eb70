"""From bases to the tokens of a language model, and back, without loss: characters, k-mers, byte-pair encoding.

    char    a token a base: the ids of alphabet.py
    kmer    k bases a token, side by side from the sequence's first one on
    bpe     stretches that occur often (Sennrich et al. 2016; of DNA: DNABERT-2), learned from a genome: needs the extra
            package `tokenizers`

Ids 0 to 11 are those of alphabet.py throughout; what a longer token cannot hold (N, the last bases) is spelled by them.
How a sequence is cut depends on where it begins, and its probability is that of this one cut: bits per base by longer
tokens are an upper bound. L bases, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.errors import InputError
from ..core.files import write_text
from .alphabet import VOCAB_SIZE, A, N, T, decode
from .config import DNALanguageModelConfig

BPE_FILE = "tokenizer.json"
PIECE = 512  # bases that a byte-pair encoding sees at a time


class Tokenizer(Protocol):
    """Cuts base ids into tokens."""

    vocab_size: int

    def encode(self, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (L,) -> ids int64 or uint8 (M,), and of how many bases each is, int64 (M,)."""
        ...

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids (M,) -> uint8 (L,)."""
        ...


class Characters:
    """A token a base."""

    vocab_size = VOCAB_SIZE

    def encode(self, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return bases, np.ones(len(bases), dtype=np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(ids, dtype=np.uint8)


CHARACTERS = Characters()


class KMers:
    """k bases a token; k with an N among them, and the fewer that are left over at the end, are spelled."""

    def __init__(self, k: int):
        self.k, self.vocab_size = k, VOCAB_SIZE + 4**k
        self._powers = 4 ** np.arange(k - 1, -1, -1)

    def encode(self, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(bases) // self.k
        groups = bases[: n * self.k].reshape(n, self.k).astype(np.int64)
        whole = ((groups >= A) & (groups <= T)).all(1)
        ids = np.concatenate((VOCAB_SIZE + (groups - A) @ self._powers, bases[n * self.k :].astype(np.int64)))
        sizes = np.ones(len(ids), dtype=np.int64)
        sizes[:n] = self.k
        if whole.all():
            return ids, sizes
        spelled = np.repeat(~whole, self.k)  # of each base in a group
        first = np.zeros((n, self.k), dtype=bool)
        first[:, 0] = True
        of_base = np.where(spelled, groups.ravel(), np.repeat(ids[:n], self.k))
        size_of_base = np.where(spelled, 1, self.k)
        kept = spelled | first.ravel()
        return np.concatenate((of_base[kept], ids[n:])), np.concatenate((size_of_base[kept], sizes[n:]))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        letters = (ids[:, None] - VOCAB_SIZE) // self._powers % 4 + A
        is_long = ids >= VOCAB_SIZE
        letters = np.where(is_long[:, None], letters, ids[:, None])
        return letters[is_long[:, None] | (np.arange(self.k) == 0)].astype(np.uint8)


class BytePairs:
    """A byte-pair encoding of A, C, G and T; `description` is what the package `tokenizers` writes of it."""

    def __init__(self, description: str):
        self.description = description
        try:
            self._bpe: Any = _tokenizers().Tokenizer.from_str(description)
            words = self._bpe.get_vocab()
        except InputError:
            raise
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"not a tokenizer ({' '.join(str(error).split())})") from None
        if any(not word or set(word) - set("ACGT") for word in words):
            raise ValueError("a tokenizer of other letters than A, C, G and T")
        longer = sorted((id, word) for word, id in words.items() if len(word) > 1)
        self._words = ["", *[""] * (VOCAB_SIZE - 1), *(word for _, word in longer)]
        self.vocab_size = len(self._words)
        self._id_of = np.zeros(max(words.values()) + 1, dtype=np.int64)
        for word, id in words.items():
            if len(word) == 1:
                self._id_of[id] = A + "ACGT".index(word)
        for i, (id, _) in enumerate(longer):
            self._id_of[id] = VOCAB_SIZE + i
        self._sizes = np.array([len(word) or 1 for word in self._words])
        self._bases = [np.array([A + "ACGT".index(c) for c in word], dtype=np.uint8) for word in self._words]

    @classmethod
    def learned(cls, sequences: Iterable[np.ndarray], vocab_size: int) -> BytePairs:
        """From base ids (L,), of which N parts words; as many ids as that, or fewer if the sequences have no more."""
        package = _tokenizers()
        bpe = package.Tokenizer(package.models.BPE())
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size - VOCAB_SIZE + 4, initial_alphabet=list("ACGT"), show_progress=False
        )
        bpe.train_from_iterator((word for bases in sequences for word in _words(bases)[0]), trainer)
        return cls(bpe.to_str())

    def encode(self, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        words, places = _words(bases)
        ids: list[np.ndarray] = []
        at = 0
        for start, encoding in zip(places, self._bpe.encode_batch(words) if words else [], strict=True):
            ids.append(bases[at:start].astype(np.int64))  # N between two words
            ids.append(self._id_of[encoding.ids])
            at = start + int(self._sizes[ids[-1]].sum())
        ids.append(bases[at:].astype(np.int64))
        found = np.concatenate(ids)
        return found, self._sizes[found]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        pieces = [
            self._bases[i] if i >= VOCAB_SIZE else np.array([i], dtype=np.uint8) for i in np.asarray(ids).tolist()
        ]
        return np.concatenate([np.empty(0, dtype=np.uint8), *pieces])


def is_asked(ids: np.ndarray) -> np.ndarray:
    """Which tokens a model is asked for: bases and longer ones; no N, nothing special. bool, of the same shape."""
    return (ids >= A) & (ids != N)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """What a run folder needs beside config.json: of a byte-pair encoding a file."""
    if isinstance(tokenizer, BytePairs):
        write_text(folder / BPE_FILE, tokenizer.description)


def load_tokenizer(folder: Path, config: Any) -> Tokenizer:
    """That of the model in a run folder; what says no tokenizer in its config (Caduceus) reads characters."""
    if not isinstance(config, DNALanguageModelConfig) or config.tokenizer == "char":
        return CHARACTERS
    if config.tokenizer == "kmer":
        return KMers(config.k)
    path = folder / BPE_FILE
    try:
        return BytePairs(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the model's folder should hold it") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; get the model's folder again") from None


def per_base(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Values of tokens (M,), spread evenly over the bases of each: (L,)."""
    return np.repeat(values / sizes, sizes)


def _words(bases: np.ndarray) -> tuple[list[str], list[int]]:
    """What stands between two N, in pieces of at most PIECE bases, and where each begins."""
    is_n = np.concatenate(([True], bases == N, [True]))
    edges = np.flatnonzero(np.diff(is_n.astype(np.int8)))
    words, places = [], []
    for start, end in edges.reshape(-1, 2).tolist():
        for at in range(start, end, PIECE):
            words.append(decode(bases[at : min(at + PIECE, end)]))
            places.append(at)
    return words, places


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.trainers
    except ImportError:
        raise InputError("byte-pair encoding needs tokenizers (pip install 'polymamba[bpe]')") from None
    return tokenizers
