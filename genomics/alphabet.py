"""DNA letters and token ids, the vocabulary of HyenaDNA and Caduceus: 7 special tokens, then A C G T N.

What becomes of each letter of a sequence (the policy is the same for every reader and every model):
    A C G T N          their token, in either case: soft-masking (lower case) is invisible to the model, unless the
                       user asks for `hard_masked`, which makes lower-case letters N
    U                  T
    R Y S W K M B D H V   N: an IUPAC code says "one of several bases"
    anything else      an error: gaps, `*`, digits, blanks and protein letters are never skipped or guessed

Token arrays are uint8, one id a base; L is the length of a sequence.
"""

from __future__ import annotations

import numpy as np

from .config import TOKEN_NAMES

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, A, C, G, T, N = range(len(TOKEN_NAMES))
VOCAB_SIZE = len(TOKEN_NAMES)

# COMPLEMENT[id] is the id of the paired base; specials and N stay. For torch: torch.tensor(COMPLEMENT)[ids.long()].
COMPLEMENT = (CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, T, G, C, A, N)

AMBIGUITY_CODES = "RYSWKMBDHV"
_ILLEGAL = 0xFF
_COMPLEMENT_ARRAY = np.array(COMPLEMENT, dtype=np.uint8)


def _byte_table() -> bytes:
    """256 entries: the token id of each byte of a sequence, or _ILLEGAL."""
    table = bytearray([_ILLEGAL]) * 256
    letters = {"A": A, "C": C, "G": G, "T": T, "U": T, "N": N} | dict.fromkeys(AMBIGUITY_CODES, N)
    for letter, token in letters.items():
        table[ord(letter)] = table[ord(letter.lower())] = token
    return bytes(table)


_TOKEN_OF_BYTE = _byte_table()


class LetterError(ValueError):
    """A sequence holds a character that is no DNA letter; `position` counts from 1."""

    def __init__(self, character: str, position: int):
        super().__init__(
            f"{character!r} at position {position} is no DNA letter; allowed are A C G T U N "
            f"and the IUPAC codes {' '.join(AMBIGUITY_CODES)}, in either case"
        )
        self.position = position


def tokenize(sequence: str | bytes) -> np.ndarray:
    """Letters -> token ids, uint8 (L,), read-only. Raises LetterError (a ValueError) at the first illegal character."""
    # Any non-ASCII character becomes one "?", which is illegal too and keeps the positions of the others.
    raw = sequence.encode("ascii", errors="replace") if isinstance(sequence, str) else bytes(sequence)
    ids = raw.translate(_TOKEN_OF_BYTE)
    if (at := ids.find(_ILLEGAL)) >= 0:
        raise LetterError(sequence[at] if isinstance(sequence, str) else chr(raw[at]), at + 1)
    return np.frombuffer(ids, dtype=np.uint8)


def hard_masked(ids: np.ndarray, sequence: str) -> np.ndarray:
    """The tokens (L,) of `sequence` with N at its lower-case (soft-masked) letters."""
    is_lower = np.frombuffer(sequence.encode("ascii"), dtype=np.uint8) >= ord("a")
    return np.where(is_lower, np.uint8(N), ids)


def decode(ids: np.ndarray) -> str:
    """Token ids (L,) -> text: upper-case letters, and special tokens by name, as in `[MASK]`."""
    return "".join([TOKEN_NAMES[i] for i in np.asarray(ids).tolist()])


def complement(ids: np.ndarray) -> np.ndarray:
    """The paired base of each token, uint8, of the shape of `ids`."""
    return _COMPLEMENT_ARRAY[ids]


def reverse_complement(ids: np.ndarray) -> np.ndarray:
    """The other strand read in its own direction: complement, with the last axis (L) reversed; contiguous."""
    return _COMPLEMENT_ARRAY[np.asarray(ids)[..., ::-1]]
