"""Grouped matrix products in Triton: of rows, read and written where their tokens stand, and of weights' gradients."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_runtime import ceil_div, multiply_add, with_rows

# Of a product of rows: 256 columns read least of the L2 cache, whose rate is the limit; then one program a processor,
# whose loads of a tile begin during the one before (`flatten`).
WIDE = {"ROWS": 128, "COLUMNS": 256, "INNER": 64, "num_warps": 8, "STAGES": 4, "per_sm": 1, "PARTS": 4}
WIDE |= {"FLATTEN": True, "TMA": True, "TMA_X": True}
NARROW = WIDE | {"COLUMNS": 128, "STAGES": 3}
TILES = {
    "relu": NARROW | {"num_warps": 4, "per_sm": 2},
    "masked": NARROW | {"PARTS": 2, "FLATTEN": False, "per_sm": 0, "maxnreg": 128},
    "plain": WIDE,
}
GRADIENT = {"ROWS": 128, "COLUMNS": 256, "INNER": 64, "num_warps": 8, "STAGES": 4, "TMA": True, "TMA_X": False}


@triton.jit
def _halves(x):
    """The columns of x in two halves, each thread's own numbers."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _tiles_of_rows(ends, n_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Of each group: the number of the first tile of rows that is not its own, the first row of a tile 0, were it its
    own, the end of its rows. Tiles of rows are counted group by group, each group's from its own first row on.
    """
    g = tl.arange(0, GROUPS)
    end = tl.load(ends + g, mask=g < n_groups, other=0)
    start = tl.load(ends + g - 1, mask=(g > 0) & (g < n_groups), other=0)
    tiles = tl.where(g < n_groups, tl.cdiv(end - start, ROWS), 0)
    reached = tl.cumsum(tiles, axis=0)
    return reached, start - (reached - tiles) * ROWS, end


@triton.jit
def _multiply_tile(
    x, weight, inner, gates, y, shares, read_by, write_by, groups, tile, x_stride,
    weight_group, weight_row, weight_column, n_rows, n_in, n_out,
    TOP_K: tl.constexpr, RELU: tl.constexpr, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr, TMA_X: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of `_matmul`, of which those of the same rows are side by side."""
    reached, row_of_tile, end = groups
    n_columns = tl.cdiv(n_out, COLUMNS)
    number = tile // n_columns
    g = tl.arange(0, GROUPS)
    group = tl.sum((reached <= number).to(tl.int32), axis=0)
    first = tl.sum(tl.where(g == group, row_of_tile, 0), axis=0) + number * ROWS
    last = tl.sum(tl.where(g == group, end, 0), axis=0)
    row = first + tl.arange(0, ROWS)
    first_column = tile % n_columns * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    source = row
    if read_by is not None:
        source = tl.load(read_by + row, mask=row < last, other=0) // TOP_K
    if not TMA_X:
        left = x + source.to(tl.int64)[:, None] * x_stride + k[None, :]
    if not TMA:
        right = weight + group.to(tl.int64) * weight_group + k[:, None] * weight_row + column * weight_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in tl.range(0, n_in, INNER, num_stages=STAGES):
        if TMA_X:
            a = x.load([first, done])
        else:
            a = tl.load(left + done, mask=(row < last)[:, None] & (done + k < n_in)[None, :], other=0.0)
        if not TMA:
            b = tl.load(
                right + done * weight_row, mask=(done + k < n_in)[:, None] & (column < n_out)[None, :], other=0.0
            )
        elif TRANSPOSED:
            b = weight.load([group, first_column, done]).reshape(COLUMNS, INNER).T
        else:
            b = weight.load([group, done, first_column]).reshape(INNER, COLUMNS)
        total = multiply_add(a, b, total)
    target = row
    if write_by is not None:
        target = tl.load(write_by + row, mask=row < last, other=0)
    if gates is not None:
        assignment = tl.load(read_by + row, mask=row < last, other=0)
        gate = tl.load(gates + assignment, mask=row < last, other=0.0)
    share = tl.zeros((ROWS,), tl.float32)
    parts = (total,)
    if PARTS == 2:
        parts = _halves(total)
    if PARTS == 4:
        low, high = _halves(total)
        parts = _halves(low) + _halves(high)
    for i in tl.static_range(PARTS):  # one after the other, for which there are registers
        part = parts[i]
        c = first_column + i * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)[None, :]
        inside = (row < last)[:, None] & (c < n_out)
        told = part
        if inner is not None:
            told = tl.load(inner + row.to(tl.int64)[:, None] * n_out + c, mask=inside, other=0.0).to(tl.float32)
        if gates is not None:
            share += tl.sum(told * part, axis=1)
            part *= gate[:, None]
        if RELU or inner is not None:
            part = tl.where(told <= 0, 0.0, part)  # a NaN is not <= 0, and goes on
        tl.store(y + target.to(tl.int64)[:, None] * n_out + c, part.to(y.dtype.element_ty), mask=inside)
    if shares is not None:  # `inner` is by the gate already
        share /= tl.where(gate == 0, 1.0, gate)
        tl.store(shares + tile % n_columns * n_rows.to(tl.int64) + assignment, share, mask=row < last)


@triton.jit(do_not_specialize=["n_groups", "n_rows"])
def _matmul(
    x, weight, inner, gates, y, shares, read_by, write_by, ends, x_stride, weight_group, weight_row, weight_column,
    n_rows, n_groups, n_in, n_out, TOP_K: tl.constexpr, RELU: tl.constexpr, TRANSPOSED: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, TMA_X: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = x weight[group]; in sorted order, but for x by `read_by` and y by `write_by`.

    RELU: its ReLU; `inner`: its gradient where `inner` is positive, and 0 elsewhere. Either by the row's gate; then
    `shares` (tiles of columns, assignments) gets the sums over columns of what that gate's gradient is the sum of.
    """
    groups = _tiles_of_rows(ends, n_groups, GROUPS, ROWS)
    n_tiles = tl.max(groups[0], axis=0) * tl.cdiv(n_out, COLUMNS)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        _multiply_tile(
            x, weight, inner, gates, y, shares, read_by, write_by, groups, tile, x_stride,
            weight_group, weight_row, weight_column, n_rows, n_in, n_out,
            TOP_K, RELU, TRANSPOSED, TMA, TMA_X, PARTS, STAGES, GROUPS, ROWS, COLUMNS, INNER,
        )  # fmt: skip


def matmul(
    x: Tensor, weight: Tensor, ends: Tensor, *, relu: bool = False, inner: Tensor | None = None,
    gates: Tensor | None = None, read_by: Tensor | None = None, write_by: Tensor | None = None, some_lost: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x (T, I) or, by `read_by` (T K,), its rows' assignments; weight (E, I, O) -> (T K, O), shares."""
    x, (n_groups, n_in, n_out) = with_rows(x), weight.shape
    new = x.new_zeros if some_lost else x.new_empty
    n_rows, top_k = (len(x), 1) if read_by is None else (len(read_by), len(read_by) // max(len(x), 1))
    y, shape = (
        (x.new_empty if write_by is None else new)(n_rows, n_out),
        dict(TILES["relu" if relu else "plain" if inner is None else "masked"]),
    )
    per_sm, shape["TMA_X"] = shape.pop("per_sm"), shape["TMA_X"] and read_by is None
    n_columns, shares = ceil_div(n_out, shape["COLUMNS"]), None
    if gates is not None and inner is not None:
        shares = new(n_columns, n_rows, dtype=torch.float32)
    transposed = weight.stride(2) != 1
    n_tiles = (n_rows // shape["ROWS"] + min(n_groups, n_rows)) * n_columns
    if per_sm:
        n_tiles = min(n_tiles, per_sm * _processors(x.device))
    given, rows = weight, x
    if shape["TMA_X"] and n_rows:
        rows = TensorDescriptor.from_tensor(x, [shape["ROWS"], shape["INNER"]])
    if shape["TMA"]:
        block = [1, shape["COLUMNS"], shape["INNER"]] if transposed else [1, shape["INNER"], shape["COLUMNS"]]
        given = TensorDescriptor.from_tensor(weight.transpose(1, 2) if transposed else weight, block)
    if n_tiles:
        with torch.cuda.device_of(x):
            _matmul[(n_tiles,)](
                rows, given, inner, gates, y, shares, read_by, write_by, ends, x.stride(0), *weight.stride(), n_rows,
                n_groups, n_in, n_out, TOP_K=top_k, RELU=relu, TRANSPOSED=transposed,
                GROUPS=1 << (n_groups - 1).bit_length(), **shape,
            )  # fmt: skip
    return y, shares


@triton.jit
def _tile_of_gradient(
    x, inner, dweight, order, ends, group, row_tile, column_tile, x_stride, n_x, n_inner,
    OF_X: tl.constexpr, TOP_K: tl.constexpr, TMA: tl.constexpr, TMA_X: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """x[token]^T inner (n_x, n_inner) if OF_X, else its transpose, over the rows of a group."""
    end = tl.load(ends + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    GATHERED: tl.constexpr = ROWS if OF_X else COLUMNS
    OTHER: tl.constexpr = COLUMNS if OF_X else ROWS
    first_x = (row_tile if OF_X else column_tile) * GATHERED
    first_inner = (column_tile if OF_X else row_tile) * OTHER
    d = first_x + tl.arange(0, GATHERED)
    i = first_inner + tl.arange(0, OTHER)
    k = tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    token = start + k
    if order is not None:
        token = tl.load(order + start + k, mask=start + k < end, other=0) // TOP_K
    for first in tl.range(start, end, INNER, num_stages=STAGES):
        s = first + k
        if TMA_X:
            ours = x.load([1 << 30, end, (1 << 30) - (end - first), first_x]).reshape(INNER, GATHERED)
        else:
            at = token.to(tl.int64)[:, None] * x_stride + d[None, :]
            ours = tl.load(x + at, mask=(s < end)[:, None] & (d < n_x)[None, :], other=0.0)
        if TMA:
            # The group as the end of a matrix of 2^30 rows, beyond which there is nothing to read.
            theirs = inner.load([1 << 30, end, (1 << 30) - (end - first), first_inner]).reshape(INNER, OTHER)
        else:
            theirs = tl.load(
                inner + s.to(tl.int64)[:, None] * n_inner + i[None, :],
                mask=(s < end)[:, None] & (i < n_inner)[None, :], other=0.0,
            )  # fmt: skip
        token = s + INNER  # of the next step: a load that waits for one of the same step could not run ahead as far
        if order is not None:
            token = tl.load(order + s + INNER, mask=s + INNER < end, other=0) // TOP_K
        total = multiply_add(ours.T, theirs, total) if OF_X else multiply_add(theirs.T, ours, total)
    if OF_X:
        at, inside = d[:, None] * n_inner + i[None, :], (d < n_x)[:, None] & (i < n_inner)[None, :]
    else:
        at, inside = i[:, None] * n_x + d[None, :], (i < n_inner)[:, None] & (d < n_x)[None, :]
    of_group = dweight + group.to(tl.int64) * n_x * n_inner
    tl.store(of_group + at, total.to(dweight.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradients(
    x, dinner, dw_in, dy, inner, dw_out, order, ends, x_stride, dy_stride, n_x, n_inner,
    TOP_K: tl.constexpr, TMA: tl.constexpr, TMA_X: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Programs of a group's tiles of one gradient side by side, of x's weight first."""
    columns_in, columns_out = tl.cdiv(n_inner, COLUMNS), tl.cdiv(n_x, COLUMNS)
    tiles_in, tiles_out = tl.cdiv(n_x, ROWS) * columns_in, tl.cdiv(n_inner, ROWS) * columns_out
    tile = tl.program_id(0)
    group, tile = tile // (tiles_in + tiles_out), tile % (tiles_in + tiles_out)
    if tile < tiles_in:
        _tile_of_gradient(
            x, dinner, dw_in, order, ends, group, tile // columns_in, tile % columns_in, x_stride, n_x, n_inner,
            True, TOP_K, TMA, TMA_X, STAGES, ROWS, COLUMNS, INNER,
        )  # fmt: skip
    else:
        tile -= tiles_in
        _tile_of_gradient(
            dy, inner, dw_out, order, ends, group, tile // columns_out, tile % columns_out, dy_stride, n_x, n_inner,
            False, TOP_K, TMA, TMA_X, STAGES, ROWS, COLUMNS, INNER,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_groups", "n_rows", "n_dx"])
def _gradients(
    dinner, weight, dx, write_by, n_dx, x, dinner_ending, dw_in, dy, inner, dw_out, order, ends, x_stride, dy_stride,
    n_rows, n_groups, n_x, n_inner, TOP_K: tl.constexpr, TMA_X: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradients of tokens and weights: the longer tiles first, that all processors end at about the same time."""
    program = tl.program_id(0)
    if program < n_dx:
        groups = _tiles_of_rows(ends, n_groups, GROUPS, ROWS)
        if program < tl.max(groups[0], axis=0) * tl.cdiv(n_x, COLUMNS):
            _multiply_tile(
                dinner, weight, None, None, dx, None, None, write_by, groups, program, n_inner,
                0, 0, 0, n_rows, n_inner, n_x,
                TOP_K, False, True, True, TMA_X, PARTS, STAGES, GROUPS, ROWS, COLUMNS, INNER,
            )  # fmt: skip
    else:
        columns_in, columns_out = tl.cdiv(n_inner, COLUMNS), tl.cdiv(n_x, COLUMNS)
        tiles_in, tiles_out = tl.cdiv(n_x, ROWS) * columns_in, tl.cdiv(n_inner, ROWS) * columns_out
        tile = program - n_dx
        group, tile = tile // (tiles_in + tiles_out), tile % (tiles_in + tiles_out)
        if tile < tiles_in:
            _tile_of_gradient(
                x, dinner_ending, dw_in, order, ends, group, tile // columns_in, tile % columns_in, x_stride,
                n_x, n_inner, True, TOP_K, True, False, STAGES, ROWS, COLUMNS, INNER,
            )  # fmt: skip
        else:
            tile -= tiles_in
            _tile_of_gradient(
                dy, inner, dw_out, order, ends, group, tile // columns_out, tile % columns_out, dy_stride,
                n_x, n_inner, False, TOP_K, True, False, STAGES, ROWS, COLUMNS, INNER,
            )  # fmt: skip


MERGE = True
MERGED = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "STAGES": 3, "PARTS": 2, "TMA_X": True}


def gradients(x, dinner, dy, inner, order, ends, w_in, some_lost):
    """dx of the assignments (by order with top_k 1), dw_in, dw_out."""
    x, dy, (n_groups, n_x, n_inner) = with_rows(x), with_rows(dy), w_in.shape
    shape, n_rows = dict(MERGED), len(order)
    rows, columns, k = shape["ROWS"], shape["COLUMNS"], shape["INNER"]
    top_k = n_rows // max(len(x), 1)
    if not n_rows:
        return x.new_empty(0, n_x), torch.zeros_like(w_in), w_in.new_zeros(n_groups, n_inner, n_x)
    dx = (x.new_zeros if some_lost and top_k == 1 else x.new_empty)(n_rows, n_x)
    dw_in, dw_out = x.new_empty(n_groups, n_x, n_inner), x.new_empty(n_groups, n_inner, n_x)
    n_dx = (n_rows // rows + min(n_groups, n_rows)) * ceil_div(n_x, columns)
    n_tiles = ceil_div(n_x, rows) * ceil_div(n_inner, columns) + ceil_div(n_inner, rows) * ceil_div(n_x, columns)
    dinner_rows = TensorDescriptor.from_tensor(dinner, [rows, k]) if shape["TMA_X"] else dinner
    with torch.cuda.device_of(x):
        _gradients[(n_dx + n_groups * n_tiles,)](
            dinner_rows, TensorDescriptor.from_tensor(w_in, [1, columns, k]), dx, order if top_k == 1 else None, n_dx,
            x, _ending(dinner, k, columns), dw_in, dy, _ending(inner, k, rows), dw_out, order, ends,
            x.stride(0), dy.stride(0), n_rows, n_groups, n_x, n_inner,
            TOP_K=top_k, GROUPS=1 << (n_groups - 1).bit_length(), **shape,
        )  # fmt: skip
    return dx, dw_in, dw_out


def weight_gradients(
    x: Tensor, dinner: Tensor, dy: Tensor, inner: Tensor, order: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """x, dy (T, D), by `order` (T K,), dinner, inner (T K, I) -> x^T dinner (E, D, I), inner^T dy (E, I, D)."""
    x, dy, (n_x, n_inner) = with_rows(x), with_rows(dy), (x.shape[1], inner.shape[1])
    n_groups, shape = len(ends), dict(GRADIENT)
    rows, columns, k = shape["ROWS"], shape["COLUMNS"], shape["INNER"]
    n_tiles = ceil_div(n_x, rows) * ceil_div(n_inner, columns) + ceil_div(n_inner, rows) * ceil_div(n_x, columns)
    dw_in, dw_out = x.new_empty(n_groups, n_x, n_inner), x.new_empty(n_groups, n_inner, n_x)
    top_k = 1 if order is None else len(order) // max(len(x), 1)
    given = x, dinner, dy, inner
    if shape["TMA"]:
        given = x, _ending(dinner, k, columns), dy, _ending(inner, k, rows)
    shape["TMA_X"] = shape["TMA_X"] and order is None
    if shape["TMA_X"]:
        given = _ending(x, k, rows), given[1], _ending(dy, k, columns), given[3]
    with torch.cuda.device_of(x):
        _weight_gradients[(n_groups * n_tiles,)](
            given[0], given[1], dw_in, given[2], given[3], dw_out, order, ends, x.stride(0), dy.stride(0),
            n_x, n_inner, TOP_K=top_k, **shape,
        )  # fmt: skip
    return dw_in, dw_out


def _ending(x: Tensor, n_rows: int, n_columns: int) -> TensorDescriptor:
    """x (T, I) for tiles of n_rows that end at a given row: [2^30, e, 2^30 - n, c] reads rows e - n to e, then zeros.

    That is x[2^30 (2^34 / stride - 1) + e + 2^30 - n] by addresses of 64 bits, which wrap around.
    """
    stride = x.stride(0)
    shape, strides = [0x7FFF0000, 0x7FFF0000, 1 << 30, x.shape[1]], [(1 << 34) - stride, stride, stride, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, n_rows, n_columns])


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
