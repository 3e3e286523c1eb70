"""Residual add and norm in plain PyTorch: the definition that the other backends are tested against."""

import torch
from torch import Tensor


def norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`polymamba.kernels.layer_norm` if centred, else `rms_norm`: (y, stream)."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    stream = x.to(accumulate) if residual is None else residual + x.to(accumulate)
    values = stream - stream.mean(-1, keepdim=True) if centred else stream
    y = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.to(accumulate)
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(dtype), stream
