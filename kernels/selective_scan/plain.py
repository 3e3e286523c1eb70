"""Selective scan as ordinary PyTorch operations and nothing else, for formats that know no operator of ours (ONNX).

All steps advance together by recursive doubling (Hillis and Steele, 1986): after k rounds each step holds the
recurrence of the last 2^k steps as a pair (decay, input), so a graph of it has O(log L) operations and not L of them.
It holds (B, L, D, N) tensors: for graphs of single images, not for training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_plain(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    *, delta_bias: Tensor | None = None, delta_softplus: bool = False, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """As `polymamba.kernels.selective_scan` of real A without states or packs; B batch, L length, D channels."""
    length, n_channels = u.shape[1], u.shape[2]
    real = torch.promote_types(u.dtype, torch.float32)
    x, dt = u.to(real), delta.to(real)
    if delta_bias is not None:
        dt = dt + delta_bias.to(real)
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (_per_channel(m.to(real), n_channels) for m in (B, C))  # broadcast against (B, L, D, N)
    decay = torch.exp(dt[..., None] * A.to(real))
    h = (dt * x)[..., None] * B
    shift = 1
    while shift < length:
        if reverse:
            h = torch.cat((h[:, :-shift] + decay[:, :-shift] * h[:, shift:], h[:, -shift:]), 1)
            decay = torch.cat((decay[:, :-shift] * decay[:, shift:], decay[:, -shift:]), 1)
        else:
            h = torch.cat((h[:, :shift], h[:, shift:] + decay[:, shift:] * h[:, :-shift]), 1)
            decay = torch.cat((decay[:, :shift], decay[:, shift:] * decay[:, :-shift]), 1)
        shift *= 2
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype)


def _per_channel(matrix: Tensor, n_channels: int) -> Tensor:
    if matrix.dim() == 2:
        return matrix
    if matrix.dim() == 3:
        return matrix[:, :, None]
    return matrix.repeat_interleave(n_channels // matrix.shape[2], dim=2)
