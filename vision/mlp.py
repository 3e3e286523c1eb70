"""fc2(gelu(fc1(x))) as one operation of autograd: gelu's result, the widest tensor of a block, is made again.

    h = x W_1' + b_1                        (T, F)
    y = gelu(h) W_2' + b_2                  (T, C)

Saved are x and h. Backward, with g = gelu(h):

    dW_2 = dy' g                            db_2 = the sum of dy over T
    dh = gelu'(h) * (dy W_2)
    dW_1 = dh' x                            db_1 = the sum of dh over T
    dx = dh W_1

Letters: T tokens, C channels, F inner width.
"""

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..core.autocast import autocast_dtype
from ..core.mamba_at_once import as_made
from ..kernels.backends import traced
from ..kernels.casting import cast_all
from ..kernels.operators import of_first_order


@register_notrace_module
class Mlp(timm.layers.Mlp):
    """timm's, with the exact GELU and without dropout. (.., C) -> the same shape."""

    def __init__(self, dim: int, d_inner: int):
        super().__init__(dim, d_inner)

    def forward(self, x: Tensor) -> Tensor:
        weights: Any = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        dtype = autocast_dtype(x)
        if (
            not torch.is_grad_enabled()
            or traced(x, *weights)
            or not as_made(self.fc1, self.act, self.fc2, kinds=(nn.Linear, nn.GELU))
            or any(autocast_dtype(w) != dtype for w in weights)
        ):
            return super().forward(x)
        return _Mlp.apply(dtype, x, *weights)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, x, *weights):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).flatten(0, -2)
            w_1, b_1, w_2, b_2 = cast_all(dtype, *weights)
            h = torch.addmm(b_1, rows, w_1.t())
            y = torch.addmm(b_2, F.gelu(h), w_2.t())
        ctx.save_for_backward(rows, h, w_1, w_2)
        ctx.shape, ctx.weight_dtype = x.shape, weights[0].dtype
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, dy)


@of_first_order
def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, h, w_1, w_2 = ctx.saved_tensors
    with torch.autocast(dy.device.type, enabled=False):
        dy = dy.flatten(0, -2)
        d_w_2, d_b_2 = torch.mm(dy.t(), F.gelu(h)), dy.sum(0)
        dh = torch.ops.aten.gelu_backward(torch.mm(dy, w_2), h)
        d_w_1, d_b_1, dx = torch.mm(dh.t(), rows), dh.sum(0), torch.mm(dh, w_1)
        return None, dx.view(ctx.shape), *cast_all(ctx.weight_dtype, d_w_1, d_b_1, d_w_2, d_b_2)
