"""Causal depthwise convolution in Triton: one pass over the tokens, lanes over channels, a window of rows in registers.

One program is a tile of channels of a piece of time of one sequence. It walks the piece with the last W rows at hand,
so each row is read once (W - 1 rows twice, at the seams). The backward is one pass as well: going forwards in time it
has, at each step, the gradients before the activation of the last W steps, and so the whole gradient of the oldest
input in the window; W - 1 steps beyond the piece complete it. Shares of dweight and dbias are added in a fixed order.

Positions count steps in the direction of the convolution; the initial state holds those from -(W - 1) to -1.
"""

import torch
import triton
import triton.language as tl

from ..sequences import checkpoint_slots
from ..triton_runtime import (
    ceil_div,
    launch,
    load_float,
    load_rows,
    piece_of,
    sigmoid,
    sum_first_axis,
    token_of,
    with_rows,
)  # fmt: skip

PIECE = 64  # steps of a program of the backward: it fixes the order of sums
FORWARD_PIECE = 32  # of the forward
BLOCK_D = 128  # channels of a program, 4 a lane
UNROLL = 8  # steps whose rows are loaded at once
BACKWARD_UNROLL = 4  # by the backward, a group ahead


@triton.jit
def _rows_before(
    x, state, start, length, begin, stride, state_at, d, in_d, W: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The W - 1 rows before position `begin`: of the sequence or, before its start, of the state (else zeros)."""
    rows = ()
    for k in tl.static_range(W - 1):
        position = begin - (W - 1) + k
        token = token_of(start, length, position, REVERSE)
        row = load_float(x, token * stride + d, in_d & (position >= 0) & (position < length))
        rows += (row + load_float(state, state_at + (W - 1 + position), in_d & (position < 0)),)
    return rows


@triton.jit
def _load_taps(weight, d, in_d, W: tl.constexpr):
    taps = ()
    for k in tl.static_range(W):
        taps += (load_float(weight, d * W + k, in_d),)
    return taps


@triton.jit
def _convolve(window, taps, bias, W: tl.constexpr):
    y = bias
    for k in tl.static_range(W):
        y += taps[k] * window[k]
    return y


@triton.jit(do_not_specialize=["length", "n_seqs"])
def _forward(
    x, weight, bias, state, cu_seqlens, y, x_stride, length, n_seqs, n_channels,
    W: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr, K: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_channels, BLOCK_D)
    s, start, length, begin = piece_of(cu_seqlens, n_seqs, length, tl.program_id(0) // n_tiles, PIECE)
    d = tl.program_id(0) % n_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < n_channels
    state_at = (s.to(tl.int64) * n_channels + d) * (W - 1)
    taps, bias_row = _load_taps(weight, d, in_d, W), load_float(bias, d, in_d)
    window = _rows_before(x, state, start, length, begin, x_stride, state_at, d, in_d, W, REVERSE)
    for step in range(begin, tl.minimum(begin + PIECE, length), K):
        token = token_of(start, length, step, REVERSE)
        rows = load_rows(x, token, x_stride, d, in_d, step, length, K, REVERSE)
        for i in tl.static_range(K):
            window += (rows[i].to(tl.float32),)
            out = _convolve(window, taps, bias_row, W)
            if SILU:
                out *= sigmoid(out)
            row = token - i if REVERSE else token + i
            tl.store(y + row * n_channels + d, out, mask=in_d & (step + i < length))
            window = window[1:]


@triton.jit(do_not_specialize=["length", "n_seqs"])
def _both_ways(
    x, weight, bias, weight_back, bias_back, cu_seqlens, y, y_back, x_stride, length, n_seqs, n_channels,
    W: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_channels, BLOCK_D)
    _, start, length, begin = piece_of(cu_seqlens, n_seqs, length, tl.program_id(0) // n_tiles, PIECE)
    d = tl.program_id(0) % n_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < n_channels
    taps, bias_row = _load_taps(weight, d, in_d, W), load_float(bias, d, in_d)
    taps_back, bias_row_back = _load_taps(weight_back, d, in_d, W), load_float(bias_back, d, in_d)
    window = ()  # the rows that a step's two results see; the step's own is number W - 1
    for k in tl.static_range(2 * W - 2):
        position = begin - (W - 1) + k
        there = in_d & (position >= 0) & (position < length)
        window += (load_float(x, (start + position) * x_stride + d, there),)
    for step in range(begin, tl.minimum(begin + PIECE, length), K):
        last = step + (W - 1)
        rows = load_rows(x, start + last, x_stride, d, in_d, last, length, K, False)
        for i in tl.static_range(K):
            window += (rows[i].to(tl.float32),)
            out, back = bias_row, bias_row_back
            for k in tl.static_range(W):
                out += taps[k] * window[k]
                back += taps_back[k] * window[2 * W - 2 - k]
            if SILU:
                out *= sigmoid(out)
                back *= sigmoid(back)
            at, inside = (start + step + i) * n_channels + d, in_d & (step + i < length)
            tl.store(y + at, out, mask=inside)
            tl.store(y_back + at, back, mask=inside)
            window = window[1:]


@triton.jit(do_not_specialize=["length", "n_seqs"])
def _backward(
    dy, x, weight, bias, state, cu_seqlens, dx, dweight, dbias, dstate,
    dy_stride, dx_stride, x_stride, share_stride, length, n_seqs, n_channels,
    W: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr, K: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_channels, BLOCK_D)
    number = tl.program_id(0) // n_tiles
    s, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, PIECE)
    d = tl.program_id(0) % n_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < n_channels
    state_at = (s.to(tl.int64) * n_channels + d) * (W - 1)
    taps, bias_row = _load_taps(weight, d, in_d, W), load_float(bias, d, in_d)
    window = _rows_before(x, state, start, length, begin, x_stride, state_at, d, in_d, W, REVERSE)
    grads, dtaps = (), ()  # dL/d(before the activation) of the last W - 1 steps; this program's share of dweight
    for k in tl.static_range(W):
        dtaps += (tl.zeros((BLOCK_D,), tl.float32),)
        if k > 0:
            grads += (tl.zeros((BLOCK_D,), tl.float32),)
    sum_dbias = tl.zeros((BLOCK_D,), tl.float32)

    end = tl.minimum(begin + PIECE, length)
    # An empty sequence has a first piece too: there the gradient of its state is written.
    last = tl.where((begin < length) | (begin == 0), end + (W - 1), begin)
    read = tl.minimum(last, length)
    token = token_of(start, length, begin, REVERSE)
    next_rows = load_rows(x, token, x_stride, d, in_d, begin, read, K, REVERSE)
    next_dys = load_rows(dy, token, dy_stride, d, in_d, begin, read, K, REVERSE)
    for step in range(begin, last, K):
        rows, dys = next_rows, next_dys
        token = token_of(start, length, step + K, REVERSE)
        next_rows = load_rows(x, token, x_stride, d, in_d, step + K, read, K, REVERSE)
        next_dys = load_rows(dy, token, dy_stride, d, in_d, step + K, read, K, REVERSE)
        for i in tl.static_range(K):
            window += (rows[i].to(tl.float32),)
            grad = dys[i].to(tl.float32)
            if SILU:
                out = _convolve(window, taps, bias_row, W)
                gate = sigmoid(out)
                grad *= gate * (1.0 + out * (1.0 - gate))
            grads += (grad,)
            own = tl.where(step + i < end, grad, 0.0)  # what is beyond the piece counts in the next one
            sum_dbias += own
            sums = ()
            for k in tl.static_range(W):
                sums += (dtaps[k] + own * window[k],)
            dtaps = sums

            dx_row = tl.zeros((BLOCK_D,), tl.float32)
            for k in tl.static_range(W):
                dx_row += taps[W - 1 - k] * grads[k]
            target = step + i - (W - 1)  # the oldest input of the window: no later step sees it
            row = token_of(start, length, target, REVERSE)
            tl.store(dx + row * dx_stride + d, dx_row, mask=in_d & (target >= begin) & (target < end))
            if dstate is not None:
                tl.store(dstate + state_at + (W - 1 + target), dx_row, mask=in_d & (target < 0))
            window = window[1:]
            grads = grads[1:]
    share = number.to(tl.int64) * share_stride
    for k in tl.static_range(W):
        tl.store(dweight + share + d * W + k, dtaps[k], mask=in_d)
    if dbias is not None:
        tl.store(dbias + share + d, sum_dbias, mask=in_d)


@triton.jit
def _step(
    state, x, weight, bias, y, x_stride, n_channels, W: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    n_tiles = tl.cdiv(n_channels, BLOCK_D)
    s = (tl.program_id(0) // n_tiles).to(tl.int64)
    d = tl.program_id(0) % n_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < n_channels
    state += (s * n_channels + d) * (W - 1)
    window = ()
    for k in tl.static_range(W - 1):
        window += (load_float(state, k, in_d),)
    window += (load_float(x, s * x_stride + d, in_d),)
    out = _convolve(window, _load_taps(weight, d, in_d, W), load_float(bias, d, in_d), W)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + s * n_channels + d, out, mask=in_d)
    for k in tl.static_range(W - 1):
        tl.store(state + k, window[k + 1], mask=in_d)


def _arguments(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse, piece) -> tuple[int, dict]:
    """What both directions share: the number of pieces, and arguments of the kernels."""
    n_tokens, n_channels = x.shape
    length = n_tokens // max(batch, 1)
    if cu_seqlens is None:
        n_seqs, n_pieces = batch, batch * max(ceil_div(length, piece), 1)
    else:
        n_seqs = cu_seqlens.shape[0] - 1
        n_pieces = checkpoint_slots(n_tokens, n_seqs, piece)
    x = with_rows(x)
    bias, state, cu_seqlens = (None if t is None else t.contiguous() for t in (bias, initial_state, cu_seqlens))
    return n_pieces, {
        "x": x, "weight": weight.contiguous(), "bias": bias, "cu_seqlens": cu_seqlens, "x_stride": x.stride(0),
        "state": state, "length": length, "n_seqs": n_seqs, "n_channels": n_channels, "W": weight.shape[1],
        "BLOCK_D": BLOCK_D, "PIECE": piece, "K": UNROLL, "SILU": silu, "REVERSE": reverse, "num_warps": 1,
    }  # fmt: skip


def forward(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse):
    n_pieces, arguments = _arguments(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse, FORWARD_PIECE)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(_forward, n_pieces * ceil_div(x.shape[1], BLOCK_D), **arguments, y=y)
    return y


def both_ways(x, weight, bias, weight_back, bias_back, cu_seqlens, batch, silu):
    """`forward` with the first weights, and with the second ones reversed, to the bit; x is read once."""
    n_pieces, arguments = _arguments(x, weight, bias, None, cu_seqlens, batch, silu, False, FORWARD_PIECE)
    del arguments["state"], arguments["REVERSE"]
    y, y_back = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    bias_back = None if bias_back is None else bias_back.contiguous()
    with torch.cuda.device_of(x):
        launch(
            _both_ways, n_pieces * ceil_div(x.shape[1], BLOCK_D), **arguments, weight_back=weight_back.contiguous(),
            bias_back=bias_back, y=y, y_back=y_back,
        )  # fmt: skip
    return y, y_back


def backward(dy, x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse, dx=None):
    """Gradients of (x, weight, bias, initial_state). dx: room for the first, perhaps columns of a wider matrix."""
    n_pieces, arguments = _arguments(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse, PIECE)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    n_weights = weight.numel()
    shares = torch.empty(n_pieces, n_weights + (0 if bias is None else len(bias)), device=x.device)  # of dweight, dbias
    dstate = None if initial_state is None else torch.empty(initial_state.shape, device=x.device)
    dy, arguments["K"] = with_rows(dy), BACKWARD_UNROLL
    with torch.cuda.device_of(x):
        launch(
            _backward,
            n_pieces * ceil_div(x.shape[1], BLOCK_D),
            **arguments,
            dy=dy,
            dy_stride=dy.stride(0),
            dx=dx,
            dx_stride=dx.stride(0),
            dweight=shares,
            dbias=None if bias is None else shares[:, n_weights:],
            share_stride=shares.shape[1],
            dstate=dstate,
        )
        sums = sum_first_axis(shares)
    return dx, sums[:n_weights].view(weight.shape), None if bias is None else sums[n_weights:], dstate


def step(state, x, weight, bias, silu):
    n_rows, n_channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, window, bias = with_rows(x), state.contiguous(), None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        _step[(n_rows * ceil_div(n_channels, BLOCK_D),)](
            window, x, weight.contiguous(), bias, y, x.stride(0), n_channels,
            W=weight.shape[1], BLOCK_D=BLOCK_D, SILU=silu, num_warps=1,
        )  # fmt: skip
    if window is not state:
        state.copy_(window)
    return y
