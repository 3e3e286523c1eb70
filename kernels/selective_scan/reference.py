"""Selective scan in plain PyTorch: the definition that every other backend is tested against.

A Python loop over time. Any float or complex dtype, float64 included; differentiable as often as one likes. Slow.

Letters, as in the Mamba paper (arXiv 2312.00752, section 3, algorithm 2): B batch, L length, D channels, N states,
G groups; u the input, delta the step size, A the decay, B the input matrix, C the output matrix, h the state.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor


def selective_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    *, delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
    return_final_state: bool = False, cu_seqlens: Tensor | None = None, reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """As `polymamba.kernels.selective_scan`, by its recurrence."""
    if cu_seqlens is not None:
        return _each_sequence_alone(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_final_state, cu_seqlens, reverse
        )
    if reverse:
        u, delta, z = u.flip(1), delta.flip(1), None if z is None else z.flip(1)
        B, C = (x if x.dim() == 2 else x.flip(1) for x in (B, C))

    accumulate = torch.promote_types(u.dtype, torch.float32)
    x, dt = u.to(accumulate), delta.to(accumulate)
    A = A.to(accumulate.to_complex() if A.is_complex() else accumulate)
    if delta_bias is not None:
        dt = dt + delta_bias.to(accumulate)
    if delta_softplus:
        dt = F.softplus(dt, threshold=88.0 if accumulate == torch.float32 else 700.0)
    B, C = (_per_channel(m, u.shape, A.dtype) for m in (B, C))

    decay = torch.exp(einsum(dt, A, "b l d, d n -> b l d n"))
    drive = einsum(dt, x, B, "b l d, b l d, b l d n -> b l d n")
    h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(A.dtype)
    outputs = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        outputs.append(einsum(C[:, t], h, "b d n, b d n -> b d"))
    y = torch.stack(outputs, dim=1) if outputs else x
    if A.is_complex():
        y = 2 * y.real
    if D is not None:
        y = y + D.to(accumulate) * x
    if z is not None:
        y = y * F.silu(z.to(accumulate))
    y = y.to(u.dtype)
    y = y.flip(1) if reverse else y
    return (y, h) if return_final_state else y


def _per_channel(matrix: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """B or C in any of its three forms as (B, L, D, N)."""
    batch, length, n_channels = shape
    if matrix.dim() == 2:
        return repeat(matrix.to(dtype), "d n -> b l d n", b=batch, l=length)
    if matrix.dim() == 3:
        matrix = matrix[:, :, None]
    return matrix.to(dtype).repeat_interleave(n_channels // matrix.shape[2], dim=2)


def _each_sequence_alone(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_final_state, cu_seqlens, reverse
) -> Tensor | tuple[Tensor, Tensor]:
    outputs, states = [], []
    for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        u_, delta_, z_ = u[:, start:end], delta[:, start:end], None if z is None else z[:, start:end]
        B_, C_ = (m if m.dim() == 2 else m[:, start:end] for m in (B, C))
        h0 = None if initial_state is None else initial_state[s : s + 1]
        options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "initial_state": h0, "reverse": reverse}
        y, h = selective_scan_reference(u_, delta_, A, B_, C_, D, z_, return_final_state=True, **options)
        outputs.append(y)
        states.append(h)
    y, h = torch.cat(outputs, dim=1), torch.cat(states)
    return (y, h) if return_final_state else y


def selective_scan_step_reference(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, *, delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """As `polymamba.kernels.selective_scan_step`: one step of the scan, `state` updated in place."""
    B, C = (m if m.dim() == 2 else m[:, None] for m in (B, C))
    z = None if z is None else z[:, None]
    options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "initial_state": state}
    y, final = selective_scan_reference(u[:, None], delta[:, None], A, B, C, D, z, return_final_state=True, **options)
    state.copy_(final)
    return y[:, 0]
