"""How every backend sees sequences: flat, T tokens laid end to end.

Sequence s owns the tokens [bounds[s], bounds[s+1]): a row of a batch, or what cu_seqlens packs. So a batch is only the
packing in which all sequences have one length, and no kernel knows two layouts.
"""

import torch
from torch import Tensor


def sequence_bounds(cu_seqlens: Tensor | None, batch: int, n_tokens: int) -> Tensor:
    """First token of each sequence and, last, the number of tokens: int64 (S+1,)."""
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int64)
    return torch.arange(batch + 1, dtype=torch.int64) * (n_tokens // max(batch, 1))


def piece_numbers(n_tokens: int, n_seqs: int, steps: int, *, packed: bool) -> int:
    """How many numbers pieces of so many steps have, all sequences together; of equal lengths unless packed."""
    if packed:
        return checkpoint_slots(n_tokens, n_seqs, steps)
    return n_seqs * max(-(-(n_tokens // max(n_seqs, 1)) // steps), 1)


def checkpoint_slots(n_tokens: int, n_seqs: int, every: int) -> int:
    """Slots for a state saved before every `every`-th step of each sequence.

    Piece p of the s-th sequence, which starts at token t0, has slot t0 // every + s + p: computable without a sum over
    sequences, and no two pieces share one, since floor(a + b) + 1 >= floor(a) + ceil(b).
    """
    return n_tokens // every + n_seqs
