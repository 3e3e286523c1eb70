"""The experts of a mixture, where each is two layers with a ReLU between: expert e of a row is relu(x w_in[e]) w_out[e].

Rows are read where their tokens stand, and results written there: nothing is sorted but a list of assignments. A row's
gate is taken in between, after the ReLU, which saves a pass over the results, and the memory to keep them in: with
h = gate relu(x w_in[e]) and y = h w_out[e], the gradient of the gate is h (w_out[e] dy) / gate, a sum over numbers that
the gradient of h computes anyhow.

Letters: T tokens, K experts of each, E experts, D width of a token, I inner width of an expert.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import INSTALLED, traced, watched
from ..expert_rows.interface import Order, _collect
from ..operators import module


def fuses_experts(x: Tensor) -> bool:
    """Whether `expert_mlp` is the way to take: bf16 on a GPU of compute capability 9 and up, and no compiler looks on,
    which sees PyTorch's products."""
    if x.dtype != torch.bfloat16 or not x.is_cuda or not INSTALLED["triton"] or traced(x):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def expert_mlp(
    x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, order: Order, *, some_lost: bool = False
) -> Tensor:
    """x (T, D), gates (T, K) float32, w_in (E, D, I), w_out (E, I, D) -> (T, D): each token's sum of what its experts
    make of it, by their gates.

    some_lost: whether there may be assignments without an expert, which count as 0.
    """
    inputs = x, gates, w_in, w_out, order.order, order.places, order.ends, some_lost
    if watched(x, gates, w_in, w_out):
        return _ExpertMLP.apply(*inputs)
    return _forward(*inputs)[0]


def _kernels() -> Any:
    return module(__package__ or "", "triton")


def _forward(x, gates, w_in, w_out, order, places, ends, some_lost):
    inner, _ = _kernels().matmul(x, w_in, ends, relu=True, gates=gates, read_by=order)
    return _of_tokens(inner, w_out, order, places, ends, gates.shape[1], some_lost), inner


def _of_tokens(
    rows: Tensor, weight: Tensor, order: Tensor, places: Tensor, ends: Tensor, top_k: int, some_lost: bool
) -> Tensor:
    """rows (T K, I), sorted, weight (E, I, O) -> (T, O): the sum of each token's products."""
    if top_k == 1:
        return _kernels().matmul(rows, weight, ends, write_by=order, some_lost=some_lost)[0]
    products, _ = _kernels().matmul(rows, weight, ends)
    return _collect.run(products, places, ends[-1:] if some_lost else None, top_k, "triton")


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, w_in, w_out, order, places, ends, some_lost):
        y, inner = _forward(x, gates, w_in, w_out, order, places, ends, some_lost)
        ctx.save_for_backward(x, gates, w_in, w_out, order, places, ends, inner)
        ctx.some_lost = some_lost
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gates, w_in, w_out, order, places, ends, inner = ctx.saved_tensors
        dinner, shares = _kernels().matmul(
            dy, w_out.transpose(1, 2), ends, inner=inner, gates=gates, read_by=order, some_lost=ctx.some_lost
        )
        dx = dgates = dw_in = dw_out = None
        merge = _kernels().MERGE and all(ctx.needs_input_grad[i] for i in (0, 2, 3))
        if merge:
            dx, dw_in, dw_out = _kernels().gradients(x, dinner, dy, inner, order, ends, w_in, ctx.some_lost)
            if (top_k := gates.shape[1]) > 1:
                dx = _collect.run(dx, places, ends[-1:] if ctx.some_lost else None, top_k, "triton")
        if ctx.needs_input_grad[0] and not merge:
            weight = w_in.transpose(1, 2)
            dx = _of_tokens(dinner, weight, order, places, ends, gates.shape[1], ctx.some_lost)
        if ctx.needs_input_grad[1]:
            dgates = shares.sum(0).view(gates.shape)
        if (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]) and not merge:
            dw_in, dw_out = _kernels().weight_gradients(x, dinner, dy, inner, order, ends)
        return dx, dgates, dw_in, dw_out, None, None, None, None
