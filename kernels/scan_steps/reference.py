"""In PyTorch's own operations, some tokens at a time: nothing as large as delta is made in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 1 << 15  # tokens


def step_sums(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    return torch.stack([dt_of(d, bias, softplus).sum(1) for d in delta.split(AT_ONCE, 1)]).sum(0)


def backward_scan_inputs(
    dy: Tensor, delta: Tensor, z: Tensor | None, bias: Tensor | None, softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    delta, u = delta.roll(1 if reverse else -1, 1), torch.empty_like(dy)
    for start in range(0, dy.shape[1], AT_ONCE):
        some = slice(start, start + AT_ONCE)
        x = _wide(dy[:, some])
        if z is not None:
            x = x * F.silu(_wide(z[:, some]))
        u[:, some] = x / dt_of(delta[:, some], bias, softplus).clamp(min=torch.finfo(x.dtype).tiny)
    return u, delta


def dt_of(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = _wide(delta) if bias is None else _wide(delta) + bias
    return F.softplus(dt) if softplus else dt


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
