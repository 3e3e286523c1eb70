"""The experts of a mixture, where each is two layers with a ReLU between: y = relu(x w_in[e]) w_out[e].

Rows are sorted by expert: expert e's are x[ends[e - 1] : ends[e]]. Of the six grouped matrix products of a forward and
a backward PyTorch makes four; the two whose result passes the ReLU, there and back, are Triton's, which does that
where it has the numbers at hand: alone it would move as many bytes as a product does.

Letters: T rows, E experts, D width of a row, I inner width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import INSTALLED, traced, watched
from ..operators import module


def fuses_experts(x: Tensor) -> bool:
    """Whether `expert_mlp` is the way to take: bf16, where PyTorch's product is one kernel, and no compiler looks on,
    which would do likewise."""
    if x.dtype != torch.bfloat16 or not x.is_cuda or not INSTALLED["triton"] or traced(x):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def expert_mlp(x: Tensor, w_in: Tensor, w_out: Tensor, ends: Tensor) -> Tensor:
    """x (T, D), w_in (E, D, I), w_out (E, I, D), ends int32 (E,), ascending -> (T, D).

    What belongs to no expert, from ends[-1] on, comes out undefined, and so does its gradient. The gradient that comes
    in must be dense (no expanded one).
    """
    if watched(x, w_in, w_out):
        return _ExpertMLP.apply(x, w_in, w_out, ends)
    return F.grouped_mm(_matmul(x, w_in, ends), w_out, offs=ends)


def _matmul(x: Tensor, weight: Tensor, ends: Tensor, inner: Tensor | None = None) -> Tensor:
    return module(__package__ or "", "triton").matmul(x, weight, ends, inner)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, w_out, ends):
        inner = _matmul(x, w_in, ends)
        ctx.save_for_backward(x, w_in, w_out, ends, inner)
        return F.grouped_mm(inner, w_out, offs=ends)

    @staticmethod
    def backward(ctx, dy):
        x, w_in, w_out, ends, inner = ctx.saved_tensors
        dinner = _matmul(dy, w_out.transpose(1, 2), ends, inner)
        dx = F.grouped_mm(dinner, w_in.transpose(1, 2), offs=ends) if ctx.needs_input_grad[0] else None
        dw_in = F.grouped_mm(x.T, dinner, offs=ends) if ctx.needs_input_grad[1] else None
        dw_out = F.grouped_mm(inner.T, dy, offs=ends) if ctx.needs_input_grad[2] else None
        return dx, dw_in, dw_out, None
