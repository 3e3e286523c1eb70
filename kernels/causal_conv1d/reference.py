"""Causal depthwise convolution in plain PyTorch: the definition that the other backends are tested against."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """As `polymamba.kernels.causal_conv1d` without the final state."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        pieces = [
            causal_conv1d_reference(
                x[:, start:end], weight, bias, activation=activation, reverse=reverse,
                initial_state=None if initial_state is None else initial_state[s : s + 1],
            )
            for s, (start, end) in enumerate(pairwise(ends))
        ]  # fmt: skip
        return torch.cat(pieces, dim=1)
    if reverse:
        flipped = causal_conv1d_reference(x.flip(1), weight, bias, activation=activation, initial_state=initial_state)
        return flipped.flip(1)
    width = weight.shape[1]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(x.shape[0], x.shape[2], width - 1) if initial_state is None else initial_state
    padded = torch.cat((before.mT.to(accumulate), x.to(accumulate)), dim=1)
    y = torch.zeros_like(x, dtype=accumulate) if bias is None else bias.to(accumulate)
    for k in range(width):
        y = y + padded[:, k : k + x.shape[1]] * weight[:, k].to(accumulate)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)


def causal_conv1d_step_reference(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> Tensor:
    """As `polymamba.kernels.causal_conv1d_step`."""
    y = causal_conv1d_reference(x[:, None], weight, bias, activation=activation, initial_state=state)
    state.copy_(torch.cat((state, x[..., None].to(state.dtype)), dim=-1)[..., 1:])
    return y[:, 0]
