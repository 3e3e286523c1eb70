"""The place of the largest number in each row: the choice of the next token where nothing is drawn; and its way out."""

from importlib import import_module
from typing import NamedTuple

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


class WayOut(NamedTuple):
    """Where a step of decoding leaves the tokens that it has chosen; all contiguous int64."""

    own: Tensor  # (B,), for the next step
    ring: Tensor  # (K, B), for the host: steps by turns. It may lie in pinned memory of the host, for a GPU's kernels
    turn: Tensor  # (B,): the turn that it is, which goes on by one, from K - 1 to 0; one for each sequence


@torch.no_grad()
def hand_over(tokens: Tensor, bad: Tensor, out: WayOut, *, backend: str | None = None) -> None:
    """tokens int64 (B,) go out, those for the host as -1 where bad, bool (B,).

    Into the host's memory a kernel writes (backend "triton"): the GPU's next kernel would wait for a copy. ValueError
    for a ring of other rows.
    """
    check_way_out(out, len(tokens))
    if choose(backend, tokens.device, tokens.dtype) == "triton":
        import_module(".triton", __package__).hand_over(tokens, bad, *out)
    else:
        out.own.copy_(tokens)
        told = torch.where(bad, -1, tokens)[None]
        out.ring.scatter_(0, out.turn[None].to(out.ring.device), told.to(out.ring.device))
        out.turn.add_(1).remainder_(len(out.ring))


def check_way_out(out: WayOut, n_rows: int) -> None:
    for name, x, shape in zip(out._fields, out, ((n_rows,), (len(out.ring), n_rows), (n_rows,)), strict=True):
        if x.shape != shape or x.dtype != torch.int64 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, int64 {shape}; got {x.dtype} {tuple(x.shape)}")
