"""What a scan over pieces of a sequence (core/pieces.py) asks of the step sizes: their sums, and a scan backwards.

dt = delta + bias, through softplus if so, in float32 (float64 for float64 inputs). No gradients: these are no part of a
graph. Letters: B batch, L length, E channels.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..operators import module


@torch.no_grad()
def step_sums(delta: Tensor, bias: Tensor | None, softplus: bool, *, backend: str | None = None) -> Tensor:
    """delta (B, L, E), bias (E,) -> the sum of dt over L, (B, E)."""
    return _implementation(backend, delta).step_sums(delta, bias, softplus)


@torch.no_grad()
def backward_scan_inputs(
    dy: Tensor, delta: Tensor, z: Tensor | None, bias: Tensor | None, softplus: bool, reverse: bool,
    *, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, delta, z (B, L, E) of a scan with y = C h silu(z) -> (u, delta) of a scan the other way, with C for B.

    The gradient of h_t is that of h_{t+1} decayed by dt_{t+1}, and C_t dy_t silu(z_t): a scan that takes each dt a step
    earlier, and whose input is not multiplied by it. So delta comes back moved by one step, and u is dy silu(z) over
    the moved dt. (With `reverse`, of the scan and so of the other one, all this is mirrored.) The step size that is
    missing at one end decays nothing: it may be any.
    """
    return _implementation(backend, delta).backward_scan_inputs(dy, delta, z, bias, softplus, reverse)


def _implementation(backend: str | None, x: Tensor) -> Any:
    backend = choose(backend, x.device, x.dtype)  # a CPU has PyTorch's own operations, whatever it has for the scan
    return module(__package__ or "", "triton" if backend == "triton" else "reference")
