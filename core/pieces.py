"""The convolution and the scan of a Mamba block where each process has a piece of the sequence (parallel.py).

The state before a piece is known when all processes have told with which state theirs ends, begun at zero. So there is
a second scan, before the one that counts. (To add what the state does to y would cost as much: that is a scan, too.)
The gradient of the state after a piece comes from the later pieces in the same way: by a scan backwards, before the
backward of the one that counts, to which it is the gradient of a final state like any other. So nothing but these two
passes differs from a sequence that begins with some state, and no autograd goes through the collectives. A block that
is recomputed in the backward remembers the state with which it began.

Letters as in parallel.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..kernels.scan_steps import backward_scan_inputs, step_sums
from .parallel import Context, Pack, current, gathered, once


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    """`kernels.causal_conv1d`, in a context that of the whole sequence."""
    context = current()
    if context is None:
        return kernels.causal_conv1d(x, weight, bias, **options)
    options, cu_seqlens, reverse = _without_states(options)
    length, width = x.shape[1], weight.shape[1] - 1
    _require_reach(length, width)
    if context.real is not None:
        x = x * context.real[..., None]
    pack = context.pack(cu_seqlens, length)
    sent = (x[:, :width].flip(1) if reverse else x[:, length - width :]).mT  # (B, E, W - 1), most recent last
    if pack is not None:  # what belongs to a sequence before the one that goes on counts as zero
        places = torch.arange(width, device=x.device)
        if reverse:
            belongs = width - 1 - places < pack.cu_seqlens[pack.first[context.rank] + 1]
        else:
            belongs = length - width + places >= pack.cu_seqlens[pack.last[context.rank]]
        sent = sent * belongs
    halo = gathered(sent, context.group)[context.earlier(reverse)]
    halo = halo[:1] if reverse else halo[-1:]  # the neighbour's; none at the beginning of all
    linked = context.linked(pack, reverse)
    if linked is not None:
        linked = linked[context.earlier(reverse)]
        halo = halo * (linked[:1] if reverse else linked[-1:])[:, None, None, None]
    state = _placed(halo.sum(0), pack, context, reverse)
    y = kernels.causal_conv1d(x, weight, bias, **options, **_layout(pack, reverse), initial_state=state)
    assert isinstance(y, Tensor)  # no final state was asked for
    # A bias makes something of padding, which would drive the state.
    return y if context.real is None else y * context.real[..., None]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    **options: Any,
) -> Any:
    """`kernels.selective_scan`, in a context that of the whole sequence."""
    context = current()
    if context is None:
        return kernels.selective_scan(u, delta, A, B, C, D, z, **options)
    options, cu_seqlens, reverse = _without_states(options)
    pack = context.pack(cu_seqlens, u.shape[1])
    bias = options.get("delta_bias")
    way = _Way(context, pack, reverse, options.get("delta_softplus", False))
    state, sums = once(lambda: _passed_on(way, u, delta, A, B, C, bias))
    state = _placed(state, pack, context, reverse)
    options |= {"initial_state": state, "return_final_state": True}
    y, final = kernels.selective_scan(u, delta, A, B, C, D, z, **options, **_layout(pack, reverse))
    return _HandedOn.apply(y, final, way, delta, z, bias, A, C, sums)


@torch.no_grad()
def _passed_on(
    way: "_Way", u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state with which the own piece begins, (B, E, N), and the sum of dt of each piece, (P, B, E)."""
    final = _end_state(way, bias, u, delta, A, B, C)
    sums = step_sums(delta, bias, way.softplus)
    each = gathered(torch.cat((final, sums[..., None].to(final.dtype)), -1), way.context.group)
    finals, sums = each[..., :-1], each[..., -1]
    return state_before(way, finals, sums, A), sums


class _Way(NamedTuple):
    """How a scan goes over the pieces."""

    context: Context
    pack: Pack | None
    reverse: bool
    softplus: bool

    def back(self) -> "_Way":
        return self._replace(reverse=not self.reverse)


class _HandedOn(torch.autograd.Function):
    """y as it is; with its gradient comes that of the final state, which goes on in other processes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, final: Tensor, way: _Way, *tensors: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.way = way
        ctx.save_for_backward(*tensors)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, _gradient_after(ctx.way, dy, *ctx.saved_tensors), *[None] * 7


def _gradient_after(
    way: _Way, dy: Tensor, delta: Tensor, z: Tensor | None, bias: Tensor | None, A: Tensor, C: Tensor, sums: Tensor
) -> Tensor:
    """Of the state after the own piece, from what the later ones make of it: all have to call this. (B or S, E, N)"""
    u, moved = backward_scan_inputs(dy, delta, z, bias, way.softplus, way.reverse)
    border = step_sums(delta[:, -1:] if way.reverse else delta[:, :1], bias, way.softplus)
    own = _end_state(way.back(), bias, u, moved, A, C, C) * torch.exp(border[..., None] * A)
    after = state_before(way.back(), gathered(own, way.context.group), sums, A)
    return _placed(after, way.pack, way.context, not way.reverse)


def _end_state(way: _Way, bias: Tensor | None, *inputs: Tensor) -> Tensor:
    """The state (B, E, N) with which the own piece ends, begun at zero; inputs: of a scan, up to C."""
    options = {"delta_bias": bias, "delta_softplus": way.softplus, **_layout(way.pack, way.reverse)}
    _, final = kernels.selective_scan(*inputs, return_final_state=True, **options)
    pack, rank = way.pack, way.context.rank
    return final if pack is None else final[(pack.first if way.reverse else pack.last)[rank]][None]


def state_before(way: _Way, finals: Tensor, sums: Tensor, A: Tensor) -> Tensor:
    """The state (B, E, N) with which the own piece begins.

    finals (P, B, E, N): with which each piece ends, begun at zero; sums (P, B, E): of dt.
    """
    earlier = way.context.earlier(way.reverse)
    finals, sums = finals[earlier], sums[earlier]
    # Of the pieces between q and the own one: summed from the own one's side.
    towards: Callable[[Tensor], Tensor] = (lambda x: x) if way.reverse else (lambda x: x.flip(0))
    between = towards(F.pad(towards(sums), (0, 0, 0, 0, 1, 0))[:-1].cumsum(0))
    states = torch.exp(between[..., None] * A) * finals
    linked = way.context.linked(way.pack, way.reverse)
    if linked is not None:
        states = states * linked[earlier][:, None, None, None]
    return states.sum(0)


def border_of(context: Context, cu_seqlens: Tensor | None) -> "Border | None":
    """For blocks that are one operation: None with packs and padding, of which that knows nothing."""
    return Border(context) if cu_seqlens is None and context.real is None else None


class Border:
    """What kernels/mamba_block has to know of the other pieces: its Border."""

    def __init__(self, context: Context):
        self.context = context

    def before(self, x: Tensor, width: int, reverse: bool) -> Tensor:
        return once(lambda: self._before(x, width, reverse))

    @torch.no_grad()
    def _before(self, x: Tensor, width: int, reverse: bool) -> Tensor:
        _require_reach(x.shape[1], width)
        last = x[:, :width].flip(1) if reverse else x[:, -width:]
        return _beside(last.mT, self.context, before=not reverse)

    def add_gradient(self, dstate: Tensor, dx: Tensor, reverse: bool) -> None:
        width = dstate.shape[-1]
        of_last = _beside(dstate, self.context, before=reverse).mT
        (dx[:, :width] if reverse else dx[:, -width:]).add_(of_last.flip(1) if reverse else of_last)

    def state_before(self, *inputs: Any, reverse: bool) -> tuple[Tensor, Tensor]:
        return once(lambda: _passed_on(_Way(self.context, None, reverse, True), *inputs))

    def gradient_after(self, dy: Tensor, *inputs: Any, reverse: bool) -> Tensor:
        return _gradient_after(_Way(self.context, None, reverse, True), dy, *inputs)


def _beside(x: Tensor, context: Context, *, before: bool) -> Tensor:
    """x of the process with the piece before, or after, the own one; zeros where there is none."""
    all_, beside = gathered(x, context.group), context.rank + (-1 if before else 1)
    return all_[beside] if 0 <= beside < context.size else torch.zeros_like(x)


def _require_reach(length: int, width: int) -> None:
    if length < width:
        raise ValueError(f"pieces of {length} tokens are shorter than the convolution's reach of {width}: use fewer")


def _without_states(options: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None, bool]:
    """The options that are neither states nor layout; cu_seqlens; reverse."""
    options = dict(options)
    if options.pop("initial_state", None) is not None or options.pop("return_final_state", False):
        raise ValueError("a sequence that is cut into pieces takes no state and returns none")
    return options, options.pop("cu_seqlens", None), options.pop("reverse", False)


def _layout(pack: Pack | None, reverse: bool) -> dict[str, Any]:
    return {"cu_seqlens": None if pack is None else pack.cu_seqlens, "reverse": reverse}


def _placed(state: Tensor, pack: Pack | None, context: Context, reverse: bool) -> Tensor:
    """The state (B, ..) at the piece's border as that of each sequence: (S, ..) with packs, zero for the others."""
    if pack is None:
        return state
    own = (pack.last if reverse else pack.first)[context.rank]
    n_seqs = len(pack.cu_seqlens) - 1
    return state * (torch.arange(n_seqs, device=state.device) == own).view(-1, *[1] * (state.dim() - 1))
