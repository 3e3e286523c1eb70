"""Batches of sequences of unlike lengths, a pure function of (lengths, seed, epoch): resuming needs no other state."""

import numpy as np
import torch
from torch import Tensor

BUCKET = 50  # batches' worth of sequences that are sorted by length together: enough to pad little, few enough to mix
CPU_TOKENS = 65_536  # in a batch: more take twice the time on a CPU, whose caches and memory pages they outgrow


def shuffled_batches(lengths: np.ndarray, batch_size: int, max_tokens: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Indices of each batch of an epoch; sequences of like length together, batches in random order.

    A batch holds at most batch_size sequences, and at most max_tokens tokens with its padding (one sequence at least).
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches = []
    for bucket in np.array_split(order, np.arange(BUCKET * batch_size, len(order), BUCKET * batch_size)):
        batches += _cut(bucket[np.argsort(lengths[bucket], kind="stable")], lengths, batch_size, max_tokens)
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, batch_size: int, max_tokens: int) -> list[np.ndarray]:
    """Indices of each batch for evaluation: every sequence once, the least padding."""
    return _cut(np.argsort(lengths, kind="stable"), lengths, batch_size, max_tokens)


def _cut(order: np.ndarray, lengths: np.ndarray, batch_size: int, max_tokens: int) -> list[np.ndarray]:
    """Cut indices that are sorted by length into batches."""
    batches, start = [], 0
    for i, index in enumerate(order):
        if i > start and (i - start == batch_size or (i - start + 1) * lengths[index] > max_tokens):
            batches.append(order[start:i])
            start = i
    if start < len(order):
        batches.append(order[start:])
    return batches


def windows_of_each(
    lengths: np.ndarray, longest: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sequence, start, stop) of windows, int64 (n,) each: together every sequence, end to end, each window of one.

    lengths int64 (S,), 1 or more. All windows but a sequence's first and last are `longest` long; the first of what is
    longer than that is of a random length, so that an epoch cuts at other places than the one before.
    """
    first = np.where(lengths <= longest, lengths, rng.integers(1, longest + 1, len(lengths)))
    n_windows = 1 - (first - lengths) // longest  # rounded up
    of = np.repeat(np.arange(len(lengths)), n_windows)
    number = np.arange(len(of)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    starts = np.where(number == 0, 0, first[of] + (number - 1) * longest)
    return of, starts, np.minimum(first[of] + number * longest, lengths[of])


def pad_right(sequences: list[np.ndarray], value: int) -> tuple[Tensor, Tensor]:
    """int64 (B, L) padded on the right with `value`, and the mask (B, L) of real tokens."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.full((len(sequences), int(lengths.max())), value, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def at_places(y: Tensor, places: Tensor) -> Tensor:
    """One step of each row: y (B, L, D), places int64 (B,) -> (B, D)."""
    return y[torch.arange(len(y), device=y.device), places]
