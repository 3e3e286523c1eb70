"""The experts of a mixture, where each is two layers with a ReLU between: relu(x w_in[e]) w_out[e].

Rows are sorted by expert before the first product; the second one writes its results where their tokens stand. A row's
gate is taken in between, after the ReLU, which saves a pass over the results, and the memory to keep them in: with
h = gate relu(x w_in[e]) and y = h w_out[e], the gradient of the gate is h (w_out[e] dy) / gate, a sum over numbers that
the gradient of h computes anyhow.

Letters: T tokens, K experts of each, E experts, D width of a token, I inner width of an expert.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..expert_rows.interface import Order
from ..operators import Operator, module

SHARED_MEMORY = 213 * 1024  # bytes that the largest tiles of triton.py take; Blackwell's smaller chips have 99 KiB


def fuses_experts(x: Tensor) -> bool:
    """Whether `expert_mlp` is the way to take: bf16 on a GPU that loads tiles by descriptor, and holds large ones."""
    return x.dtype == torch.bfloat16 and choose(None, x.device, x.dtype) == "triton" and _loads_tiles(x.device.index)


def _loads_tiles(device: int | None) -> bool:
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return torch.cuda.get_device_capability(device) >= (9, 0) and room >= SHARED_MEMORY


# All that torch.compiler.assume_constant_result does, but that would load the whole compiler: a second, and more.
_loads_tiles._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def expert_mlp(
    x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, order: Order, *, some_lost: bool = False
) -> Tensor:
    """x (T, D), gates (T, K) float32, w_in (E, D, I), w_out (E, I, D) -> (T, D): each token's sum of what its experts
    make of it, by their gates.

    Gates are a softmax's: none is negative, and one of 0 gets no gradient.
    some_lost: whether there may be assignments without an expert, which count as 0.
    """
    gates, w_in, w_out = gates.contiguous(), w_in.contiguous(), w_out.contiguous()
    return _expert_mlp(x, gates, w_in, w_out, order.order, order.places, order.ends, some_lost)[0]


def _run(
    x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, order: Tensor, places: Tensor, ends: Tensor, some_lost: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward needs: rows of x, (T K, D), and h of each, (T K, I), sorted."""
    return _triton().forward(x, gates, w_in, w_out, order, places, ends, some_lost)


def _run_backward(
    dy: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, order: Tensor, places: Tensor, ends: Tensor,
    rows: Tensor, inner: Tensor, some_lost: bool, of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gates, w_in and w_out; the last two are empty unless of_weights."""
    return _triton().backward(dy, gates, w_in, w_out, order, places, ends, rows, inner, some_lost, of_weights)


def _triton() -> Any:
    return module(__package__ or "", "triton")


def _fake(x, gates, w_in, w_out, order, places, ends, some_lost):
    rows = x.new_empty(len(order), x.shape[1])
    return x.new_empty(x.shape), rows, rows.new_empty(len(order), w_in.shape[2])


def _fake_backward(dy, gates, w_in, w_out, order, places, ends, rows, inner, some_lost, of_weights):
    of_experts = (w.new_empty(w.shape if of_weights else 0) for w in (w_in, w_out))
    return dy.new_empty(dy.shape), gates.new_empty(gates.shape), *of_experts


_expert_mlp = Operator("expert_mlp", _run, _fake)
_expert_mlp_backward = Operator("expert_mlp_backward", _run_backward, _fake_backward)


def _setup(ctx, inputs, output):
    _, *tensors, ctx.some_lost = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    of_weights = any(ctx.needs_input_grad[2:4])
    dx, dgates, *dweights = _expert_mlp_backward(dy, *ctx.saved_tensors, ctx.some_lost, of_weights)
    return dx, dgates, *(dweights if of_weights else (None, None)), None, None, None, None


_expert_mlp.differentiate(_backward, _setup)
