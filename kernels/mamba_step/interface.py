"""The public step of a whole Mamba block, for decoding: checks and choice of a backend."""

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from .reference import mamba_step_reference


class MambaWeights(NamedTuple):
    """Of a norm and the Mamba block behind it. M model width, E inner width, R rank of dt, N states, W conv width."""

    norm: Tensor  # (M,)
    norm_bias: Tensor | None
    in_proj: Tensor  # (2E, M)
    conv: Tensor  # (E, W)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    out_proj: Tensor  # (M, E)


def mamba_step(
    x: Tensor, stream: Tensor | None, conv_state: Tensor, ssm_state: Tensor, weights: MambaWeights, eps: float = 1e-5,
    *, centred: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of each of B sequences through residual add, norm and a whole Mamba block, in as few passes as pay.

        stream = stream + x;  u, z = in_proj(norm(stream));  u = silu(conv(u))
        dt, B, C = x_proj(u);  out = out_proj(selective_scan_step(u, softplus(dt_proj(dt)), -exp(A_log), B, C, D, z))

    Shapes: x (B, M) in the weights' dtype; stream (B, M) float32, None before the first block; conv_state (B, E, W - 1)
    and ssm_state (B, E, N) float32, both contiguous and updated in place (by a `Journal.run` ssm_state may be so in its
    last step only). centred: LayerNorm instead of RMSNorm. Returns (out (B, M), stream (B, M)). For inference: no
    gradients, and no tracer sees it; a step of single operators (`core.Mamba.step`) is for those. Between its parts
    nothing is rounded to the weights' dtype on the fast backends.

    Raises ValueError if shapes disagree or if `backend` cannot run these inputs.
    """
    _check(x, stream, conv_state, ssm_state, weights)
    backend = choose(backend, x.device, x.dtype)
    x, stream = x.contiguous(), None if stream is None else stream.contiguous()
    with torch.no_grad():
        if backend in ("numba", "triton"):
            module = import_module(f".{'cpu' if backend == 'numba' else 'triton'}", __package__)
            return module.step(x, stream, conv_state, ssm_state, weights, eps, centred)
        return mamba_step_reference(x, stream, conv_state, ssm_state, weights, eps, centred)


def mamba_stack_step(
    x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence[MambaWeights], eps: float = 1e-5,
    *, rows: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """One token of each of B sequences through several norms and Mamba blocks, on a GPU: the stream at the end.

    x, states and weights as of `mamba_step`; with rows, int64 (B,), x is an embedding's weight (V, M), of which these
    are meant, and have to be there. Returns stream + out of the last block, (B, M) float32. None, and nothing is done,
    where `mamba_step` for each block is to be called: where it is the faster, or there is no such kernel. Raises
    ValueError if shapes disagree.
    """
    if choose(None, x.device, x.dtype, in_cuda=True) != "cuda":
        return None
    for state, one in zip(states, weights, strict=True):
        _check(x if rows is None else x[:1].expand(len(rows), -1), None, *state, one)
    rows = None if rows is None else rows.long().contiguous()
    with torch.no_grad():
        centred = weights[0].norm_bias is not None
        for name in (".cuda", ".cuda_wide"):
            stream = import_module(name, __package__).step(x, states, weights, eps, centred, rows)
            if stream is not None:
                return stream
    return None


def _check(x: Tensor, stream: Tensor | None, conv_state: Tensor, ssm_state: Tensor, w: MambaWeights) -> None:
    (n_channels, n_states), rank = w.A_log.shape, w.dt_proj.shape[1]
    width, taps = w.norm.shape[0], w.conv.shape[1]
    expected = {
        "in_proj": (2 * n_channels, width), "conv": (n_channels, taps), "x_proj": (rank + 2 * n_states, n_channels),
        "dt_proj": (n_channels, rank), "dt_bias": (n_channels,), "D": (n_channels,), "out_proj": (width, n_channels),
    }  # fmt: skip
    for name, shape in expected.items():
        if getattr(w, name).shape != shape:
            raise ValueError(f"{name} has shape {tuple(getattr(w, name).shape)}; expected {shape}")
    n_rows = x.shape[0]
    for name, state, shape in (
        ("x", x, (n_rows, width)),
        ("stream", x if stream is None else stream, (n_rows, width)),
        ("conv_state", conv_state, (n_rows, n_channels, taps - 1)),
        ("ssm_state", ssm_state, (n_rows, n_channels, n_states)),
    ):
        if state.shape != shape:
            raise ValueError(f"{name} has shape {tuple(state.shape)}; expected {shape}")
        if name.endswith("state") and not state.is_contiguous():
            raise ValueError(f"{name} has strides {state.stride()}; it must be contiguous, as it is updated in place")
