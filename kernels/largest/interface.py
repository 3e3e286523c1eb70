"""The place of the largest number in each row: the choice of the next token where nothing is drawn."""

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
