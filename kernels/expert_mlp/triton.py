"""A grouped matrix product in Triton that ends in a ReLU, or in a ReLU's gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, multiply_add, with_rows

TILE = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["n_groups"])
def _matmul(
    x, weight, inner, y, ends, x_stride, weight_group, weight_row, weight_column, n_groups, n_in, n_out,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of y = relu(x weight[group]), or of x weight[group] where `inner` is positive, and 0 elsewhere.

    Tiles of rows are counted group by group, each group's from its own first row on; those of one tile of rows side by
    side. The groups' sizes are known on the device only, so there are programs for as many tiles as there may be.
    """
    n_columns = tl.cdiv(n_out, COLUMNS)
    number = tl.program_id(0) // n_columns
    g = tl.arange(0, GROUPS)
    end = tl.load(ends + g, mask=g < n_groups, other=0)
    start = tl.load(ends + g - 1, mask=(g > 0) & (g < n_groups), other=0)
    tiles = tl.cdiv(end - start, ROWS)
    group = tl.sum((tl.cumsum(tiles, axis=0) <= number).to(tl.int32), axis=0)
    if group < n_groups:
        of_group = number - tl.sum(tl.where(g < group, tiles, 0), axis=0)
        first = tl.sum(tl.where(g == group, start, 0), axis=0) + of_group * ROWS
        last = tl.sum(tl.where(g == group, end, 0), axis=0)
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        k = tl.arange(0, INNER)
        left = x + row * x_stride + k[None, :]
        right = weight + group.to(tl.int64) * weight_group + k[:, None] * weight_row + column * weight_column
        at, inside = row * n_out + column, (row < last) & (column < n_out)
        if inner is not None:
            told = tl.load(inner + at, mask=inside, other=0.0)  # on its way while the product is made
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in range(0, n_in, INNER):
            a = tl.load(left + done, mask=(row < last) & (done + k < n_in)[None, :], other=0.0)
            b = tl.load(right + done * weight_row, mask=(done + k < n_in)[:, None] & (column < n_out), other=0.0)
            total = multiply_add(a, b, total)
        if inner is None:
            told = total
        tl.store(y + at, tl.where(told <= 0, 0.0, total), mask=inside)  # a NaN is not <= 0, and goes on


def matmul(x: Tensor, weight: Tensor, ends: Tensor, inner: Tensor | None) -> Tensor:
    """x (T, I), weight (E, I, O), ends (E,) -> (T, O): relu(x weight[e]) without `inner` (T, O)."""
    x, n_groups, n_out = with_rows(x), len(ends), weight.shape[2]
    y = x.new_empty(len(x), n_out)
    n_tiles = len(x) // TILE["ROWS"] + min(n_groups, len(x))
    with torch.cuda.device_of(x):
        _matmul[(n_tiles * ceil_div(n_out, TILE["COLUMNS"]),)](
            x, weight, inner, y, ends, x.stride(0), *weight.stride(), n_groups, x.shape[1], n_out,
            GROUPS=1 << (n_groups - 1).bit_length(), **TILE,
        )  # fmt: skip
    return y
