"""Learning from a genome alone: the language-model side of core/train.py.

    next     each base from those before it in its window; a window is BOS and its bases
    masked   BERT's: of the bases that are chosen (15 %) 80 % become [MASK], 10 % any base at random, 10 % stay; each is
             to be told from all of its window

Windows are cut from the stretches of the train part, in each epoch at other places. What is no target: N and other
ambiguity codes, which the model sees as N; padding. Lower-case (soft-masked: repeats) targets may count for less.

Length warm-up (the Mamba paper, section E.3.3): windows begin short and double from epoch to epoch; a batch has as many
tokens throughout. L window length, B windows in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.batching import pad_right, shuffled_batches
from ..core.config import TrainConfig
from ..core.parallel import padded_length, padded_piece
from ..core.task import Task
from ..core.terminal import progress_bar
from .alphabet import BOS, MASK, PAD, VOCAB_SIZE, A, T, reverse_complement
from .config import Objective
from .evaluation import Reader, base_nats, score_windows
from .n_runs import NRuns
from .parts import Stretch
from .reading.genome import Genome
from .tokenizers import Tokenizer, is_asked

KEPT, REPLACED = 0.1, 0.1  # of the chosen bases: those that stay, and those that become any base; the rest is [MASK]


class Batch(NamedTuple):
    """What a model is given, and what it should say."""

    inputs: Tensor  # int64 (B, L), PAD on the right
    targets: Tensor  # int64 (B, L): the base that is to be told at each place
    weights: Tensor  # float32 (B, L): what it counts for; 0 where nothing is asked
    padding_mask: Tensor | None  # bool (B, L), True = real; None if all are


class Windows(NamedTuple):
    """Where to cut a genome."""

    stretches: Sequence[Stretch]
    n_runs: Sequence[NRuns]  # of each stretch
    max_n: float  # windows of which a larger share is N are left out


def cut_stretches(where: Windows, length: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
    """Windows of `length` bases, int64 (n, 3): stretch, start (of the contig), size; and how many are mostly N.

    Stretches that are shorter are a window each. With an rng the first window begins at a random place and what is left
    at either end of a stretch is left out; without, windows begin at a stretch's start and its last one is shorter.
    """
    windows, n_dropped = [], 0
    for i, (stretch, runs) in enumerate(zip(where.stretches, where.n_runs, strict=True)):
        if stretch.n_bases <= length:
            starts = np.array([stretch.start])
        elif rng is None:
            starts = np.arange(stretch.start, stretch.end, length)
        else:
            first = stretch.start + int(rng.integers(min(length, stretch.n_bases - length + 1)))
            starts = np.arange(first, stretch.end - length + 1, length)
        ends = np.minimum(starts + length, stretch.end)
        kept = runs.count(starts, ends) <= where.max_n * (ends - starts)
        n_dropped += int(np.sum(~kept))
        windows.append(np.column_stack((np.full_like(starts, i), starts, ends - starts))[kept])
    return np.concatenate([*windows, np.empty((0, 3), np.int64)]), n_dropped


def plan_windows(
    where: Windows, length: int, tokens: int, n_batches: int | None, seed: int, epoch: int
) -> list[np.ndarray]:
    """Windows of an epoch in batches of at most so many bases, each int64 (B, 3) as `cut_stretches` gives them.

    n_batches   so many batches' windows, drawn from all of them; None: all
    """
    rng = np.random.default_rng((seed, epoch))
    windows, _ = cut_stretches(where, length, rng)
    if n_batches is not None:
        windows = windows[rng.permutation(len(windows))[: n_batches * (tokens // length)]]
    return [windows[batch] for batch in shuffled_batches(windows[:, 2], tokens // length, tokens, seed, epoch)]


def spread(windows: np.ndarray, n_bases: int) -> np.ndarray:
    """Windows (n, 3) that hold no more than about n_bases together, taken evenly from all; one at least."""
    n = int(np.searchsorted(np.cumsum(windows[:, 2]), n_bases, side="right"))
    if n >= len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, max(n, 1)).round().astype(np.int64)]


class TrainGenome(Task):
    """Pretraining; judged by bits per base of the validation windows."""

    cuts = True

    def __init__(
        self,
        genome: Genome,
        train: Windows,
        valid: Windows,
        config: TrainConfig,
        seed: int,
        *,
        objective: Objective,
        tokenizer: Tokenizer,
        length: int,
        first_length: int,
        steps_per_epoch: int | None,
        mask_rate: float,
        lower_case_weight: float,
        rc_augment: bool,
        valid_bases: int,
    ):
        """first_length   of the windows in the first epoch; half of `length`, a quarter, ... or `length` itself"""
        self.genome, self.where, self.config, self.seed = genome, train, config, seed
        self.objective: Objective = objective
        self.same_kernels = objective == "next"  # what masks there are decides how a masked model runs
        self.tokenizer = tokenizer
        self.length, self.first_length, self.steps_per_epoch = length, first_length, steps_per_epoch
        self.mask_rate, self.lower_case_weight, self.rc_augment = mask_rate, lower_case_weight, rc_augment
        self.valid, self.valid_windows = valid, spread(cut_stretches(valid, length, None)[0], valid_bases)
        # One window is a batch at least, so windows of more than max_tokens make larger batches.
        self.tokens = max(min(config.batch_size * length, config.max_tokens), length)

    def length_in(self, epoch: int) -> int:
        """Of the windows in this epoch."""
        return min(self.first_length << min(epoch, 62), self.length)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch, int64 (B, 3), as `cut_stretches` gives them."""
        n_batches = None if self.steps_per_epoch is None else self.steps_per_epoch * self.config.accumulation
        return plan_windows(self.where, self.length_in(epoch), self.tokens, n_batches, self.seed, epoch)

    def batch(self, description: np.ndarray, epoch: int) -> Batch:
        # Seeded by what the batch is, so that a resumed run draws the same strands and masks.
        rng = np.random.default_rng((self.seed, epoch, *description[:, :2].ravel()))
        examples = []
        for i, start, size in description.tolist():
            tokens, lower = self.genome.tokens(self.where.stretches[i].contig, start, start + size)
            if self.rc_augment and rng.random() < 0.5:
                tokens, lower = reverse_complement(tokens), lower[::-1]
            ids, sizes = self.tokenizer.encode(tokens)
            of_base = np.where(lower, self.lower_case_weight, 1.0)
            weights = np.add.reduceat(of_base, np.cumsum(sizes) - sizes) / sizes * is_asked(ids)
            if self.objective == "next":
                examples.append((after_bos(ids), ids, weights))
            else:
                examples.append(masked_example(ids, weights, self.mask_rate, self.tokenizer.vocab_size, rng))
        return batch_of(examples)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        inputs, targets, weights, mask = batch
        length = inputs.shape[1]
        if self.objective == "next":
            mask = None  # what is padded on the right is nothing to a causal model
        elif mask is None and padded_length(length) > length:
            mask = torch.ones_like(inputs, dtype=torch.bool)
        nats = base_nats(
            model,
            padded_piece(inputs, PAD),
            padded_piece(targets, PAD),
            None if mask is None else padded_piece(mask, False),
        )
        return (nats * padded_piece(weights, 0)).sum() / weights.sum().clamp(min=1e-6)

    def evaluate(self, model: Any) -> dict[str, float]:
        n_bases = int(self.valid_windows[:, 2].sum())
        with progress_bar("validation", n_bases, "bases") as advance:
            windows = [(self.valid.stretches[i].contig, start, size) for i, start, size in self.valid_windows.tolist()]
            reader = Reader(model, self.tokenizer, self.objective)
            found = score_windows(reader, self.genome, windows, self.tokens, advance=advance)
        return {"valid_bits_per_base": found.bits_per_base}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_bits_per_base"]


def after_bos(ids: np.ndarray) -> np.ndarray:
    """What a causal model reads to tell each of the tokens (M,): BOS and all but the last."""
    return np.concatenate((np.array([BOS], ids.dtype), ids[:-1]))


def masked_example(
    ids: np.ndarray, weights: np.ndarray, mask_rate: float, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and weights (M,) of a window in which some of the tokens are to be told."""
    chosen = (rng.random(len(ids)) < mask_rate) & is_asked(ids)
    fate = rng.random(len(ids))
    low, high = (A, T + 1) if vocab_size == VOCAB_SIZE else (VOCAB_SIZE, vocab_size)  # bases, or longer tokens
    others = rng.integers(low, high, len(ids)).astype(ids.dtype)
    inputs = np.where(chosen & (fate >= KEPT), np.where(fate < KEPT + REPLACED, others, ids.dtype.type(MASK)), ids)
    return inputs, ids, weights * chosen


def batch_of(examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    """Inputs, targets and weights of each window, (L,), padded on the right to one length."""
    inputs, targets, weights = zip(*examples, strict=True)
    padded_inputs, mask = pad_right(list(inputs), PAD)
    padded_weights = torch.zeros(mask.shape)
    for row, values in zip(padded_weights, weights, strict=True):
        row[: len(values)] = torch.from_numpy(values.astype(np.float32))
    return Batch(padded_inputs, pad_right(list(targets), PAD)[0], padded_weights, None if mask.all() else mask)
