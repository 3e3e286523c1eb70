"""A Mamba block's step in plain PyTorch: the definition that the other backends are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm import norm_reference


def mamba_step_reference(x, stream, conv_state, ssm_state, weights, eps, centred) -> tuple[Tensor, Tensor]:
    """`polymamba.kernels.mamba_step`, its checks aside: (out, stream)."""
    w = weights
    rank, n_states = w.dt_proj.shape[1], w.A_log.shape[1]
    normed, stream = norm_reference(x, stream, w.norm, w.norm_bias, eps, centred, w.norm.dtype)
    u, z = F.linear(normed, w.in_proj).chunk(2, dim=-1)
    window = torch.cat((conv_state, u[:, :, None]), dim=-1)
    conv_state.copy_(window[..., 1:])
    u = (window * w.conv).sum(-1)
    u = F.silu(u if w.conv_bias is None else u + w.conv_bias)
    dt, B, C = F.linear(u, w.x_proj).split([rank, n_states, n_states], dim=-1)
    dt = F.softplus(F.linear(dt, w.dt_proj).to(ssm_state.dtype) + w.dt_bias, threshold=30.0)
    decay = torch.exp(dt[:, :, None] * -torch.exp(w.A_log.to(ssm_state.dtype)))
    ssm_state.copy_(decay * ssm_state + (dt * u)[:, :, None] * B[:, None])
    y = (ssm_state * C[:, None]).sum(-1) + w.D * u
    return F.linear((y * F.silu(z)).to(x.dtype), w.out_proj), stream
