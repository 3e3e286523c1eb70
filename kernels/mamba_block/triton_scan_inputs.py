"""All that a scan of the Mamba block reads, of x, as one kernel in Triton, where nothing is kept for a backward:

    u         = silu(conv(x))                       (T, E)
    (t, B, C) = u W_x'                              (T, R + 2N)
    delta     = t W_dt'                             (T, E)

A program has some tokens of all channels, so that u is written once and not read. u and t are rounded to x's dtype
before they are multiplied, as if apart; a row of x is met W times, by then in the nearest cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, load_float, multiply_add, sigmoid, with_rows

TOKENS = 64  # of a program
CHANNELS = 64  # of a step
WARPS = 4
STAGES = 1  # programs side by side hide the time that loads take


@triton.jit(do_not_specialize=["n_tokens", "length"])
def _scan_inputs(
    x, conv, conv_bias, x_proj, dt_proj, u, low, delta, n_tokens, length,
    X_STRIDE: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr,
    REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr, MATRICES: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * TOKENS  # addresses are of the first token, plus what 32 bits hold
    row = tl.arange(0, TOKENS)
    position = ((begin + row) % length).to(tl.int32)[:, None]
    there = (begin + row < n_tokens)[:, None]
    row = row[:, None]
    x += begin * X_STRIDE
    u += begin * WIDTH
    delta += begin * WIDTH
    low += begin * COLUMNS
    r, m, channel = tl.arange(0, RANK), R + tl.arange(0, MATRICES), tl.arange(0, CHANNELS)
    t = tl.zeros((TOKENS, RANK), tl.float32)
    matrices = tl.zeros((TOKENS, MATRICES), tl.float32)
    for first in tl.range(0, WIDTH, CHANNELS, loop_unroll_factor=1):
        d = first + channel
        in_d = d < WIDTH
        out = load_float(conv_bias, d, in_d)[None, :] + tl.zeros((TOKENS, CHANNELS), tl.float32)
        for k in tl.static_range(W):
            if REVERSE:
                at, inside = row + (W - 1 - k), position + (W - 1 - k) < length
            else:
                at, inside = row - (W - 1 - k), position >= W - 1 - k
            rows = tl.load(x + at * X_STRIDE + d[None, :], mask=there & inside & in_d[None, :], other=0.0)
            out += load_float(conv, d * W + k, in_d)[None, :] * rows.to(tl.float32)
        out *= sigmoid(out)
        rounded = out.to(u.dtype.element_ty)
        tl.store(u + row * WIDTH + d[None, :], rounded, mask=there & in_d[None, :])
        of_t = tl.load(x_proj + r[None, :] * WIDTH + d[:, None], mask=in_d[:, None] & (r < R)[None, :], other=0.0)
        of_m = tl.load(x_proj + m[None, :] * WIDTH + d[:, None], mask=in_d[:, None] & (m < COLUMNS)[None, :], other=0.0)
        t = multiply_add(rounded, of_t, t)
        matrices = multiply_add(rounded, of_m, matrices)
    narrow = t.to(low.dtype.element_ty)
    tl.store(low + row * COLUMNS + r[None, :], narrow, mask=there & (r < R)[None, :])
    tl.store(low + row * COLUMNS + m[None, :], matrices, mask=there & (m < COLUMNS)[None, :])
    for first in tl.range(0, WIDTH, CHANNELS, loop_unroll_factor=1):
        d = first + channel
        in_d = (d < WIDTH)[None, :]
        wide = tl.load(dt_proj + d[None, :] * R + r[:, None], mask=in_d & (r < R)[:, None], other=0.0)
        step = multiply_add(narrow, wide, tl.zeros((TOKENS, CHANNELS), tl.float32))
        tl.store(delta + row * WIDTH + d[None, :], step, mask=there & in_d)


def scan_inputs(
    x: Tensor, conv: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, batch: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, E) of `batch` sequences of one length, conv (E, W), x_proj (R + 2N, E), dt_proj (E, R); all but the
    convolution's weights in one dtype, of which triton_low_rank.serves. -> u (T, E), (T, R + 2N), delta (T, E)."""
    x = with_rows(x)
    (n_tokens, n_channels), (n_columns, rank) = x.shape, (len(x_proj), dt_proj.shape[1])
    u, delta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    low = x.new_empty(n_tokens, n_columns)
    with torch.cuda.device_of(x):
        launch(
            _scan_inputs, ceil_div(n_tokens, TOKENS), x, conv.contiguous(),
            None if conv_bias is None else conv_bias.contiguous(), x_proj.contiguous(), dt_proj.contiguous(), u, low,
            delta, n_tokens, n_tokens // batch, X_STRIDE=x.stride(0), WIDTH=n_channels, R=rank, COLUMNS=n_columns,
            W=conv.shape[1], REVERSE=reverse, TOKENS=TOKENS, CHANNELS=CHANNELS,
            RANK=max(triton.next_power_of_2(rank), 16),
            MATRICES=max(triton.next_power_of_2(n_columns - rank), 16), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return u, low, delta
