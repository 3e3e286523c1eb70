"""(t, B, C) = u W_x' and delta = t W_dt' of the Mamba block as one kernel in Triton, where t has an odd rank.

cuBLAS takes 16-bit matrices at full speed only if their rows begin at multiples of 16 bytes: a rank of 12, as Vim's, is
none. Here a program has some tokens of all columns; t is rounded to u's dtype before it is multiplied, as if apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, multiply_add, with_rows

TOKENS = 64  # of a program
CHANNELS = 64  # of a step
WIDEST = 64  # rank and B, C together that fit a program


@triton.jit(do_not_specialize=["n_tokens"])
def _low_rank(
    u, x_proj, dt_proj, low, delta, n_tokens, u_stride, n_channels, rank, n_columns,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr, MATRICES: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    there = token < n_tokens
    r, m, channel = tl.arange(0, RANK), rank + tl.arange(0, MATRICES), tl.arange(0, CHANNELS)
    t = tl.zeros((TOKENS, RANK), tl.float32)
    matrices = tl.zeros((TOKENS, MATRICES), tl.float32)
    for first in range(0, n_channels, CHANNELS):
        d = first + channel
        in_d = d < n_channels
        rows = tl.load(u + token * u_stride + d[None, :], mask=there & in_d[None, :], other=0.0)
        of_t = tl.load(
            x_proj + r[None, :] * n_channels + d[:, None], mask=in_d[:, None] & (r < rank)[None, :], other=0.0
        )
        of_m = tl.load(
            x_proj + m[None, :] * n_channels + d[:, None], mask=in_d[:, None] & (m < n_columns)[None, :], other=0.0
        )
        t = multiply_add(rows, of_t, t)
        matrices = multiply_add(rows, of_m, matrices)
    rounded = t.to(low.dtype.element_ty)
    tl.store(low + token * n_columns + r[None, :], rounded, mask=there & (r < rank)[None, :])
    tl.store(low + token * n_columns + m[None, :], matrices, mask=there & (m < n_columns)[None, :])
    for first in range(0, n_channels, CHANNELS):
        d = first + channel
        in_d = (d < n_channels)[None, :]
        wide = tl.load(dt_proj + d[None, :] * rank + r[:, None], mask=in_d & (r < rank)[:, None], other=0.0)
        step = multiply_add(rounded, wide, tl.zeros((TOKENS, CHANNELS), tl.float32))
        tl.store(delta + token * n_channels + d[None, :], step, mask=there & in_d)


def serves(u: Tensor, rank: int, n_columns: int) -> bool:
    """Whether this is faster than two products by cuBLAS, and can be compiled."""
    if u.dtype.itemsize != 2 or rank % 8 == 0 or n_columns > WIDEST:
        return False
    return not u.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(u.device) >= (8, 0)


def low_rank(u: Tensor, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
    """u (T, E), x_proj (R + 2N, E), dt_proj (E, R), all of one dtype -> (T, R + 2N), delta (T, E)."""
    u = with_rows(u)
    (n_tokens, n_channels), (n_columns, rank) = u.shape, (len(x_proj), dt_proj.shape[1])
    low, delta = u.new_empty(n_tokens, n_columns), torch.empty(u.shape, dtype=u.dtype, device=u.device)
    with torch.cuda.device_of(u):
        launch(
            _low_rank, ceil_div(n_tokens, TOKENS), u, x_proj.contiguous(), dt_proj.contiguous(), low, delta, n_tokens,
            u.stride(0), n_channels, rank, n_columns, TOKENS=TOKENS, CHANNELS=CHANNELS,
            RANK=max(triton.next_power_of_2(rank), 16), MATRICES=max(triton.next_power_of_2(n_columns - rank), 16),
            num_warps=4,
        )  # fmt: skip
    return low, delta
