"""How well a model predicts documents: bits per byte, and what to compare it with.

Each byte is predicted from all bytes before it in its document: the state is carried from piece to piece, so that the
size of a piece changes memory and speed, but not the result. What the model spends on ends of documents is not counted.
"""

import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import processes
from ..core.causality import require_causal
from ..core.errors import InputError
from .config import DOCUMENT, N_BYTES
from .documents import Documents
from .model import ByteLM

CHUNK = 8192  # ids in one forward
N_OCTAVES = 63  # positions in a document: 1, 2-3, 4-7, 8-15, ...

IS_SPACE = np.array([chr(i).isspace() and i < 128 for i in range(256)] + [True])  # what parts words; DOCUMENT, too


@dataclass(frozen=True, eq=False)
class Score:
    """What predicting some documents cost."""

    n_documents: int
    n_bytes: int
    n_words: int  # runs of bytes between white space, as `wc -w` counts
    bits: float
    bits_in_octave: np.ndarray  # float64 (N_OCTAVES,): of the bytes 2^k to 2^(k+1)-1 of their documents, from 1
    bytes_in_octave: np.ndarray  # int64 (N_OCTAVES,)

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.n_bytes

    @property
    def word_perplexity(self) -> float:
        return perplexity(self.bits, self.n_words)

    def by_position(self) -> list[dict[str, float]]:
        """JSON-safe: for each octave of positions its first byte (from 1), how many bytes, and their bits per byte."""
        return [
            {"from": 2**k, "bytes": int(n), "bits_per_byte": float(bits / n)}
            for k, (n, bits) in enumerate(zip(self.bytes_in_octave, self.bits_in_octave, strict=True))
            if n
        ]


def perplexity(bits: float, n_words: int) -> float:
    """Of so many words that cost so many bits together; inf if there are none, or where it is too large a number."""
    nats = bits * math.log(2) / n_words if n_words else math.inf
    return math.exp(nats) if nats < 700 else math.inf


def score(
    model: ByteLM, documents: Documents, *, chunk: int = CHUNK, advance: Callable[[int], object] = lambda n: None
) -> Score:
    """Predict every byte of `documents`, on the model's device. `advance` is told of the bytes done.

    Several processes, all of which call it, share the documents.
    """
    n, ends = processes.count(), documents.marks[1:]
    bounds = [int(np.searchsorted(ends, documents.n_tokens * i // n)) for i in range(n)] + [len(documents)]
    shares = [Documents(documents.documents[a:b]) for a, b in pairwise(bounds)]
    found = processes.each_once(shares, lambda share: _sums(model, share, chunk, advance))
    n_words, in_octave = sum(words for words, _ in found), np.sum([sums for _, sums in found], axis=0)
    total = float(in_octave[0].sum())
    if not math.isfinite(total):
        raise InputError("the model's predictions are not finite; check its weights")
    return Score(len(documents), documents.n_bytes, n_words, total, in_octave[0], in_octave[1].astype(np.int64))


def _sums(model: ByteLM, documents: Documents, chunk: int, advance: Callable[[int], object]) -> tuple[int, np.ndarray]:
    """Words; and of each octave of positions bits and bytes, float64 (2, N_OCTAVES)."""
    n_words, in_octave = 0, np.zeros((2, N_OCTAVES))
    for start, ids, bits in _bits(model, documents, chunk):
        is_byte = ids[1:] != DOCUMENT
        positions = np.arange(start + 1, start + len(ids))[is_byte]
        mark = documents.marks[np.searchsorted(documents.marks, positions, side="right") - 1]
        octave = np.frexp(positions - mark)[1] - 1  # floor(log2) without rounding
        in_octave += [np.bincount(octave, weights, N_OCTAVES) for weights in (bits[is_byte], None)]
        n_words += int(np.sum(IS_SPACE[ids[:-1]] & ~IS_SPACE[ids[1:]]))
        advance(len(positions))
        processes.moved()
    return n_words, in_octave


@torch.no_grad()
def _bits(model: ByteLM, documents: Documents, chunk: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(position, ids (n + 1,) from there, bits (n,) float64 of ids[1:]) of pieces of at most `chunk` predictions."""
    device = next(model.parameters()).device
    state = None
    for start in range(0, documents.n_tokens - 1, chunk):
        ids = documents.read(start, min(start + chunk + 1, documents.n_tokens))
        tokens = torch.from_numpy(ids).to(device)
        logits, state = _read_on(model, tokens[:-1], state)
        bits = F.cross_entropy(logits.float(), tokens[1:], reduction="none") / math.log(2)
        yield start, ids, bits.cpu().double().numpy()


def _read_on(model: ByteLM, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Logits (L, V) of tokens (L,) and the state after them; the documents that begin among them begin afresh.

    Of documents that end among them no state is asked for: attention's grows with their number times the longest.
    """
    begins, logits = torch.nonzero(tokens == DOCUMENT).flatten().tolist(), []
    if begins:
        first, last = begins[0], begins[-1]
        if first > 0:
            logits.append(model(tokens[None, :first], state)[0])
        if last > first:
            cu_seqlens = torch.tensor(begins, dtype=torch.int32, device=tokens.device) - first
            logits.append(model(tokens[None, first:last], cu_seqlens=cu_seqlens)[0])
        tokens, state = tokens[last:], None
    of_last, state = model(tokens[None], state, return_state=True)
    return torch.cat([*logits, of_last[0]]), state


def check_causality(model: ByteLM, length: int = 96) -> None:
    """Raises InputError if the model sees the future, or predicts no numbers: see core/causality.py."""

    def of_bytes(ids: Tensor) -> Tensor:
        return model(ids)[..., :N_BYTES]  # a document's end may be impossible

    device = next(model.parameters()).device
    require_causal(of_bytes, device, n_values=N_BYTES, length=length, unit="byte", tolerance=1e-5)


def order0_bits_per_byte(documents: Documents) -> float:
    """Entropy of the bytes' frequencies in these very documents: what knowing no context costs."""
    counts = np.zeros(256, dtype=np.int64)
    for document in documents.documents:
        for block in document.blocks():
            counts += np.bincount(block, minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log2(shares)))


def xz_bits_per_byte(documents: Documents, *, advance: Callable[[int], object] = lambda n: None) -> float:
    """Size that `xz -9` makes of the documents, end to end."""
    compressor, n_compressed = lzma.LZMACompressor(preset=9), 0
    for document in documents.documents:
        for block in document.blocks():
            n_compressed += len(compressor.compress(block.data))
            advance(len(block))
    return 8 * (n_compressed + len(compressor.flush())) / documents.n_bytes
