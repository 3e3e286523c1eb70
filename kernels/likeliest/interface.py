"""The likeliest token of each sequence: a head's product and the place of the largest number in each row of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose, traced
from ..largest import WayOut, hand_over, largest
from ..largest.interface import check_way_out


@torch.no_grad()
def likeliest(
    x: Tensor, weight: Tensor, out: WayOut | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, M), weight (V, M) -> `largest(x weight^T)`: (places, int64 (B,); whether there is none, bool (B,)).

    In CUDA C++ (bf16 on a Hopper GPU) the product is never in memory. It is rounded to bf16 before it is compared there
    as well: so of tokens that tie in bf16 the first is taken, by either way, and the two differ only where sums in
    another order are rounded to another number. A row's result depends on that row alone. No gradients.

    out  what is found is also handed over, as by `hand_over`

    The weight has to be there before the kernel that makes x begins: it is asked for before that has ended.
    """
    if x.shape[1:] != weight.shape[1:] or weight.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (B, M) and (V, M)")
    if out is not None:
        check_way_out(out, len(x))
    if choose(backend, x.device, x.dtype, in_cuda=True) == "cuda":
        from . import cuda

        found = cuda.likeliest(x, weight, out) if not traced(x, weight) and cuda.serves(x, weight) else None
        if found is not None:
            return found
    places, bad = largest(F.linear(x, weight))
    if out is not None:
        hand_over(places, bad, out)
    return places, bad
