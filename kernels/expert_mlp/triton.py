"""Grouped matrix products in Triton: of rows that are sorted by expert, and of the weights' gradients.

All that is multiplied comes by descriptors (the tensor memory accelerator). To gather rows by address within a product
spares a pass that sorts them, and costs more than that. Tiles are as large as registers allow: the larger they are, the
less they read of the L2 cache.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..expert_rows.triton import collect, gather
from ..triton_runtime import ceil_div, multiply_add

ROWS, INNER = 128, 64
PART = tl.constexpr(64)  # columns of a tile that are written at a time: a half or a quarter
WIDE = {"ROWS": ROWS, "COLUMNS": 256, "INNER": INNER, "STAGES": 4, "num_warps": 8}  # one on a processor
NARROW = {"ROWS": ROWS, "COLUMNS": 128, "INNER": INNER, "STAGES": 3, "num_warps": 8, "maxnreg": 128}  # two


@triton.jit
def _halves(x):
    """The columns of x in two halves, each thread's own numbers."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _tiles_of_rows(ends, n_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Tiles of rows are counted group by group, each group's from its own first row on. Of each group: how many tiles
    there are up to its last one, the first row of a tile 0 if that were its own, the end of its rows.
    """
    g = tl.arange(0, GROUPS)
    end = tl.load(ends + g, mask=g < n_groups, other=0)
    start = tl.load(ends + g - 1, mask=(g > 0) & (g < n_groups), other=0)
    tiles = tl.where(g < n_groups, tl.cdiv(end - start, ROWS), 0)
    reached = tl.cumsum(tiles, axis=0)
    return reached, start - (reached - tiles) * ROWS, end


@triton.jit
def _multiply_tile(
    x, weight, inner, gates, y, shares, order, groups, tile, n_rows, n_in, n_out,
    RELU: tl.constexpr, TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of `_multiply`, of which those of the same rows are side by side.

    It may read rows of the next group, but writes none.
    """
    reached, row_of_tile, end = groups
    n_columns = tl.cdiv(n_out, COLUMNS)
    number = tile // n_columns
    g = tl.arange(0, GROUPS)
    group = tl.sum((reached <= number).to(tl.int32), axis=0)
    first = tl.sum(tl.where(g == group, row_of_tile, 0), axis=0) + number * ROWS
    last = tl.sum(tl.where(g == group, end, 0), axis=0)
    column = tile % n_columns * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, n_in, INNER, num_stages=STAGES):
        a = x.load([first, k])
        if TRANSPOSED:
            b = weight.load([group, column, k]).reshape(COLUMNS, INNER).T
        else:
            b = weight.load([group, k, column]).reshape(INNER, COLUMNS)
        total = multiply_add(a, b, total)
    row = first + tl.arange(0, ROWS)
    if gates is not None or SCATTER:
        assignment = tl.load(order + row, mask=row < last, other=0)
    at = (assignment if SCATTER else row).to(tl.int64)[:, None] * n_out
    if gates is not None:
        gate = tl.load(gates + assignment, mask=row < last, other=0.0)
    share = tl.zeros((ROWS,), tl.float32)
    parts = _halves(total)
    if COLUMNS == 4 * PART:
        parts = _halves(parts[0]) + _halves(parts[1])
    for i in tl.static_range(len(parts)):  # one after the other: there are registers for no more
        part, c = parts[i], column + i * PART
        told = part
        if inner is not None:
            told = inner.load([first, c]).to(tl.float32)
        if gates is not None:
            share += tl.sum(told * part, axis=1)
            part *= gate[:, None]
        if RELU or inner is not None:
            part = tl.where(told <= 0, 0.0, part)  # a NaN is not <= 0, and goes on
        c += tl.arange(0, PART)
        tl.store(y + (at + c[None, :]), part.to(y.dtype.element_ty), mask=(row < last)[:, None] & (c < n_out)[None, :])
    if shares is not None:  # `inner` is by the gate already
        share /= tl.where(gate == 0, 1.0, gate)
        tl.store(shares + tile % n_columns * n_rows.to(tl.int64) + assignment, share, mask=row < last)


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def _multiply(
    x, weight, inner, gates, y, shares, order, ends, n_rows, n_groups, n_in, n_out,
    RELU: tl.constexpr, TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr, FLATTEN: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x weight[group]; where SCATTER, a row of y is at its assignment, else in sorted order.

    RELU: its ReLU; `inner`: y where that is positive, and 0 elsewhere. Either times the row's gate, if there are gates.
    shares (tiles of columns, assignments): sums over columns of the gates' gradients.
    """
    groups = _tiles_of_rows(ends, n_groups, GROUPS, ROWS)
    n_tiles = tl.max(groups[0], axis=0) * tl.cdiv(n_out, COLUMNS)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        _multiply_tile(
            x, weight, inner, gates, y, shares, order, groups, tile, n_rows, n_in, n_out,
            RELU, TRANSPOSED, SCATTER, GROUPS, ROWS, COLUMNS, INNER, STAGES,
        )  # fmt: skip


@triton.jit
def _gradient_tile(
    left, right, dweight, ends, group, tile, n_left, n_right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of dweight[group] = left^T right, sums over the group's rows."""
    n_columns = tl.cdiv(n_right, COLUMNS)
    row, column = tile // n_columns * ROWS, tile % n_columns * COLUMNS
    end = tl.load(ends + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(start, end, INNER, num_stages=STAGES):
        a = left.load([1 << 30, end, (1 << 30) - (end - k), row]).reshape(INNER, ROWS)
        b = right.load([1 << 30, end, (1 << 30) - (end - k), column]).reshape(INNER, COLUMNS)
        total = multiply_add(a.T, b, total)
    r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    at = dweight + group.to(tl.int64) * n_left * n_right + r * n_right + c
    tl.store(at, total.to(dweight.dtype.element_ty), mask=(r < n_left) & (c < n_right))


@triton.jit(do_not_specialize=["n_rows", "n_groups", "n_first"])
def _gradients(
    dinner, w_in, dx, order, xs, dinners, dw_in, dys, inners, dw_out, ends, n_rows, n_groups, n_first, n_x, n_inner,
    SCATTER: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dinner w_in^T by n_first programs, dw_in = x^T dinner and dw_out = inner^T dy by the others, group by group.

    A tile of dx takes thrice as long, and is begun first: so all processors end at about the same time.
    """
    tile = tl.program_id(0)
    if tile < n_first:
        groups = _tiles_of_rows(ends, n_groups, GROUPS, ROWS)
        if tile < tl.max(groups[0], axis=0) * tl.cdiv(n_x, COLUMNS):
            _multiply_tile(
                dinner, w_in, None, None, dx, None, order, groups, tile, n_rows, n_inner, n_x,
                False, True, SCATTER, GROUPS, ROWS, COLUMNS, INNER, STAGES,
            )  # fmt: skip
    else:
        n_tiles = tl.cdiv(n_x, ROWS) * tl.cdiv(n_inner, COLUMNS)
        number = (tile - n_first) // n_tiles
        group, tile = number // 2, (tile - n_first) % n_tiles
        if number % 2 == 0:
            _gradient_tile(xs, dinners, dw_in, ends, group, tile, n_x, n_inner, ROWS, COLUMNS, INNER, STAGES)
        else:  # tiles of another shape: of two like branches a compiler makes one, with the memory of both
            _gradient_tile(inners, dys, dw_out, ends, group, tile, n_inner, n_x, COLUMNS, ROWS, INNER, STAGES)


def forward(x, gates, w_in, w_out, order, places, ends, some_lost):
    """The result; what the backward needs besides: the rows of x, sorted, and h of each."""
    top_k, rows = gates.shape[1], gather(x, order, gates.shape[1])
    inner = rows.new_empty(len(rows), w_in.shape[2])
    _product(rows, w_in, inner, order, ends, relu=True, gates=gates)
    y = _place_of_results(rows, top_k, some_lost)
    _product(inner, w_out, y, order, ends, scatter=top_k == 1)
    return _summed(y, places, ends, top_k, some_lost), rows, inner


def backward(dy, gates, w_in, w_out, order, places, ends, rows, inner, some_lost, of_weights):
    """Gradients of x, gates, w_in and w_out; the last two are empty unless of_weights."""
    top_k, n_rows, (n_groups, n_x, n_inner) = gates.shape[1], len(rows), w_in.shape
    dys, dinner = gather(dy, order, top_k), torch.empty_like(inner)
    shares = (gates.new_zeros if some_lost else gates.new_empty)(ceil_div(n_inner, NARROW["COLUMNS"]), n_rows)
    _product(dys, w_out.transpose(1, 2), dinner, order, ends, inner=inner, gates=gates, shares=shares)
    dx = _place_of_results(rows, top_k, some_lost)
    new = w_in.new_empty if n_rows else w_in.new_zeros
    dw_in, dw_out = (new(w.shape if of_weights else 0) for w in (w_in, w_out))
    if n_rows:
        columns, k = WIDE["COLUMNS"], INNER
        n_first = _most_tiles(n_rows, n_groups) * ceil_div(n_x, columns)
        n_other = 2 * n_groups * ceil_div(n_x, ROWS) * ceil_div(n_inner, columns) if of_weights else 0
        with torch.cuda.device_of(rows):
            _gradients[(n_first + n_other,)](
                TensorDescriptor.from_tensor(dinner, [ROWS, k]), TensorDescriptor.from_tensor(w_in, [1, columns, k]),
                dx, order, _groups_of(rows, ROWS), _groups_of(dinner, columns), dw_in,
                _groups_of(dys, ROWS), _groups_of(inner, columns), dw_out, ends,
                n_rows, n_groups, n_first, n_x, n_inner, SCATTER=top_k == 1, GROUPS=_power(n_groups), **WIDE,
            )  # fmt: skip
    return _summed(dx, places, ends, top_k, some_lost), shares.sum(0).view(gates.shape), dw_in, dw_out


def _product(
    x: Tensor, weight: Tensor, y: Tensor, order: Tensor, ends: Tensor, *, relu: bool = False, scatter: bool = False,
    inner: Tensor | None = None, gates: Tensor | None = None, shares: Tensor | None = None,
) -> None:  # fmt: skip
    """`_multiply` of x (T K, I), weight (E, I, O) -> y (T K, O)."""
    if not len(x):
        return
    n_groups, n_in, n_out = weight.shape
    wide = inner is None  # where this is read as well, a second program fills the time
    shape = WIDE if wide else NARROW
    columns = shape["COLUMNS"]
    transposed = weight.stride(2) != 1
    tiles = TensorDescriptor.from_tensor(
        weight.transpose(1, 2) if transposed else weight, [1, columns, INNER] if transposed else [1, INNER, columns]
    )
    if inner is not None:
        inner = TensorDescriptor.from_tensor(inner, [ROWS, PART.value])
    n_tiles = _most_tiles(len(x), n_groups) * ceil_div(n_out, columns)
    with torch.cuda.device_of(x):
        _multiply[(min(n_tiles, _processors(x.device)) if wide else n_tiles,)](
            TensorDescriptor.from_tensor(x, [ROWS, INNER]), tiles, inner, gates, y, shares, order, ends,
            len(x), n_groups, n_in, n_out, RELU=relu, TRANSPOSED=transposed, SCATTER=scatter, FLATTEN=wide,
            GROUPS=_power(n_groups), **shape,
        )  # fmt: skip


def _place_of_results(rows: Tensor, top_k: int, some_lost: bool) -> Tensor:
    """For a row of each assignment: with one a token, at the token; else in sorted order."""
    return torch.zeros_like(rows) if some_lost and top_k == 1 else torch.empty_like(rows)


def _summed(rows: Tensor, places: Tensor, ends: Tensor, top_k: int, some_lost: bool) -> Tensor:
    """The sum of each token's of these."""
    return rows if top_k == 1 else collect(rows, None, places, ends[-1:] if some_lost else None, top_k)


def _groups_of(x: Tensor, n_columns: int) -> TensorDescriptor:
    """x (T, I) by tiles of INNER rows: [2^30, e, 2^30 - n, c] is that of the rows e - n and on, zeros from e on.

    Its address is x + 2^30 (2^34 - s) + e s + (2^30 - n) s with the stride s: in 64 bits x + (e - n) s. And the third
    index ends at 2^30.
    """
    stride = x.stride(0)
    shape, strides = [0x7FFF0000, 0x7FFF0000, 1 << 30, x.shape[1]], [(1 << 34) - stride, stride, stride, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, INNER, n_columns])


def _most_tiles(n_rows: int, n_groups: int) -> int:
    """Of rows: how many there are is known on the device only."""
    return n_rows // ROWS + min(n_groups, n_rows)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
