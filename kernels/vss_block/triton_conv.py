"""silu(conv(x)) in Triton: 3 x 3, depthwise, stride 1, zeros around the image, channels last.

A program of the forward walks down a strip of the image, for some channels, and keeps of each row what the next two
need. One of the backward walks a piece of the tokens in tiles of tokens by channels, and leaves its share of the
weights' gradients; the shares are added in a fixed order. Letters: T tokens of all images, E channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, load_float, sigmoid

STRIP, ROWS, AT_ONCE = 8, 32, 4  # columns and rows of a program of the forward; rows that are loaded at once
TILE = 1024  # elements of a tile of the backward
PIECE, PIECES = 128, 512  # tokens of a program of the backward, at least; at most as many of them


@triton.jit
def _load_weights(weight, d, in_d, FLIP: tl.constexpr):
    weights = ()
    for k in tl.static_range(9):
        weights += (load_float(weight, d * 9 + (8 - k if FLIP else k), in_d),)
    return weights


@triton.jit
def _load_taps(x, token, d, inside, height, width, n_channels):
    """The nine inputs of each token's result, row by row."""
    column, row = token % width, token // width % height
    first = x + token.to(tl.int64) * n_channels + d
    taps = ()
    for i in tl.static_range(-1, 2):
        for j in tl.static_range(-1, 2):
            there = inside & (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
            taps += (tl.load(first + (i * width + j) * n_channels, mask=there, other=0.0),)
    return taps


@triton.jit
def _convolve(taps, weights, bias_row):
    total = bias_row + taps[0].to(tl.float32) * weights[0]
    for k in tl.static_range(1, 9):
        total += taps[k].to(tl.float32) * weights[k]
    return total


@triton.jit
def _load_row(x, row, column, d, in_d, height, width, n_channels):
    """Of a row of the image, what is left of each column, in it, and right of it."""
    first = x + (row * width + column).to(tl.int64) * n_channels + d
    in_row = in_d & (row >= 0) & (row < height)
    taps = ()
    for j in tl.static_range(-1, 2):
        there = in_row & (column + j >= 0) & (column + j < width)
        taps += (tl.load(first + j * n_channels, mask=there, other=0.0),)
    return taps


@triton.jit
def _conv_forward(
    x, weight, bias, y, height, width, n_pieces, n_channels,
    STRIP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    SILU: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    n_blocks, n_strips = tl.cdiv(n_channels, BLOCK), tl.cdiv(width, STRIP)
    number = tl.program_id(0)
    d = number % n_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    column = number // n_blocks % n_strips * STRIP + tl.arange(0, STRIP)[:, None]
    number = number // n_blocks // n_strips
    begin = number % n_pieces * ROWS
    end = tl.minimum(begin + ROWS, height)
    of_image = (number // n_pieces).to(tl.int64) * height * width * n_channels
    x += of_image
    y += of_image
    in_d = d < n_channels
    weights, bias_row = _load_weights(weight, d, in_d, FLIP), load_float(bias, d, in_d)
    window = _load_row(x, begin - 1, column, d, in_d, height, width, n_channels)
    window += _load_row(x, begin, column, d, in_d, height, width, n_channels)
    for first in range(begin, end, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            window += _load_row(x, first + i + 1, column, d, in_d, height, width, n_channels)
        for i in tl.static_range(AT_ONCE):
            out = _convolve(window, weights, bias_row)
            if SILU:
                out *= sigmoid(out)
            row = first + i
            at = (row * width + column).to(tl.int64) * n_channels + d
            tl.store(y + at, out, mask=in_d & (column < width) & (row < end))
            window = window[3:]


@triton.jit(do_not_specialize=["n_tokens"])
def _conv_backward(
    dy, x, weight, bias, grad, shares, height, width, n_tokens, n_channels, share_stride, piece,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, and shares of the weights' gradients."""
    n_blocks = tl.cdiv(n_channels, BLOCK)
    number = tl.program_id(0) // n_blocks
    begin = number * piece
    d = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_d = d < n_channels
    weights, bias_row = _load_weights(weight, d, in_d, False), load_float(bias, d, in_d)
    sums = ()
    for _ in tl.static_range(9):
        sums += (tl.zeros((TOKENS, BLOCK), tl.float32),)
    sum_bias = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(begin, tl.minimum(begin + piece, n_tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        inside = (token < n_tokens) & in_d
        taps = _load_taps(x, token, d, inside, height, width, n_channels)
        at = token.to(tl.int64) * n_channels + d
        own = load_float(dy, at, inside)
        out = _convolve(taps, weights, bias_row)
        gate = sigmoid(out)
        own *= gate * (1.0 + out * (1.0 - gate))
        tl.store(grad + at, own, mask=inside)
        added = ()
        for k in tl.static_range(9):
            added += (sums[k] + own * taps[k].to(tl.float32),)
        sums = added
        sum_bias += own
    share = shares + number.to(tl.int64) * share_stride
    channel = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(9):
        tl.store(share + channel * 9 + k, tl.sum(sums[k], axis=0), mask=channel < n_channels)
    if bias is not None:
        tl.store(share + n_channels * 9 + channel, tl.sum(sum_bias, axis=0), mask=channel < n_channels)


def _block(n_channels: int) -> int:
    return 64 if n_channels % 64 == 0 else 32


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """x (T, E), contiguous, weight (E, 1, 3, 3) -> (T, E)."""
    return _run(x, weight, bias, height, width, silu=True, flip=False)


def _run(x, weight, bias, height, width, silu, flip) -> Tensor:
    n_tokens, n_channels = x.shape
    y, block, n_pieces = torch.empty_like(x), _block(n_channels), ceil_div(height, ROWS)
    n_strips = n_tokens // max(height * width, 1) * n_pieces * ceil_div(width, STRIP)
    launch(
        _conv_forward, n_strips * ceil_div(n_channels, block), x, weight.contiguous(), bias, y, height, width, n_pieces,
        n_channels, STRIP=STRIP, BLOCK=block, ROWS=ROWS, AT_ONCE=AT_ONCE, SILU=silu, FLIP=flip, num_warps=block // 32,
    )  # fmt: skip
    return y


def pieces_of(n_tokens: int) -> tuple[int, int]:
    """(how many programs share out the tokens, how many tokens each has): of kernels that leave shares of sums."""
    piece = max(PIECE, triton.next_power_of_2(ceil_div(n_tokens, PIECES)))
    return ceil_div(n_tokens, piece), piece


def backward_with_shares(dy, x, weight, bias, height: int, width: int, shares: Tensor) -> Tensor:
    """The gradient of x; dy (T, E), contiguous. What the weight's, then the bias's are sums of is left in `shares`,
    float32, columns of a matrix perhaps, with a row for each of `pieces_of`."""
    n_tokens, n_channels = x.shape
    n_pieces, piece = pieces_of(n_tokens)
    block, grad, weight = _block(n_channels), torch.empty_like(x), weight.contiguous()
    launch(
        _conv_backward, n_pieces * ceil_div(n_channels, block), dy, x, weight, bias, grad, shares, height, width,
        n_tokens, n_channels, shares.stride(0), piece, TOKENS=TILE // block, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return _run(grad, weight, None, height, width, silu=False, flip=True)
