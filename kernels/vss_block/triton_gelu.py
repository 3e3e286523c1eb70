"""gelu(x W' + b) in Triton: the activation, exact, is applied to a tile of the product while it is in registers.

PyTorch's own product writes what the next pass reads again: where the inner dimension is small, that is most of the
time. Letters: T tokens, C channels, F inner width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, load_float, multiply_add

ROWS, COLUMNS, DEPTH = 128, 128, 32  # of a tile, and what of the inner dimension is multiplied at once


@triton.jit
def normal_share(x):
    """The share of a normal distribution below x, off by up to 1e-7: Abramowitz and Stegun 7.1.26 for erfc."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half = 0.5 * series * tl.exp2(z * z * -1.4426950408889634)
    return tl.where(x < 0.0, half, 1.0 - half)


@triton.jit(do_not_specialize=["n_rows"])
def _linear_gelu(
    x, weight, bias, h, y, n_rows, n_columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_columns, COLUMNS)
    row = tl.program_id(0) // n_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x_tile = x + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_tile = weight + column[None, :] * depth + k[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, DEPTH):
        there = k < depth - first
        a = tl.load(x_tile + first, mask=(row < n_rows)[:, None] & there[None, :], other=0.0)
        b = tl.load(weight_tile + first, mask=(column < n_columns)[None, :] & there[:, None], other=0.0)
        product = multiply_add(a, b, product)
    product += load_float(bias, column, column < n_columns)[None, :]
    at = row.to(tl.int64)[:, None] * n_columns + column[None, :]
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    rounded = product.to(y.dtype.element_ty)
    if h is not None:
        tl.store(h + at, rounded, mask=inside)
    product = rounded.to(tl.float32)
    tl.store(y + at, product * normal_share(product), mask=inside)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor | None, Tensor]:
    """(x W' + b if save, gelu of it); x (T, C), weight (F, C), contiguous."""
    shape = x.shape[0], weight.shape[0]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if save else None
    if y.numel():
        _linear_gelu[(ceil_div(shape[0], ROWS) * ceil_div(shape[1], COLUMNS),)](
            x, weight, bias, h, y, *shape, x.shape[1],
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=8, num_stages=3,
        )  # fmt: skip
    return h, y
