"""What an MLP's backward does beside its products, in Triton: in one pass each, with shares of the biases' gradients.

A program walks a piece of the tokens in tiles of tokens by channels. Letters: T tokens, C channels, F width of the MLP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, load_float

TOKENS, BLOCK = 16, 128  # of a tile


@triton.jit(do_not_specialize=["n_tokens", "tokens_a_factor"])
def _scale(
    x, factors, y, shares, n_tokens, tokens_a_factor, n_channels, share_stride, piece,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        out = load_float(x, at, inside)
        if factors is not None:
            out *= load_float(factors, token // tokens_a_factor, token < n_tokens)
        tl.store(y + at, out, mask=inside)
        total += out
    tl.store(shares + number.to(tl.int64) * share_stride + channel, tl.sum(total, axis=0), mask=channel < n_channels)


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


def scale(x: Tensor, factors: Tensor | None, dtype: torch.dtype, shares: Tensor, piece: int) -> Tensor:
    """x (T, C), its rows times factors (K,), each for as many, in a dtype. What pieces of so many tokens share of the
    sum over all goes to `shares` (pieces, C), columns of a matrix perhaps."""
    (n_tokens, n_channels), y = x.shape, torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(
        _scale, shares.shape[0] * ceil_div(n_channels, BLOCK), x, factors, y, shares, n_tokens,
        1 if factors is None else n_tokens // factors.shape[0], n_channels, shares.stride(0), piece, TOKENS=TOKENS,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def gelu_backward(dy: Tensor, h: Tensor, shares: Tensor, piece: int) -> tuple[Tensor, Tensor]:
    """gelu(h) and the gradient of h, (T, F) as dy and h; shares (pieces, F) of its sum as of `scale`."""
    (n_tokens, n_channels), y, dh = h.shape, torch.empty_like(h), torch.empty_like(h)
    launch(
        _gelu_backward, shares.shape[0] * ceil_div(n_channels, BLOCK), dy, h, y, dh, shares, n_tokens, n_channels,
        shares.stride(0), piece, TOKENS=TOKENS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y, dh
