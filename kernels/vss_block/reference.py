"""VMamba's block in plain PyTorch: the definition that `vss_block` is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_scan import cross_scan_reference
from .interface import VSSWeights


def vss_block_reference(
    x: Tensor, weights: VSSWeights, *, dtype: torch.dtype, eps: float, factors: Tensor | None = None
) -> Tensor:
    """As `polymamba.kernels.vss_block.vss_block`, on any device."""
    w = VSSWeights(*(None if m is None else m.to(dtype) for m in weights))  # pyright: ignore[reportArgumentType]
    f_1, f_2 = torch.ones(2, len(x)) if factors is None else factors
    f_1, f_2 = (f.to(x)[:, None, None, None] for f in (f_1, f_2))
    (n_channels, rank), width = w.dt_proj.shape[1:], x.shape[-1:]
    a = F.linear(F.layer_norm(x.to(dtype), width, w.norm, w.norm_bias, eps), w.in_proj)
    u = F.conv2d(a.permute(0, 3, 1, 2), w.conv, w.conv_bias, padding=1, groups=n_channels)
    u = F.silu(u).permute(0, 2, 3, 1)
    dt, B, C = F.linear(u, w.x_proj.flatten(0, 1)).unflatten(-1, (4, rank + 2)).split([rank, 1, 1], dim=-1)
    A, D = -w.A_log.exp().unflatten(0, (4, n_channels)), w.D.unflatten(0, (4, n_channels))
    y = cross_scan_reference(u, dt, A, B, C, D, w.dt_proj, w.dt_bias)
    y = F.layer_norm(y, (n_channels,), w.norm_2.to(y), w.norm_2_bias.to(y), eps).to(dtype)
    x = x + f_1 * F.linear(y, w.out_proj)
    h = F.linear(F.layer_norm(x.to(dtype), width, w.norm_3, w.norm_3_bias, eps), w.fc1, w.fc1_bias)
    return x + f_2 * F.linear(F.gelu(h), w.fc2, w.fc2_bias)
