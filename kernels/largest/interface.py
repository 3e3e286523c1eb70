"""The place of the largest number in each row: the choice of the next token where nothing is drawn; and its way out."""

from importlib import import_module

import torch
from torch import Tensor

from ..backends import choose


@torch.no_grad()
def largest(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """x (B, V) -> (the first place of each row's largest number, int64 (B,); whether there is none, bool (B,)).

    There is none where that number is not finite or where one is NaN. Nothing waits for the GPU. No gradients.
    """
    if choose(backend, x.device, x.dtype) == "triton":
        return import_module(".triton", __package__).largest(x)
    found = x.max(-1)
    return found.indices, ~found.values.isfinite()


@torch.no_grad()
def hand_over(
    tokens: Tensor, bad: Tensor, own: Tensor, ring: Tensor, turn: Tensor, *, backend: str | None = None
) -> None:
    """What a step of decoding has chosen, to where the next step and the host will read it: own and ring[turn].

    tokens int64 (B,), bad bool (B,), own int64 (B,) and ring int64 (K, B), contiguous; turn int64 (1,) goes on by one,
    from K - 1 to 0. Where bad, the ring gets -1. The ring may lie in pinned memory of the host while the others are on
    a GPU, for the backend "triton": then no copy has to follow, which the GPU's next kernel would wait for. ValueError
    for a ring of other rows.
    """
    if ring.shape[1:] != tokens.shape or not ring.is_contiguous():
        raise ValueError(f"ring must be contiguous, (steps, {len(tokens)}); got {tuple(ring.shape)}")
    if choose(backend, tokens.device, tokens.dtype) == "triton":
        import_module(".triton", __package__).hand_over(tokens, bad, own, ring, turn)
    else:
        own.copy_(tokens)
        ring[turn] = torch.where(bad, -1, tokens)[None].to(ring.device)
        turn.add_(1).remainder_(len(ring))
