"""The gradient of what VMamba's block projects (dt's low rank, B and C of each direction) as one kernel in Triton.

A program has some tokens of one direction. Letters: T tokens, E channels, R rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, multiply_add

TOKENS, CHANNELS = 64, 64  # of a program, and what it multiplies at once


@triton.jit(do_not_specialize=["n_tokens"])
def _gradient(
    ddelta, dt_weight, share_BC, dlow, n_tokens, n_channels, rank, n_shares,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) % 4
    number = tl.program_id(0) // 4 * TOKENS + tl.arange(0, TOKENS)
    there, token = number < n_tokens, number.to(tl.int64)
    r, channel = tl.arange(0, RANK), tl.arange(0, CHANNELS)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for first in range(0, n_channels, CHANNELS):
        d = first + channel
        in_d = d < n_channels
        at = (token[:, None] * 4 + k) * n_channels + d[None, :]
        rows = tl.load(ddelta + at, mask=there[:, None] & in_d[None, :], other=0.0)
        weights = tl.load(
            dt_weight + (k * n_channels + d[:, None]) * rank + r[None, :], mask=in_d[:, None] & (r < rank)[None, :],
            other=0.0,
        )  # fmt: skip
        total = multiply_add(rows, weights.to(rows.dtype), total)
    first_of = dlow + (token * 4 + k) * (rank + 2)
    tl.store(first_of[:, None] + r[None, :], total, mask=there[:, None] & (r < rank)[None, :])
    for i in tl.static_range(2):
        of_matrix = tl.zeros((TOKENS,), tl.float32)
        for share in range(n_shares):
            at = ((share * 2 + i) * 4 + k).to(tl.int64) * n_tokens + token
            of_matrix += tl.load(share_BC + at, mask=there, other=0.0)
        tl.store(first_of + rank + i, of_matrix, mask=there)


def gradient(ddelta: Tensor, dt_weight: Tensor, share_BC: Tensor) -> Tensor:
    """ddelta (T, 4 E), dt_weight (4, E, R), shares of the gradients of B and C (shares, 2, 4, T), which are added up
    in order -> (T, 4 (R + 2)) in ddelta's dtype, to which dt_weight is rounded."""
    (n_tokens, _), (_, n_channels, rank) = ddelta.shape, dt_weight.shape
    dlow = torch.empty(n_tokens, 4 * (rank + 2), dtype=ddelta.dtype, device=ddelta.device)
    launch(
        _gradient, 4 * ceil_div(n_tokens, TOKENS), ddelta, dt_weight.contiguous(), share_BC, dlow, n_tokens, n_channels,
        rank, share_BC.shape[0], TOKENS=TOKENS, CHANNELS=CHANNELS, RANK=max(1 << (rank - 1).bit_length(), 16),
        num_warps=4,
    )  # fmt: skip
    return dlow
