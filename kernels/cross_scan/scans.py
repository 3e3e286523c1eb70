"""The 2-D scan as four selective scans: for every device and backend, and any number of states."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..selective_scan import selective_scan


def four_scans(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """As `polymamba.kernels.cross_scan`."""
    # Of x there is one copy, by columns; backwards is the same sequence read from its other end.
    by_rows, by_columns = "b h w ... -> b (h w) ...", "b h w ... -> b (w h) ..."
    dts, Bs, Cs = (m.unbind(-2) for m in (dt, B, C))
    sums = []
    for first, order in enumerate((by_rows, by_columns)):
        sequence = rearrange(x, order)
        total = None
        for k in (first, first + 2):
            low_rank, B_k, C_k = (rearrange(m[k], order) for m in (dts, Bs, Cs))
            y = selective_scan(
                *(sequence, F.linear(low_rank, dt_weight[k]), A[k], B_k, C_k, D[k]),
                delta_bias=dt_bias[k],
                delta_softplus=True,
                reverse=k >= 2,
                backend=backend,
            )
            assert isinstance(y, Tensor)  # no final state was asked for
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            total = y if total is None else total + y
        sums.append(total)
    height, width = x.shape[1:3]
    rows = rearrange(sums[0], "b (h w) e -> b h w e", h=height, w=width)
    return rows + rearrange(sums[1], "b (w h) e -> b h w e", h=height, w=width)
