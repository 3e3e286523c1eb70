"""Going along a chromosome of any length in memory that does not grow with it: features of each base, piece by piece.

A causal model carries its state from piece to piece: what it says is what it would say in one shot. One that sees both
ways goes over windows that overlap: their inner parts, window - overlap bases long, lie side by side, with half of the
overlap on either side, so that a base has at least so many others around it. How far that is from one shot is to be
measured, with a window as long as the chromosome.

B windows, L length, F features, n bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.batching import pad_right
from .alphabet import PAD
from .overlapping import grouped, inner_parts

Bases = Callable[[int, int], np.ndarray]  # start, end -> tokens uint8 (end - start,) of a sequence


class Along(NamedTuple):
    """What says something of each base.

    whole     tokens (B, L), mask (B, L) -> (B, L, F)
    carried   tokens (1, L), the state after the bases before them -> (1, L, F) and the state after these; None of a
              model that sees both ways
    """

    whole: Callable[[Tensor, Tensor], Tensor]
    carried: Callable[[Tensor, Any], tuple[Tensor, Any]] | None
    device: torch.device


@torch.no_grad()
def along(
    what: Along, bases: Bases, start: int, end: int, *, window: int, overlap: int, max_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    """(start, features float32 (n, F), on the CPU) of consecutive pieces of bases start .. end - 1 of a sequence.

    max_tokens   bases in a forward, at least one window; of a causal model, to which window and overlap are nothing,
                 those of a piece
    """
    if what.carried is not None:
        state = None
        for at in range(start, end, max_tokens):
            tokens = torch.from_numpy(bases(at, min(at + max_tokens, end)).astype(np.int64))
            features, state = what.carried(tokens[None].to(what.device), state)
            yield at, features[0].float().cpu()
        return
    for group in grouped(inner_parts(start, end, window, overlap), max(1, max_tokens // window)):
        tokens, mask = pad_right([bases(part.first, part.last) for part in group], PAD)
        features = what.whole(tokens.to(what.device), mask.to(what.device)).float().cpu()
        for part, row in zip(group, features, strict=True):
            yield part.left, row[part.left - part.first : part.right - part.first]
