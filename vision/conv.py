"""A convolution of images whose channels stand last, which torch.compile leaves in that layout.

Inductor, once it sees a convolution, takes every 4-D tensor for (B, C, H, W) and lays it out channels last: of
(B, H, W, C) it makes a transposed copy for each sum of the residual stream, and more for what reads it. On a GPU a
compiler therefore sees an operator of ours with PyTorch's convolution inside.
"""

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..core.autocast import autocast_dtype
from ..kernels.operators import Operator


@register_notrace_module
class Conv(nn.Conv2d):
    """A convolution of (B, H, W, C), zeros around it, without dilation."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x.contiguous()
        if not x.is_cuda or not torch.compiler.is_dynamo_compiling():  # is_exporting() is true in there, too
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        dtype = autocast_dtype(x)
        y = channels_last_conv(x.to(dtype), self.weight.to(dtype), self.stride[0], int(self.padding[0]), self.groups)
        return y if self.bias is None else y + self.bias.to(dtype)

    def without_bias(self, x: Tensor) -> Tensor:
        """The same less the bias, contiguous; for no compiler."""
        y = self._conv_forward(x.contiguous().permute(0, 3, 1, 2), self.weight, None)
        return y.permute(0, 2, 3, 1).contiguous()


def _run(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """x (B, H, W, C), weight (D, C / groups, k, k) -> (B, h, w, D), contiguous."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding, 1, groups)
    return y.permute(0, 2, 3, 1).contiguous()


def _fake(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    height, width = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], weight.shape[2:], strict=True))
    return x.new_empty(x.shape[0], height, width, weight.shape[0])


channels_last_conv = Operator("channels_last_conv", _run, _fake)


def _run_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, of_x: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, empty unless of_x, and of the weight."""
    dy, image = (m.permute(0, 3, 1, 2) for m in (dy.contiguous(), x))
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        *(dy, image, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [of_x, True, False])
    )
    return dx.permute(0, 2, 3, 1).contiguous() if of_x else x.new_empty(0), dweight.contiguous()


def _fake_backward(dy, x, weight, stride, padding, groups, of_x):
    return x.new_empty(x.shape if of_x else (0,)), weight.new_empty(weight.shape)


_conv_backward = Operator("channels_last_conv_backward", _run_backward, _fake_backward)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx, dy):
    of_x = ctx.needs_input_grad[0]
    dx, dweight = _conv_backward(dy, *ctx.saved_tensors, *ctx.options, of_x)
    return dx if of_x else None, dweight, None, None, None


channels_last_conv.differentiate(_backward, _setup_context)
