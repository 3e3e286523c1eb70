"""In Triton: one pass over what is read, in tiles of ROWS tokens and BLOCK channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, load_float, sigmoid, sum_first_axis, with_rows
from ..triton_runtime import softplus as softplus_of

ROWS, BLOCK = 16, 128
PIECE = 512  # tokens of a share of a sum
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _dt(delta, bias, at, d, inside, SOFTPLUS: tl.constexpr):
    dt = load_float(delta, at, inside) + load_float(bias, d, inside)
    return softplus_of(dt) if SOFTPLUS else dt


@triton.jit(do_not_specialize=["length"])
def _step_sums(
    delta, bias, shares, row_stride, batch_stride, length, width,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    piece, sequence = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, PIECE, ROWS):
        row = piece * PIECE + i + tl.arange(0, ROWS)[:, None]
        inside = (row < length) & (d < width)
        dt = _dt(delta, bias, sequence * batch_stride + row * row_stride + d, d, inside, SOFTPLUS)
        total += tl.where(inside, dt, 0.0)
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(shares + (piece * tl.num_programs(2) + sequence) * width + d, sums, mask=d < width)


@triton.jit(do_not_specialize=["length"])
def _backward_scan_inputs(
    dy, delta, z, bias, u, shifted, dy_row, dy_batch, delta_row, delta_batch, z_row, z_batch, length, width,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < length) & (d < width)
    other = tl.maximum(row - 1, 0) if REVERSE else tl.minimum(row + 1, length - 1)
    from_ = sequence * delta_batch + other * delta_row + d
    to = (sequence * length + row) * width + d
    tl.store(shifted + to, tl.load(delta + from_, mask=inside, other=0.0), mask=inside)
    values = load_float(dy, sequence * dy_batch + row * dy_row + d, inside)
    if z is not None:
        gate = load_float(z, sequence * z_batch + row * z_row + d, inside)
        values *= gate * sigmoid(gate)
    dt = _dt(delta, bias, from_, d, inside, SOFTPLUS)
    tl.store(u + to, values / tl.maximum(dt, _TINY), mask=inside)


def step_sums(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta = with_rows(delta)
    batch, length, width = delta.shape
    n_pieces = ceil_div(length, PIECE)
    shares = torch.empty(n_pieces, batch, width, device=delta.device)
    grid = n_pieces, ceil_div(width, BLOCK), batch
    strides = delta.stride(1), delta.stride(0)
    with torch.cuda.device_of(delta):
        _step_sums[grid](delta, bias, shares, *strides, length, width, PIECE, ROWS, BLOCK, softplus)
        return sum_first_axis(shares)


def backward_scan_inputs(
    dy: Tensor, delta: Tensor, z: Tensor | None, bias: Tensor | None, softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    dy, delta, z = with_rows(dy), with_rows(delta), None if z is None else with_rows(z)
    batch, length, width = delta.shape
    u, shifted = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dy, delta))
    strides = [(0, 0) if x is None else (x.stride(1), x.stride(0)) for x in (dy, delta, z)]
    grid = ceil_div(length, ROWS), ceil_div(width, BLOCK), batch
    with torch.cuda.device_of(delta):
        _backward_scan_inputs[grid](
            *(dy, delta, z, bias, u, shifted, *strides[0], *strides[1], *strides[2], length, width),
            *(reverse, ROWS, BLOCK, softplus),
        )
    return u, shifted
