"""GELU's part of an MLP's backward in one pass in Triton: gelu(h) again, the gradient of h, and shares of its sum.

A program walks a piece of the tokens in tiles of tokens by channels. Letters: T tokens, F width of the MLP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, load_float

TOKENS, BLOCK = 16, 128  # of a tile


@triton.jit(do_not_specialize=["n_tokens"])
def _gelu_backward(
    dy, h, y, dh, shares, n_tokens, n_channels, share_stride, piece, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    n_blocks = tl.cdiv(n_channels, BLOCK)
    number = tl.program_id(0) // n_blocks
    begin = number * piece
    channel = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    d = channel[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(begin, tl.minimum(begin + piece, n_tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        inside = (token < n_tokens) & (d < n_channels)
        at = token.to(tl.int64) * n_channels + d
        x = load_float(h, at, inside)
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
        grad = load_float(dy, at, inside) * (below + x * density)
        tl.store(y + at, x * below, mask=inside)
        tl.store(dh + at, grad, mask=inside)
        total += grad
    tl.store(shares + number.to(tl.int64) * share_stride + channel, tl.sum(total, axis=0), mask=channel < n_channels)


def gelu_backward(dy: Tensor, h: Tensor, shares: Tensor, piece: int) -> tuple[Tensor, Tensor]:
    """gelu(h) and the gradient of h, (T, F) as dy and h; what pieces of so many tokens share of its sum over all goes
    to `shares` (pieces, F), columns of a matrix perhaps."""
    (n_tokens, n_channels), y, dh = h.shape, torch.empty_like(h), torch.empty_like(h)
    launch(
        _gelu_backward, shares.shape[0] * ceil_div(n_channels, BLOCK), dy, h, y, dh, shares, n_tokens, n_channels,
        shares.stride(0), piece, TOKENS=TOKENS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y, dh
