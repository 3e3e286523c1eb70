"""What a mixture of experts does to rows besides its experts: who takes a token, the sort by expert, there and back.

    x, logits, probabilities, gates, experts = route(x, router_weight, top_k)
    order = sort_by_expert(experts.flatten(), n_experts)
    rows = dispatch(x, order, top_k)                 expert e's are rows[order.ends[e - 1] : order.ends[e]]
    y = combine(expert_of_each(rows), gates, order)

Letters: T tokens, K = top_k, E experts, D width of a row. An assignment is a token and one of its experts; token t's
are t K to t K + K - 1. All is deterministic, and the backward of a gathering gathers too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import IN_PYTORCH, choose, traced, watched
from ..operators import Operator, module
from . import reference

MOST_SORTED_BY_COUNTING = 1024  # experts


class Order(NamedTuple):
    """The T K assignments sorted by expert, those without one last; each expert's keep their order."""

    order: Tensor  # (T K,): the assignments in sorted order
    places: Tensor  # (T K,): where each assignment stands among them
    ends: Tensor  # (E,) int32: end of each expert's assignments
    counts: Tensor  # (E,) int32: their number


def route(
    x: Tensor, weight: Tensor, top_k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (T, D), weight (E, D) -> x, logits x weight^T, their softmax, the K largest of it and their experts.

    Shapes (T, D), (T, E), (T, E), (T, K), (T, K). In float32, float64 for float64 inputs, whatever autocast says; the
    experts int64, and without a gradient. x comes out as it was: what reads this one instead spares a pass over its
    gradient, to which the backward adds its own as it computes that.
    """
    backend = _backend(backend, x)
    if backend in IN_PYTORCH:
        return x, *reference.route(x, weight, top_k)
    if traced(x, weight) or not watched(x, weight):
        return x, *_route(x, weight, top_k, backend)  # no operator may return its input
    return _Route.apply(x, weight, top_k, backend)


@torch.no_grad()
def sort_by_expert(experts: Tensor, n_experts: int, *, backend: str | None = None) -> Order:
    """experts int (T K,), n_experts standing for none."""
    backend = _backend(backend, experts)
    if backend in IN_PYTORCH or n_experts > MOST_SORTED_BY_COUNTING:
        return Order(*reference.sort_by_expert(experts, n_experts))
    return Order(*_sort(experts, n_experts, backend))


def dispatch(x: Tensor, order: Order, top_k: int, *, some_lost: bool = False, backend: str | None = None) -> Tensor:
    """x (T, D) -> (T K, D): a row for each assignment, sorted by expert.

    some_lost: whether assignments without an expert may be among them; what comes back of these is ignored.
    """
    kept = order.ends[-1:] if some_lost else None
    return _run(_dispatch, backend, x, order.order, order.places, kept, top_k)


def combine(
    rows: Tensor, gates: Tensor, order: Order, *, some_lost: bool = False, backend: str | None = None
) -> Tensor:
    """rows (T K, D) in sorted order, gates (T, K) -> (T, D): each token's sum of its rows by their gates.

    some_lost: as in `dispatch`; the rows of assignments without an expert count as 0, whatever they hold, and their
    gradients are undefined.
    """
    kept = order.ends[-1:] if some_lost else None
    return _run(_combine, backend, rows, gates, order.order, order.places, kept)


def _backend(backend: str | None, x: Tensor) -> str:
    backend = choose(backend, x.device, x.dtype)
    return "torch" if backend == "numba" else backend  # whose parts PyTorch has


def _run(operator: Operator, backend: str | None, x: Tensor, *inputs: Any) -> Tensor:
    backend = _backend(backend, x)
    return (operator.run if backend == "plain" else operator)(x, *inputs, backend)


def _implementation(backend: str) -> Any:
    return reference if backend in IN_PYTORCH else module(__package__ or "", backend)


# `kept`, where it is given, is the number of assignments that have an expert, (1,).


def _run_route(x: Tensor, weight: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(backend).route(x, weight, top_k)


def _run_route_backward(
    dx: Tensor | None, dlogits: Tensor | None, dprobabilities: Tensor | None, dgates: Tensor | None,
    x: Tensor, weight: Tensor, probabilities: Tensor, experts: Tensor, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = dx, dlogits, dprobabilities, dgates
    return _implementation(backend).route_backward(*gradients, x, weight, probabilities, experts)


def _run_sort(experts: Tensor, n_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(backend).sort_by_expert(experts, n_experts)


def _run_gather(x: Tensor, order: Tensor, places: Tensor, kept: Tensor | None, top_k: int, backend: str) -> Tensor:
    return _implementation(backend).gather(x, order, top_k)


def _run_combine(
    rows: Tensor, gates: Tensor, order: Tensor, places: Tensor, kept: Tensor | None, backend: str
) -> Tensor:
    return _implementation(backend).collect(rows, gates, places, kept, gates.shape[1])


def _run_collect(rows: Tensor, places: Tensor, kept: Tensor | None, top_k: int, backend: str) -> Tensor:
    return _implementation(backend).collect(rows, None, places, kept, top_k)


def _run_spread(
    dy: Tensor, rows: Tensor, gates: Tensor, order: Tensor, places: Tensor, kept: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _implementation(backend).spread(dy, rows, gates, order, places, kept)


def _fake_route(x, weight, top_k, backend):
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    gates = logits.new_empty(len(x), top_k)
    return logits, torch.empty_like(logits), gates, gates.new_empty(gates.shape, dtype=torch.int64)


def _fake_sort(experts, n_experts, backend):
    index = torch.int64 if backend in IN_PYTORCH else torch.int32
    order, ends = experts.new_empty(len(experts), dtype=index), experts.new_empty(n_experts, dtype=torch.int32)
    return order, torch.empty_like(order), ends, torch.empty_like(ends)


def _fake_route_backward(dx, dlogits, dprobabilities, dgates, x, weight, probabilities, experts, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _fake_gather(x, order, places, kept, top_k, backend):
    return x.new_empty(len(order), x.shape[1])


def _fake_combine(rows, gates, order, places, kept, backend):
    return rows.new_empty(len(gates), rows.shape[1])


def _fake_collect(rows, places, kept, top_k, backend):
    return rows.new_empty(len(places) // top_k, rows.shape[1])


def _fake_spread(dy, rows, gates, order, places, kept, backend):
    return rows.new_empty(rows.shape), torch.empty_like(gates)


_route = Operator("route", _run_route, _fake_route)
_route_backward = Operator("route_backward", _run_route_backward, _fake_route_backward)
_sort = Operator("sort_by_expert", _run_sort, _fake_sort)
_dispatch = Operator("dispatch", _run_gather, _fake_gather)
_collect = Operator("collect", _run_collect, _fake_collect)
_combine = Operator("combine", _run_combine, _fake_combine)
_spread = Operator("combine_backward", _run_spread, _fake_spread)


def _setup_route(ctx, inputs, output):
    x, weight, _, backend = inputs
    _, probabilities, _, experts = output
    ctx.save_for_backward(x, weight, probabilities, experts)
    ctx.backend = backend
    ctx.mark_non_differentiable(experts)
    ctx.set_materialize_grads(False)


def _backward_route(ctx, dlogits, dprobabilities, dgates, _, dx=None):
    return *_route_backward(dx, dlogits, dprobabilities, dgates, *ctx.saved_tensors, ctx.backend), None, None


class _Route(torch.autograd.Function):
    """The operator with one more output: x itself."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run_route(*inputs)
        _setup_route(ctx, inputs, output)
        return inputs[0], *output

    @staticmethod
    def backward(ctx, dx, dlogits, dprobabilities, dgates, _):
        return _backward_route(ctx, dlogits, dprobabilities, dgates, None, dx)


def _setup_dispatch(ctx, inputs, output):
    _, _, places, kept, *ctx.options = inputs
    ctx.save_for_backward(places, kept)


def _backward_dispatch(ctx, drows):
    return _collect(drows, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def _setup_combine(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_combine(ctx, dy):
    return *_spread(dy, *ctx.saved_tensors, ctx.backend), None, None, None, None


_route.differentiate(_backward_route, _setup_route)
_dispatch.differentiate(_backward_dispatch, _setup_dispatch)
_combine.differentiate(_backward_combine, _setup_combine)
