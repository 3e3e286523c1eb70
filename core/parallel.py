"""Context parallelism: a sequence longer than one GPU holds, cut into pieces of which each process has one.

    mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("context",))
    with context_parallel(mesh["context"]):
        logits = model(own_piece(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), own_piece(tokens[:, 1:]).flatten()).backward()

Process r of P has the tokens [r L / P, (r + 1) L / P) of each row. Of the layers that such a model may have only
Mamba's look across time, and those need little of other pieces:

    convolution   the W - 1 inputs beside the piece, which are the neighbour's last ones
    scan          the state before the piece, a sum over the pieces q before it, not a walk from one to the next:

                      h_r = sum_q exp(A s_qr) f_q      f_q   final state of piece q, begun at zero
                                                       s_qr  sum of dt over the pieces between q and r

f_q (B, E, N) and the sums (B, E) go round by one all-gather, whatever L is: nothing that grows with it leaves a
process. The price is a second scan, for f_q has to be known before the scan from h_r begins. (To add what h_r does to y
would cost as much: that is a scan, too.) The gradient of the state after a piece comes from later pieces in the same
way, a second scan of its own before the backward of the scan, which then is the usual one. A block that is recomputed
in the backward remembers its h_r. What runs outside of the context does not change.

Loss: each process takes the mean over its own targets, and gradients are averaged over the processes as in data
parallelism. Every process has to call backward, of a loss that its own outputs have a part in.

Letters: B batch, L length, E channels, N states, W convolution width, S packed sequences, P pieces, r the own one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .. import kernels

SPLITTABLE = {"mamba", "bimamba", "mlp", "moe"}  # mixers that know what to do in a context, or see single tokens only
SHORTEST = 16  # tokens of a padded piece: more than convolutions reach
AT_ONCE = 1 << 15  # tokens whose step sizes are added up at a time, in float32

# Not a ContextVar: a GPU's backward, which recomputes blocks, has a thread of its own.
_context: "Context | None" = None
_memory: "_Memory | None" = None  # of the block that runs under activation checkpointing


class Pack(NamedTuple):
    """How packed sequences lie in the own piece, and which of them go on in others."""

    cu_seqlens: Tensor  # (S + 1,) int32, of the own piece: a sequence without tokens here is empty
    first: Tensor  # (P,): the sequence of each piece's first token
    last: Tensor  # (P,): and that of its last token


class Context:
    """The processes that share a sequence, and the place of this one among them."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.real: Tensor | None = None  # bool (B, L / P): which tokens are not padding, inside `with_padding`
        self._packs: tuple[Tensor | None, Pack | None] = None, None  # the last cu_seqlens, and what came of it

    def pack(self, cu_seqlens: Tensor | None, length: int) -> Pack | None:
        """cu_seqlens (S + 1,) of the whole, `length` tokens in each piece."""
        if cu_seqlens is not None and self._packs[0] is not cu_seqlens:
            starts = torch.arange(self.size, device=cu_seqlens.device) * length
            ends = cu_seqlens[1:].contiguous()
            first, last = (
                torch.searchsorted(ends, at, right=True).clamp(max=len(ends) - 1)
                for at in (starts, starts + length - 1)
            )
            own = (cu_seqlens - self.rank * length).clamp(0, length)
            self._packs = cu_seqlens, Pack(own, first, last)
        return None if cu_seqlens is None else self._packs[1]

    def border(self, cu_seqlens: Tensor | None) -> "Border | None":
        """For blocks that are one operation: None with packs and padding, of which that knows nothing."""
        return Border(self) if cu_seqlens is None and self.real is None else None

    def earlier(self, reverse: bool) -> slice:
        """The pieces that are read before the own one."""
        return slice(self.rank + 1, None) if reverse else slice(0, self.rank)

    def linked(self, pack: Pack | None, reverse: bool) -> Tensor | None:
        """bool (P,): whether the sequence that a piece ends with is the one that the own piece begins with.

        Always, without packs: None. (With `reverse` ends and begins change places.)
        """
        if pack is None:
            return None
        return pack.first == pack.last[self.rank] if reverse else pack.last == pack.first[self.rank]


@contextmanager
def context_parallel(group: DeviceMesh | dist.ProcessGroup) -> Iterator[Context]:
    """Within it, a model's input is the piece of each sequence that belongs to this process.

    group: the processes that share a sequence: a mesh of one dimension, or a process group. Both the forward and the
    backward may run in it; a backward that recomputes blocks finds its way back by itself.

    cu_seqlens is that of the whole, padding_mask that of the piece. Raises ValueError, when it runs, for a model with
    layers that cannot be cut, for states, and for pieces shorter than a convolution's reach.
    """
    with _entered(Context(group.get_group() if isinstance(group, DeviceMesh) else group)) as context:
        yield context


@contextmanager
def _entered(context: Context, memory: "_Memory | None" = None) -> Iterator[Context]:
    global _context, _memory
    before, (_context, _memory) = (_context, _memory), (context, memory)
    try:
        yield context
    finally:
        _context, _memory = before


def current() -> Context | None:
    """The context that is on."""
    return _context


def recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """context_fn of activation checkpointing: a block is recomputed in the context in which it ran, with its states."""
    if _context is None:
        return nullcontext(), nullcontext()
    states: list[Any] = []
    return _entered(_context, _Memory(states, False)), _entered(_context, _Memory(states, True))


class _Memory(NamedTuple):
    """What came of the calls of `_once` in a block."""

    results: list[Any]
    recalls: bool  # or adds to them


def _once(work: Callable[[], Any]) -> Any:
    """work(); in a block that is recomputed, what came of it when the block first ran."""
    global _memory
    if _memory is None:
        return work()
    if _memory.recalls:
        first, _memory = _memory.results[0], _memory._replace(results=_memory.results[1:])
        return first
    _memory.results.append(work())
    return _memory.results[-1]


@contextmanager
def with_padding(context: Context, real: Tensor) -> Iterator[None]:
    """real bool (B, L / P), True = real token; a row's real tokens stand in one run over all pieces."""
    before, context.real = context.real, real
    try:
        yield
    finally:
        context.real = before


def own_piece(x: Tensor, dim: int = 1) -> Tensor:
    """This process's piece of x along `dim`. Raises ValueError if that does not divide by the number of processes."""
    context = _context
    if context is None:
        return x
    if x.shape[dim] % context.size:
        raise ValueError(
            f"length {x.shape[dim]} does not divide among {context.size} processes; pad it to a multiple, and say so "
            "by padding_mask"
        )
    return x.chunk(context.size, dim)[context.rank]


def padded_length(length: int) -> int:
    """The least one from this on that divides into pieces of SHORTEST tokens or more."""
    n = 1 if _context is None else _context.size
    return length if n == 1 else n * max(SHORTEST, -(-length // n))


def padded_piece(x: Tensor, fill: float) -> Tensor:
    """This process's piece of x (B, L), which is padded by `fill` on the right if it does not divide."""
    n = padded_length(x.shape[1]) - x.shape[1]
    return own_piece(F.pad(x, (0, n), value=fill) if n else x)


def all_pieces(x: Tensor, dim: int = 1) -> Tensor:
    """The pieces x of all processes, end to end. Its gradient is the sum of what all processes make of it."""
    context = _context
    return x if context is None else torch.cat(list(gathered(x, context.group)), dim)


def backwards(x: Tensor, dim: int = 1) -> Tensor:
    """x of which the whole is flipped along `dim`: its own piece is the flipped one of another process."""
    context = _context
    return x.flip(dim) if context is None else gathered(x, context.group)[context.size - 1 - context.rank].flip(dim)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of each process of the group: (P, ..). Its gradient is the sum of what all processes make of it."""
    return _Gathered.apply(x, group)  # pyright: ignore[reportReturnType]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        x = x.contiguous()
        out = x.new_empty(group.size() * x.numel())
        dist.all_gather_into_tensor(out, x.flatten(), group=group)
        return out.view(group.size(), *x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = dout.new_empty(dout[0].numel())
        dist.reduce_scatter_tensor(dx, dout.contiguous().flatten(), group=ctx.group)
        return dx.view(dout.shape[1:]), None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    """`kernels.causal_conv1d`, in a context that of the whole sequence."""
    context = _context
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
    context = _context
    if context is None:
        return kernels.selective_scan(u, delta, A, B, C, D, z, **options)
    options, cu_seqlens, reverse = _without_states(options)
    pack = context.pack(cu_seqlens, u.shape[1])
    bias = options.get("delta_bias")
    way = _Way(context, pack, reverse, options.get("delta_softplus", False))
    state, sums = _once(lambda: _passed_on(way, u, delta, A, B, C, bias))
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
    sums = torch.stack([way.dt(d, bias).sum(1) for d in delta.split(AT_ONCE, 1)]).sum(0)
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

    def dt(self, delta: Tensor, bias: Tensor | None) -> Tensor:
        """In float32 or float64."""
        dt = _wide(delta) if bias is None else _wide(delta) + bias
        return F.softplus(dt) if self.softplus else dt


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
    """Of the state after the own piece, from what the later ones make of it: all have to call this. (B or S, E, N)

    Of h_t it is that of h_{t+1} decayed by dt_{t+1}, and C_t dy_t silu(z_t): a scan the other way with C in the place
    of B, which takes each dt a step earlier than the scan does, and whose input is not multiplied by it.
    """
    shifted = delta.roll(1 if way.reverse else -1, 1)
    u = torch.empty_like(dy)
    for start in range(0, dy.shape[1], AT_ONCE):
        some = slice(start, start + AT_ONCE)
        x = _wide(dy[:, some])
        if z is not None:
            x = x * F.silu(_wide(z[:, some]))
        u[:, some] = x / way.dt(shifted[:, some], bias).clamp(min=torch.finfo(x.dtype).tiny)
    border = way.dt(delta[:, -1:] if way.reverse else delta[:, :1], bias)[:, 0]
    own = _end_state(way.back(), bias, u, shifted, A, C, C) * torch.exp(border[..., None] * A)
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


class Border:
    """What kernels/mamba_block has to know of the other pieces: its Border."""

    def __init__(self, context: Context):
        self.context = context

    def before(self, x: Tensor, width: int, reverse: bool) -> Tensor:
        return _once(lambda: self._before(x, width, reverse))

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
        return _once(lambda: _passed_on(_Way(self.context, None, reverse, True), *inputs))

    def gradient_after(self, dy: Tensor, *inputs: Any, reverse: bool) -> Tensor:
        return _gradient_after(_Way(self.context, None, reverse, True), dy, *inputs)


def _beside(x: Tensor, context: Context, *, before: bool) -> Tensor:
    """x of the process with the piece before, or after, the own one; zeros where there is none."""
    all_, beside = gathered(x, context.group), context.rank + (-1 if before else 1)
    return all_[beside] if 0 <= beside < context.size else torch.zeros_like(x)


def _require_reach(length: int, width: int) -> None:
    if length < width:
        raise ValueError(f"pieces of {length} tokens are shorter than the convolution's reach of {width}: use fewer")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
