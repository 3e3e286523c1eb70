"""What a mixture of experts does to rows besides its experts: who takes a token, the sort by expert, there and back.

    logits, probabilities, gates, experts = route(x, router_weight, top_k)
    order = sort_by_expert(experts.flatten(), n_experts)
    rows = dispatch(x, order, top_k)                 expert e's are rows[order.ends[e - 1] : order.ends[e]]
    y = combine(expert_of_each(rows), gates, order)

Letters: T tokens, K = top_k, E experts, D width of a row. An assignment is a token and one of its experts; token t's
are t K to t K + K - 1. All is deterministic, and the backward of a gathering gathers too.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import IN_PYTORCH, choose, traced
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T, D), weight (E, D) -> logits x weight^T, their softmax, the K largest of it and their experts.

    Shapes (T, E), (T, E), (T, K), (T, K). In float32, float64 for float64 inputs, whatever autocast says; the experts
    int64, and without a gradient.
    """
    backend = _backend(backend, x)
    if backend in IN_PYTORCH:
        return reference.route(x, weight, top_k)
    return (_route if traced(x, weight) else _Route.apply)(x, weight, top_k, backend)


@torch.no_grad()
def sort_by_expert(experts: Tensor, n_experts: int, *, backend: str | None = None) -> Order:
    """experts int (T K,), n_experts standing for none."""
    backend = _backend(backend, experts)
    if backend in IN_PYTORCH or n_experts > MOST_SORTED_BY_COUNTING:
        return Order(*reference.sort_by_expert(experts, n_experts))
    return Order(*(_sort if traced(experts) else _run_sort)(experts, n_experts, backend))


def dispatch(x: Tensor, order: Order, top_k: int, *, some_lost: bool = False, backend: str | None = None) -> Tensor:
    """x (T, D) -> (T K, D): a row for each assignment, sorted by expert.

    some_lost: whether assignments without an expert may be among them; what comes back of these is ignored.
    """
    kept = order.ends[-1:] if some_lost else None
    return _run(_Dispatch, _dispatch, backend, x, order.order, order.places, kept, top_k)


def combine(
    rows: Tensor, gates: Tensor, order: Order, *, some_lost: bool = False, backend: str | None = None
) -> Tensor:
    """rows (T K, D) in sorted order, gates (T, K) -> (T, D): each token's sum of its rows by their gates.

    some_lost: as in `dispatch`; the rows of assignments without an expert count as 0, whatever they hold, and their
    gradients are undefined.
    """
    kept = order.ends[-1:] if some_lost else None
    return _run(_Combine, _combine, backend, rows, gates, order.order, order.places, kept)


def _backend(backend: str | None, x: Tensor) -> str:
    backend = choose(backend, x.device, x.dtype)
    return "torch" if backend == "numba" else backend  # whose parts PyTorch has


def _run(function: Any, operator: Callable[..., Tensor], backend: str | None, x: Tensor, *inputs: Any) -> Tensor:
    """A compiler sees the operator; autograd by itself is quicker with a function of its own kind."""
    backend = _backend(backend, x)
    if backend == "plain":
        return function.forward(x, *inputs, backend)
    return (operator if traced(x) else function.apply)(x, *inputs, backend)


def _implementation(backend: str) -> Any:
    return reference if backend in IN_PYTORCH else import_module(f".{backend}", __package__)


# Each operator is a function of tensors and plain numbers, with its backward as another operator. `_Route`, `_Dispatch`
# and `_Combine` tie the same two together without the operators around them. `kept`, where it is given, is the number
# of assignments that have an expert, (1,).


def _run_route(x: Tensor, weight: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(backend).route(x, weight, top_k)


def _run_route_backward(
    dlogits: Tensor | None, dprobabilities: Tensor | None, dgates: Tensor | None, x: Tensor, weight: Tensor,
    probabilities: Tensor, experts: Tensor, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = dlogits, dprobabilities, dgates
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


def _operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(f"polymamba::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator


def _fake_route(x, weight, top_k, backend):
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    gates = logits.new_empty(len(x), top_k)
    return logits, torch.empty_like(logits), gates, gates.new_empty(gates.shape, dtype=torch.int64)


def _fake_sort(experts, n_experts, backend):
    index = torch.int64 if backend in IN_PYTORCH else torch.int32
    order, ends = experts.new_empty(len(experts), dtype=index), experts.new_empty(n_experts, dtype=torch.int32)
    return order, torch.empty_like(order), ends, torch.empty_like(ends)


_route = _operator("route", _run_route, _fake_route)
_route_backward = _operator(
    "route_backward",
    _run_route_backward,
    lambda dlogits, dprobabilities, dgates, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_sort = _operator("sort_by_expert", _run_sort, _fake_sort)
_dispatch = _operator("dispatch", _run_gather, lambda x, order, *_: x.new_empty(len(order), x.shape[1]))
_collect = _operator(
    "collect", _run_collect, lambda rows, places, kept, top_k, _: rows.new_empty(len(places) // top_k, rows.shape[1])
)
_combine = _operator("combine", _run_combine, lambda rows, gates, *_: rows.new_empty(len(gates), rows.shape[1]))
_spread = _operator(
    "combine_backward", _run_spread, lambda dy, rows, gates, *_: (rows.new_empty(rows.shape), torch.empty_like(gates))
)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, top_k, backend):
        return _run_route(x, weight, top_k, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, backend = inputs
        _, probabilities, _, experts = output
        ctx.save_for_backward(x, weight, probabilities, experts)
        ctx.backend = backend
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dlogits, dprobabilities, dgates, _):
        run: Any = _route_backward if traced(*ctx.saved_tensors) else _run_route_backward
        return *run(dlogits, dprobabilities, dgates, *ctx.saved_tensors, ctx.backend), None, None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x, order, places, kept, top_k, backend):
        return _run_gather(x, order, places, kept, top_k, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, places, kept, *ctx.options = inputs
        ctx.save_for_backward(places, kept)

    @staticmethod
    def backward(ctx, drows):
        run: Any = _collect if traced(drows) else _run_collect
        return run(drows, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(rows, gates, order, places, kept, backend):
        return _run_combine(rows, gates, order, places, kept, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        run: Any = _spread if traced(dy) else _run_spread
        return *run(dy, *ctx.saved_tensors, ctx.backend), None, None, None, None


for _operation, _function in ((_route, _Route), (_dispatch, _Dispatch), (_combine, _Combine)):
    _operation.register_autograd(_function.backward, setup_context=_function.setup_context)
