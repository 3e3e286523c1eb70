"""Residual add and norm in Triton: one pass over the rows, each in registers.

A program of the forward has a tile of rows, as many as keep its lanes in work. One of the backward walks a piece of the
rows in such tiles and leaves its share of dweight and dbias; the shares are added in a fixed order.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_runtime import ceil_div, early_launch, launch, load_float, sum_first_axis, with_rows

PIECE = 16  # rows of a program of the backward: fixed, so that sums over rows depend on nothing else
FEW = 256  # rows, as of a step, whose norm may begin, and lets the next kernel begin, before the one before has ended
TILE = 4096  # elements of a tile, unless a row is longer


@triton.jit
def _statistics(values, inside, width, eps, CENTRED: tl.constexpr):
    """(the normed rows, 1 / deviation as a column)."""
    if CENTRED:
        values = tl.where(inside, values - (tl.sum(values, axis=1) / width)[:, None], 0.0)
    scale = (1.0 / tl.sqrt_rn(tl.sum(values * values, axis=1) / width + eps))[:, None]
    return values * scale, scale


@triton.jit(do_not_specialize=["n_rows", "rows_a_factor"])
def _forward(
    x, residual, weight, bias, stream, y, factors, shift, eps, x_stride, residual_stride, n_rows, rows_a_factor, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (d < width)
    values = load_float(x, row * x_stride + d, inside)
    if factors is not None:
        values *= load_float(factors, row // rows_a_factor, row < n_rows)
    if residual is not None:
        values += load_float(residual, row * residual_stride + d, inside)
        if stream is not None:
            tl.store(stream + row * width + d, values + load_float(shift, d, d < width), mask=inside)
    normed, _ = _statistics(values, inside, width, eps, CENTRED)
    out = normed * load_float(weight, d, d < width) + load_float(bias, d, d < width)
    tl.store(y + row * width + d, out, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "rows_a_factor"])
def _backward(
    dy, dstream, stream, weight, dresidual, dx, dweight, dbias, factors, eps, dy_stride, dstream_stride, stream_stride,
    share_stride, n_rows, rows_a_factor, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)[None, :]
    weight_row = load_float(weight, d, d < width)
    dweight_tile = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias_tile = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, PIECE, ROWS):
        row = tl.program_id(0).to(tl.int64) * PIECE + i + tl.arange(0, ROWS)[:, None]
        inside = (row < n_rows) & (d < width)
        grad = load_float(dy, row * dy_stride + d, inside)
        values = load_float(stream, row * stream_stride + d, inside)
        onward = load_float(dstream, row * dstream_stride + d, inside)
        normed, scale = _statistics(values, inside, width, eps, CENTRED)
        dweight_tile += grad * normed
        if dbias is not None:
            dbias_tile += grad
        grad *= weight_row
        along = (tl.sum(grad * normed, axis=1) / width)[:, None]
        if CENTRED:
            along = normed * along + (tl.sum(grad, axis=1) / width)[:, None]
        else:
            along = normed * along
        out = (grad - along) * scale + onward
        tl.store(dresidual + row * width + d, out, mask=inside)
        if factors is not None:
            out *= load_float(factors, row // rows_a_factor, row < n_rows)
        if dx is not None:
            tl.store(dx + row * width + d, out, mask=inside)
    share = tl.program_id(0).to(tl.int64) * share_stride + tl.arange(0, BLOCK)
    tl.store(dweight + share, tl.sum(dweight_tile, axis=0), mask=tl.arange(0, BLOCK) < width)
    if dbias is not None:
        tl.store(dbias + share, tl.sum(dbias_tile, axis=0), mask=tl.arange(0, BLOCK) < width)


@cache
def _shape(width: int) -> dict[str, int]:
    """Shape of a tile and its warps, 32 elements a lane up to rows of 16384."""
    block = triton.next_power_of_2(width)
    n_rows = min(max(TILE // block, 1), PIECE)
    return {"ROWS": n_rows, "BLOCK": block, "num_warps": min(max(n_rows * block // 1024, 1), 16)}


def forward(x, residual, weight, bias, eps, centred, dtype, factors=None, shift=None, before=None):
    """(y, stream); the stream is empty without a residual, whose dtype it has.

    factors (K,): of x before it is added, each for as many rows. shift (D,): added to the stream, but not to what is
    normed. before (D,), in place of a residual: added to x before it is normed.
    """
    n_rows, width = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    stream = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    x, added = with_rows(x), before if residual is None else with_rows(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    shape = _shape(width)
    with torch.cuda.device_of(x):
        launch(
            _forward, ceil_div(n_rows, shape["ROWS"]), x, added, weight, bias, stream, y, factors, shift, eps,
            x.stride(0), 0 if residual is None else added.stride(0), n_rows, _rows_a_factor(n_rows, factors), width,
            **shape, CENTRED=centred, **(early_launch(x.device) if n_rows <= FEW else {"EARLY": False}),
        )  # fmt: skip
    return y, x.new_empty(0, dtype=torch.float32) if stream is None else stream


def _rows_a_factor(n_rows, factors) -> int:
    return n_rows // len(factors) if factors is not None and n_rows else 1


def backward(dy, dstream, stream, weight, bias, eps, centred, x_dtype, factors=None):
    """Gradients of (residual, x, weight, bias); None for x's if it is the residual's, and for that of an absent bias.

    factors: as of `forward`.
    """
    width, n_columns = len(weight), 1 if bias is None else 2
    shares = new_shares(stream, n_columns * width)
    dresidual, dx = backward_with_shares(dy, dstream, stream, weight, bias, eps, centred, x_dtype, shares, factors)
    with torch.cuda.device_of(stream):
        sums = sum_first_axis(shares)
    return dresidual, dx, sums[:width], None if bias is None else sums[width:]


def new_shares(stream, n_sums):
    """Room for what pieces of the rows share of so many sums over all."""
    return torch.empty(ceil_div(len(stream), PIECE), n_sums, device=stream.device)


def backward_with_shares(dy, dstream, stream, weight, bias, eps, centred, x_dtype, shares, factors=None):
    """Of `backward` the first two; what the others are sums of (weight's, then the bias's) is left in `shares`, columns
    of a matrix perhaps: so sums of several norms can be added up together."""
    n_rows, width = stream.shape
    dresidual = torch.empty(stream.shape, dtype=torch.float32, device=stream.device)
    same = x_dtype == torch.float32 and factors is None
    dx = None if same else torch.empty(stream.shape, dtype=x_dtype, device=stream.device)
    dy, stream, dstream = with_rows(dy), with_rows(stream), None if dstream is None else with_rows(dstream)
    strides = dy.stride(0), 0 if dstream is None else dstream.stride(0), stream.stride(0), shares.stride(0)
    share_bias, shape = None if bias is None else shares[:, width:], _shape(width)
    with torch.cuda.device_of(stream):
        launch(
            _backward, len(shares), dy, dstream, stream, weight.contiguous(), dresidual, dx, shares, share_bias,
            factors, eps, *strides, n_rows, _rows_a_factor(n_rows, factors), width,
            **shape, PIECE=PIECE, CENTRED=centred,
        )  # fmt: skip
    return dresidual, dx
