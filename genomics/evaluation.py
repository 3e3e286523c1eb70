"""How well a language model predicts DNA: bits per base, -log2 of the probability that it gives the base that is there.

causal    Each base from those before it. Along a whole sequence the state is carried from piece to piece, so that the
          size of a piece changes memory and speed, but not the result.
masked    Each base from both sides, while it is hidden: of every STRIDE-th base, [MASK] takes the place, as many as in
          training (14 %), and STRIDE passes hide each base once. (Unhidden, the model would read the base itself.) A
          long sequence is cut into windows that overlap; a base's figure is that of the window in which it stands most
          central.

N and other ambiguity codes are read as N, and are not scored. Probabilities are the model's own over all its tokens.
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
from .alphabet import BOS, MASK, PAD, A, T
from .config import Objective
from .reading.genome import Genome

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
    logits = model(inputs) if padding_mask is None else model(inputs, padding_mask=padding_mask)
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


@torch.no_grad()
def score_windows(
    model: Any,
    genome: Genome,
    windows: Sequence[tuple[int, int, int]],
    objective: Objective,
    max_tokens: int,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> Score:
    """Bits of windows (contig, start, size), each by itself; of a masked model every STRIDE-th base of a window alone.

    Windows stand in batches of at most max_tokens tokens (or one), by their order. `advance` is told of the bases done.
    """
    device = next(model.parameters()).device
    total = Score(0, 0.0)
    longest = max((size for _, _, size in windows), default=1)
    for number, batch in enumerate(_grouped(windows, max(1, max_tokens // longest))):
        sequences = [genome.tokens(contig, start, start + size)[0] for contig, start, size in batch]
        targets, mask = pad_right(sequences, PAD)
        asked = (targets >= A) & (targets <= T)
        if objective == "next":
            inputs, options = F.pad(targets[:, :-1], (1, 0), value=BOS), {}
        else:
            place = torch.arange(targets.shape[1]) + torch.arange(len(batch))[:, None] + number
            asked &= place % STRIDE == 0
            inputs, options = targets.masked_fill(asked, MASK), _unless_full(mask, device)
        nats = base_nats(model, inputs.to(device), targets.to(device), **options).cpu().double()
        total = total.plus(_finite((nats[asked] / math.log(2)).numpy()))
        advance(sum(map(len, sequences)))
    return total


@torch.no_grad()
def bits_in_context(
    model: Any,
    genome: Genome,
    places: Sequence[tuple[int, int]],
    n_target: int,
    context: int,
    objective: Objective,
    max_tokens: int,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> np.ndarray:
    """Bits float64 (places, n_target), nan for N, of the bases from each place (contig, start) on.

    A causal model is given BOS and the `context` bases before them; a masked one half of these and as many after them.
    """
    device = next(model.parameters()).device
    before = context if objective == "next" else context // 2
    size = n_target + context
    found = []
    for batch in _grouped(places, max(1, max_tokens // size)):
        sequences = [genome.tokens(contig, at - before, at - before + size)[0] for contig, at in batch]
        if objective == "masked":
            each = _hidden_bits(model, sequences, [at - before for _, at in batch], device)
            found += [bits[before : before + n_target] for bits in each]
        else:
            tokens = pad_right(sequences, PAD)[0].to(device)
            logits = model(F.pad(tokens[:, :-1], (1, 0), value=BOS))[:, before:]
            nats = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, before:], reduction="none")
            bits = nats.cpu().double().numpy() / math.log(2)
            found += [_of_bases(row, whole[before:]) for row, whole in zip(bits, sequences, strict=True)]
        advance(size * len(batch))
    return np.stack(found)


@torch.no_grad()
def causal_bits(
    model: Any, pieces: Iterator[tuple[int, np.ndarray]], state: Any = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, tokens) of pieces of a sequence, one after another -> (start, bits float64 (n,)), nan for N.

    Each base from all before it, by the carried state; before the first one stands BOS.
    """
    device = next(model.parameters()).device
    last = BOS
    for start, tokens in pieces:
        targets = torch.from_numpy(tokens.astype(np.int64)).to(device)
        inputs = F.pad(targets[:-1], (1, 0), value=last)
        logits, state = model(inputs[None], state, return_state=True)
        nats = F.cross_entropy(logits[0].float(), targets, reduction="none").cpu().double().numpy()
        last = int(tokens[-1])
        yield start, _of_bases(nats / math.log(2), tokens)


@torch.no_grad()
def masked_bits(
    model: Any, genome: Genome, contig: int, start: int, end: int, *, window: int, overlap: int, max_tokens: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, bits float64 (n,)) of consecutive pieces of bases start .. end - 1 of a contig, nan for N.

    The windows' inner parts, window - overlap bases long, lie side by side; half of the overlap stands on either side.
    A base's bits do not depend on where it stands in a batch. Raises ValueError unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap is {overlap}; it must be at least 0 and less than the window, which is {window}")
    device = next(model.parameters()).device
    inner, margin = window - overlap, overlap // 2
    parts = ((left, min(left + inner, end)) for left in range(start, end, inner))
    for group in _grouped(parts, max(1, max_tokens // window)):
        ends = [min(end, right + overlap - margin) for _, right in group]
        starts = [max(start, left - margin) for left, _ in group]
        sequences = [genome.tokens(contig, first, last)[0] for first, last in zip(starts, ends, strict=True)]
        for (left, right), first, bits in zip(
            group, starts, _hidden_bits(model, sequences, starts, device), strict=True
        ):
            yield left, bits[left - first : right - first]


def _hidden_bits(
    model: Any, sequences: Sequence[np.ndarray], starts: Sequence[int], device: torch.device
) -> list[np.ndarray]:
    """Bits float64 (L,) of every base of some windows, each base hidden in one of STRIDE passes; nan for N.

    starts  of the windows: which bases are hidden together follows from their places in the genome
    """
    targets, mask = pad_right(list(sequences), PAD)
    targets = targets.to(device)
    place = torch.arange(targets.shape[1]) + torch.tensor(starts)[:, None]
    bits = np.empty(targets.shape)
    for k in range(STRIDE):
        hidden = ((place % STRIDE == k) & mask).to(device)
        inputs = targets.masked_fill(hidden & (targets >= A) & (targets <= T), MASK)
        nats = base_nats(model, inputs, targets, **_unless_full(mask, device)).cpu().double().numpy()
        bits = np.where(hidden.cpu().numpy(), nats / math.log(2), bits)
    return [_of_bases(row[: len(tokens)], tokens) for row, tokens in zip(bits, sequences, strict=True)]


def _unless_full(mask: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The option that says which tokens are real, where not all are."""
    return {} if bool(mask.all()) else {"padding_mask": mask.to(device)}


def _of_bases(bits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The same with nan where no base is known."""
    known = (tokens >= A) & (tokens <= T)
    _finite(bits[known])
    return np.where(known, bits, np.nan)


def _finite(bits: np.ndarray) -> np.ndarray:
    if not np.isfinite(bits).all():
        raise InputError("the model's predictions are not finite; check its weights")
    return bits


def _grouped(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of n items, the last one perhaps of fewer."""
    items = iter(items)
    while group := list(islice(items, n)):
        yield group
