"""How well a language model predicts DNA: bits per base, -log2 of the probability that it gives the base that is there.

causal    Each base from those before it. Along a whole sequence the state is carried from piece to piece, so that the
          size of a piece changes memory and speed, but not the result.
masked    Each base from both sides, while it is hidden: of every STRIDE-th base, [MASK] takes the place, as many as in
          training (14 %), and STRIDE passes hide each base once. (Unhidden, the model would read the base itself.) A
          long sequence is cut into windows that overlap; a base's figure is that of the window in which it stands most
          central.

N and other ambiguity codes are read as N, and are not scored. Probabilities are the model's own over all its tokens.
Of a model of longer tokens "base" is to be read as "token" above; a token's bits are spread evenly over its bases, and
pieces of a sequence are cut into tokens one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right
from ..core.errors import InputError
from ..core.processes import each_once
from .alphabet import BOS, MASK, PAD
from .config import Objective
from .reading.genome import Genome
from .tokenizers import Tokenizer, is_asked, per_base

Item = TypeVar("Item")
STRIDE = 7  # prime: a codon's three places are hidden in turn
CHUNK = 65_536  # bases in one forward along a sequence


class Score(NamedTuple):
    """What some bases cost."""

    n_bases: int  # scored ones: A, C, G, T
    bits: float

    @property
    def bits_per_base(self) -> float:
        return self.bits / self.n_bases if self.n_bases else math.nan

    @property
    def perplexity(self) -> float:
        return 2**self.bits_per_base

    @property
    def log_likelihood(self) -> float:
        """In nats."""
        return -self.bits * math.log(2)

    def plus(self, bits: np.ndarray) -> Score:
        """With these bases, nan for those that are not scored."""
        known = bits[~np.isnan(bits)]
        return Score(self.n_bases + len(known), self.bits + float(known.sum()))


def base_nats(model: Any, inputs: Tensor, targets: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """-ln of the probability of each target, float32 (B, L), by one forward over inputs int64 (B, L).

    padding_mask  bool (B, L), True = real; of a causal model not needed for what is padded on the right
    """
    return _nats(model(inputs) if padding_mask is None else model(inputs, padding_mask=padding_mask), targets)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


class Reader(NamedTuple):
    """A language model and how it reads."""

    model: Any
    tokenizer: Tokenizer
    objective: Objective

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@torch.no_grad()
def score_windows(
    reader: Reader,
    genome: Genome,
    windows: Sequence[tuple[int, int, int]],
    max_tokens: int,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> Score:
    """Bits of windows (contig, start, size), each by itself; of a masked model every STRIDE-th token of a window alone.

    Windows stand in batches of at most max_tokens bases (or one), by their order. `advance` is told of the bases done.
    Several processes, all of which call this, share the batches.
    """
    longest = max((size for _, _, size in windows), default=1)

    def run(numbered: tuple[int, list[tuple[int, int, int]]]) -> Score:
        number, batch = numbered
        sequences = [genome.tokens(contig, start, start + size)[0] for contig, start, size in batch]
        tokens = _Tokens(reader.tokenizer, sequences)
        if reader.objective == "next":
            bits = tokens.causal_bits(reader)
        else:
            place = torch.arange(tokens.ids.shape[1]) + torch.arange(len(batch))[:, None] + number
            bits = tokens.hidden_bits(reader, place % STRIDE == 0)
        total = Score(0, 0.0)
        for of_window in bits:
            total = total.plus(of_window)
        advance(sum(map(len, sequences)))
        return total

    found = each_once(list(enumerate(_grouped(windows, max(1, max_tokens // longest)))), run)
    return Score(sum(score.n_bases for score in found), sum(score.bits for score in found))


@torch.no_grad()
def bits_in_context(
    reader: Reader,
    genome: Genome,
    places: Sequence[tuple[int, int]],
    n_target: int,
    context: int,
    max_tokens: int,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> np.ndarray:
    """Bits float64 (places, n_target), nan for N, of the bases from each place (contig, start) on.

    A causal model is given BOS and the `context` bases before them; a masked one half of these and as many after them.
    """
    before = context if reader.objective == "next" else context // 2
    size = n_target + context
    found = []
    for batch in _grouped(places, max(1, max_tokens // size)):
        sequences = [genome.tokens(contig, at - before, at - before + size)[0] for contig, at in batch]
        tokens = _Tokens(reader.tokenizer, sequences)
        starts = [at - before for _, at in batch]
        bits = tokens.causal_bits(reader) if reader.objective == "next" else tokens.all_hidden_bits(reader, starts)
        found += [row[before : before + n_target] for row in bits]
        advance(size * len(batch))
    return np.stack(found)


@torch.no_grad()
def causal_bits(reader: Reader, pieces: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """(start, bases) of pieces of a sequence, one after another -> (start, bits float64 (n,)), nan for N.

    Each base from all before it, by the carried state; before the first one stands BOS.
    """
    state, last = None, BOS
    for start, bases in pieces:
        ids, sizes = reader.tokenizer.encode(bases)
        targets = torch.from_numpy(ids.astype(np.int64)).to(reader.device)
        logits, state = reader.model(F.pad(targets[:-1], (1, 0), value=last)[None], state, return_state=True)
        nats = F.cross_entropy(logits[0].float(), targets, reduction="none")
        last = int(ids[-1])
        yield start, per_base(_bits_where_asked(nats, ids), sizes)


@torch.no_grad()
def masked_bits(
    reader: Reader, genome: Genome, contig: int, start: int, end: int, *, window: int, overlap: int, max_tokens: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, bits float64 (n,)) of consecutive pieces of bases start .. end - 1 of a contig, nan for N.

    The windows' inner parts, window - overlap bases long, lie side by side; half of the overlap stands on either side.
    Which bases are hidden together follows from their places. Raises ValueError unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap is {overlap}; it must be at least 0 and less than the window, which is {window}")
    inner, margin = window - overlap, overlap // 2
    parts = ((left, min(left + inner, end)) for left in range(start, end, inner))
    for group in _grouped(parts, max(1, max_tokens // window)):
        starts = [max(start, left - margin) for left, _ in group]
        ends = [min(end, right + overlap - margin) for _, right in group]
        sequences = [genome.tokens(contig, first, last)[0] for first, last in zip(starts, ends, strict=True)]
        found = _Tokens(reader.tokenizer, sequences).all_hidden_bits(reader, starts)
        for (left, right), first, bits in zip(group, starts, found, strict=True):
            yield left, bits[left - first : right - first]


class _Tokens:
    """Sequences of a batch as tokens, padded on the right."""

    def __init__(self, tokenizer: Tokenizer, sequences: Sequence[np.ndarray]):
        self.each = [tokenizer.encode(bases) for bases in sequences]  # ids, sizes
        self.ids, self.mask = pad_right([ids for ids, _ in self.each], PAD)

    def causal_bits(self, reader: Reader) -> list[np.ndarray]:
        """Of each base of each sequence, nan for N. Long ones piece by piece: training may have cut them, too."""
        targets = self.ids.to(reader.device)
        inputs = F.pad(targets[:, :-1], (1, 0), value=BOS)
        if inputs.shape[1] <= CHUNK:
            return self._of_bases(base_nats(reader.model, inputs, targets))
        nats, state = [], None
        for x, y in zip(inputs.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
            logits, state = reader.model(x, state, return_state=True)
            nats.append(_nats(logits, y))
        return self._of_bases(torch.cat(nats, 1))

    def hidden_bits(self, reader: Reader, hidden: Tensor) -> list[np.ndarray]:
        """Those of the tokens that `hidden` (B, M) says, which are hidden together; nan for others."""
        hidden = hidden & self.mask & torch.from_numpy(is_asked(self.ids.numpy()))
        device = reader.device
        options = {} if self.mask.all() else {"padding_mask": self.mask.to(device)}
        nats = base_nats(reader.model, self.ids.masked_fill(hidden, MASK).to(device), self.ids.to(device), **options)
        return self._of_bases(nats.masked_fill(~hidden.to(device), torch.nan), hidden)

    def all_hidden_bits(self, reader: Reader, starts: Sequence[int]) -> list[np.ndarray]:
        """Of each base, each hidden in one of STRIDE passes; nan for N. starts: the sequences' places in the genome."""
        place = torch.arange(self.ids.shape[1]) + torch.tensor(starts)[:, None]
        passes = [self.hidden_bits(reader, place % STRIDE == k) for k in range(STRIDE)]
        return [np.where(np.isnan(rows).all(0), np.nan, np.nansum(rows, 0)) for rows in zip(*passes, strict=True)]

    def _of_bases(self, nats: Tensor, hidden: Tensor | None = None) -> list[np.ndarray]:
        return [
            per_base(_bits_where_asked(row[: len(ids)], ids, None if hidden is None else hidden[i, : len(ids)]), sizes)
            for i, (row, (ids, sizes)) in enumerate(zip(nats.cpu(), self.each, strict=True))
        ]


def _bits_where_asked(nats: Tensor, ids: np.ndarray, hidden: Tensor | None = None) -> np.ndarray:
    """float64 (M,), nan where nothing is asked. Raises InputError if a figure is not finite."""
    asked = is_asked(ids) if hidden is None else hidden.numpy()
    bits = nats.cpu().double().numpy() / math.log(2)
    if not np.isfinite(bits[asked]).all():
        raise InputError("the model's predictions are not finite; check its weights")
    return np.where(asked, bits, np.nan)


def _grouped(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of n items, the last one perhaps of fewer."""
    items = iter(items)
    while group := list(islice(items, n)):
        yield group
