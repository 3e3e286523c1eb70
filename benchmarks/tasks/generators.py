"""Seeded generators of the papers' synthetic tasks, on any device: B sequences at a call, of one shape.

Every one returns a Batch: the tokens, the Q places of each sequence at which something is to be predicted, and what. A
place that a row does not have has the answer NONE. All draws come from the torch.Generator that is given, so a batch is
a function of its seed and device. ListOps, which is made of trees, is in listops.py.
Letters: B sequences, L length, Q answers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -100  # what cross_entropy ignores


class Batch(NamedTuple):
    tokens: Tensor  # int64 (B, L)
    places: Tensor  # int64 (B, Q)
    answers: Tensor  # int64 (B, Q)


def selective_copying(n: int, length: int, n_memorised: int, vocab_size: int, generator: torch.Generator) -> Batch:
    """Mamba, E.1: tokens at random places among noise, to be repeated in order at the end.

    Token 0 is noise, vocab_size - 1 the marker that stands in for each answer at the end; what is between is copied.
    """
    device, body = generator.device, length - n_memorised
    scores = torch.rand(n, body, generator=generator, device=device)
    at = scores.topk(n_memorised).indices.sort().values
    content = torch.randint(1, vocab_size - 1, (n, n_memorised), generator=generator, device=device)
    tokens = torch.zeros(n, length, dtype=torch.int64, device=device).scatter_(1, at, content)
    tokens[:, body:] = vocab_size - 1
    return Batch(tokens, torch.arange(body, length, device=device).expand(n, -1), content)


def induction_heads(n: int, length: int, vocab_size: int, generator: torch.Generator) -> Batch:
    """Mamba, E.1: random tokens, a trigger (vocab_size - 1) among them and one at the end: what followed the first?"""
    device = generator.device
    tokens = torch.randint(vocab_size - 1, (n, length), generator=generator, device=device)
    at = torch.randint(length - 2, (n, 1), generator=generator, device=device)
    tokens.scatter_(1, at, vocab_size - 1)
    tokens[:, -1] = vocab_size - 1
    return Batch(tokens, torch.full((n, 1), length - 1, device=device), tokens.gather(1, at + 1))


def associative_recall(
    n: int, length: int, pairs: tuple[int, ...], vocab_size: int, generator: torch.Generator
) -> Batch:
    """MQAR (Zoology): P pairs of a key and its value, then each key once more at a random place: its value?

    P is one of `pairs`, of each sequence its own; length is at least 3 P. Keys are of the lower half of the vocabulary,
    distinct; values of the upper half, and so is what fills the places between the queries.
    """
    device, half, most = generator.device, vocab_size // 2, max(pairs)
    choice = torch.randint(len(pairs), (n, 1), generator=generator, device=device)
    n_pairs = torch.tensor(pairs, device=device)[choice]
    keys = torch.rand(n, half, generator=generator, device=device).topk(most).indices
    values = torch.randint(half, vocab_size, (n, most), generator=generator, device=device)
    filler = torch.randint(half, vocab_size, (n, length), generator=generator, device=device)
    # Of each row P random places behind its pairs: those of the highest scores.
    scores = torch.rand(n, length, generator=generator, device=device)
    columns = torch.arange(length, device=device)
    places = scores.masked_fill(columns < 2 * n_pairs, -1).topk(most).indices
    there = torch.arange(most, device=device) < n_pairs
    shown = torch.stack((keys, values), -1).flatten(1)
    tokens = torch.cat((filler, filler[:, :1]), 1)  # the last column takes what a row has not
    tokens[:, : 2 * most] = torch.where(columns[: 2 * most] < 2 * n_pairs, shown, tokens[:, : 2 * most])
    tokens.scatter_(1, torch.where(there, places, length), keys)
    return Batch(tokens[:, :length].contiguous(), places, values.masked_fill(~there, NONE))


LETTERS = 26  # of copying and look-up; then the separator, then padding
SEPARATOR, PADDING = LETTERS, LETTERS + 1


def copying(n: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
    """Repeat After Me (2402.01032): random letters, a separator, and the letters again. The second time is to be known.

    Lengths are uniform in shortest..longest; tokens (B, 2 longest), padded on the right.
    """
    device = generator.device
    letters = torch.randint(LETTERS, (n, longest), generator=generator, device=device)
    lengths = torch.randint(shortest, longest + 1, (n, 1), generator=generator, device=device)
    columns = torch.arange(2 * longest, device=device)
    source = torch.where(columns < lengths, columns, columns - lengths - 1).clamp(0, longest - 1)
    tokens = letters.gather(1, source)
    tokens = tokens.masked_fill(columns == lengths, SEPARATOR).masked_fill(columns >= 2 * lengths, PADDING)
    index = torch.arange(longest, device=device)
    there = index < lengths
    places = torch.where(there, lengths + index, 0)
    return Batch(tokens, places, letters.masked_fill(~there, NONE))


def ngram_lookup(
    n: int, shortest: int, longest: int, n_key: int, n_answer: int, prefix: bool, generator: torch.Generator
) -> Batch:
    """Repeat After Me: letters, and an n-gram that occurs in them once: which letters follow it?

    The key comes after the letters, or with `prefix` before them. Lengths are uniform in shortest..longest.
        suffix    letters, separator, key, answer                prefix    key, separator, letters, separator, answer
    """
    device = generator.device
    letters = torch.randint(LETTERS, (n, longest), generator=generator, device=device)
    lengths = torch.randint(shortest, longest + 1, (n, 1), generator=generator, device=device)
    windows = letters.unfold(1, n_key, 1)
    code = (windows * LETTERS ** torch.arange(n_key, device=device)).sum(-1)
    starts = torch.arange(code.shape[1], device=device)
    code = torch.where(starts <= lengths - n_key, code, -1 - starts)  # what is beyond a row's end equals nothing
    # Sorted, what occurs once differs from both its neighbours.
    ordered, order = code.sort(1)
    differs = torch.ones(n, code.shape[1] + 1, dtype=torch.bool, device=device)
    differs[:, 1:-1] = ordered[:, 1:] != ordered[:, :-1]
    once = torch.zeros_like(code, dtype=torch.bool).scatter_(1, order, differs[:, 1:] & differs[:, :-1])
    usable = once & (starts <= lengths - n_key - n_answer)
    scores = torch.rand(code.shape, generator=generator, device=device)
    at = scores.masked_fill(~usable, -1).argmax(1, keepdim=True)
    key = letters.gather(1, at + torch.arange(n_key, device=device))
    answer = letters.gather(1, at + n_key + torch.arange(n_answer, device=device))
    separator = torch.full((n, 1), SEPARATOR, device=device)
    before = torch.cat((key, separator), 1) if prefix else key[:, :0]
    after = torch.cat((separator, *([] if prefix else [key]), answer[:, :-1]), 1)
    total = before.shape[1] + longest + after.shape[1]
    tokens = torch.full((n, total), PADDING, device=device)
    tokens[:, : before.shape[1]] = before
    body = slice(before.shape[1], before.shape[1] + longest)
    tokens[:, body] = torch.where(torch.arange(longest, device=device) < lengths, letters, PADDING)
    end = before.shape[1] + lengths
    tokens.scatter_(1, end + torch.arange(after.shape[1], device=device), after)
    first = end + (0 if prefix else n_key)
    return Batch(tokens, first + torch.arange(n_answer, device=device), answer)
