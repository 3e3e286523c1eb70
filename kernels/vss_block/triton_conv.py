"""silu(conv(x)) in Triton: 3 x 3, depthwise, stride 1, zeros around the image, channels last.

A program walks a piece of the tokens in tiles of tokens by channels, and adds up the nine tiles that the taps see: all
but the first read of a number is the cache's. Backwards it leaves its share of the weights' gradients; the shares are
added in a fixed order. Letters: T tokens of all images, E channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, load_float, sigmoid, sum_first_axis

TILE = 1024  # elements
PIECE = 128  # tokens of a program of the forward
PIECES = 512  # at most as many pieces of a backward, of PIECE tokens at least


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


@triton.jit(do_not_specialize=["n_tokens"])
def _forward(
    x, weight, bias, y, height, width, n_tokens, n_channels,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, SILU: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_channels, BLOCK)
    begin = tl.program_id(0) // n_blocks * PIECE
    d = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_d = d < n_channels
    weights, bias_row = _load_weights(weight, d, in_d, FLIP), load_float(bias, d, in_d)
    for first in range(begin, tl.minimum(begin + PIECE, n_tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        inside = (token < n_tokens) & in_d
        out = _convolve(_load_taps(x, token, d, inside, height, width, n_channels), weights, bias_row)
        if SILU:
            out *= sigmoid(out)
        tl.store(y + token.to(tl.int64) * n_channels + d, out, mask=inside)


@triton.jit(do_not_specialize=["n_tokens"])
def _backward(
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
    y, block = torch.empty_like(x), _block(n_channels)
    grid = ceil_div(n_tokens, PIECE) * ceil_div(n_channels, block)
    if grid:
        _forward[(grid,)](
            x, weight.contiguous(), bias, y, height, width, n_tokens, n_channels,
            TOKENS=TILE // block, BLOCK=block, PIECE=PIECE, SILU=silu, FLIP=flip, num_warps=4,
        )  # fmt: skip
    return y


def backward(dy, x, weight, bias, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of (x, weight, bias), the last two in float32. dy (T, E), contiguous."""
    n_tokens, n_channels = x.shape
    piece = max(PIECE, triton.next_power_of_2(ceil_div(n_tokens, PIECES)))
    n_pieces, n_weights, block = ceil_div(n_tokens, piece), 9 * n_channels, _block(n_channels)
    grad, weight = torch.empty_like(x), weight.contiguous()
    shares = torch.empty(n_pieces, n_weights if bias is None else n_weights + n_channels, device=x.device)
    if n_pieces:
        _backward[(n_pieces * ceil_div(n_channels, block),)](
            dy, x, weight, bias, grad, shares, height, width, n_tokens, n_channels, shares.shape[1], piece,
            TOKENS=TILE // block, BLOCK=block, num_warps=4,
        )  # fmt: skip
    sums = sum_first_axis(shares)
    dx = _run(grad, weight, None, height, width, silu=False, flip=True)
    return dx, sums[:n_weights].view(weight.shape), None if bias is None else sums[n_weights:]
