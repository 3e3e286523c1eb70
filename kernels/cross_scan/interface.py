"""The 2-D scan of VMamba (arXiv 2401.10166, section 4.2, SS2D): four selective scans over one image, summed."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..selective_scan import selective_scan
from .reference import cross_scan_reference


def cross_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor,
    *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Scan the pixels of an image in K = 4 directions, each with parameters of its own, and add up the results.

    Directions: 0 row by row, 1 column by column, 2 and 3 the same backwards, from the last pixel to the first.
    Each is `selective_scan` with step sizes softplus(dt_weight dt + dt_bias).

    Shapes, with B batch, H height, W width, E channels, N states, R rank of the step sizes:
        x               (B, H, W, E)
        dt              (B, H, W, K, R)
        B, C            (B, H, W, K, N), each at its own pixel, whatever the direction
        A               (K, E, N), its values negative
        D, dt_bias      (K, E)
        dt_weight       (K, E, R)

    Returns (B, H, W, E), the sum over the directions, in float32 (float64 for float64 inputs): it is normed next.
    Raises ValueError if shapes disagree or if `backend` (as of `selective_scan`) cannot run these inputs.
    """
    _check(x, dt, A, B, C, D, dt_weight, dt_bias)
    if backend == "reference":
        return cross_scan_reference(x, dt, A, B, C, D, dt_weight, dt_bias)
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


def _check(x, dt, A, B, C, D, dt_weight, dt_bias):
    if x.dim() != 4 or A.dim() != 3 or dt.dim() != 5:
        raise ValueError(
            "x must be (batch, height, width, channels), dt (batch, height, width, directions, rank), A (directions, "
            f"channels, states); got {tuple(x.shape)}, {tuple(dt.shape)} and {tuple(A.shape)}"
        )
    n_channels, n_states, rank = x.shape[3], A.shape[2], dt.shape[4]
    place = tuple(x.shape[:3])
    expected = {
        "dt": (dt, (*place, 4, rank)),
        "A": (A, (4, n_channels, n_states)),
        "B": (B, (*place, 4, n_states)),
        "C": (C, (*place, 4, n_states)),
        "D": (D, (4, n_channels)),
        "dt_weight": (dt_weight, (4, n_channels, rank)),
        "dt_bias": (dt_bias, (4, n_channels)),
    }
    for name, (given, shape) in expected.items():
        if tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {shape}")
