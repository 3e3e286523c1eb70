"""Context parallelism: a sequence longer than one GPU holds, cut into pieces of which each process has one.

    mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("context",))
    with context_parallel(mesh["context"]):
        logits = model(own_piece(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), own_piece(tokens[:, 1:]).flatten()).backward()

So does the `--context-parallel` of language models (division.py). Process r of P has the tokens [r L / P, (r+1) L / P)
of each row. Of the layers that such a model may have only Mamba's look across time, and those need little of others:

    convolution   the W - 1 inputs beside the piece, which are the neighbour's last ones
    scan          the state before the piece, a sum over the pieces q before it, not a walk from one to the next:

                      h_r = sum_q exp(A s_qr) f_q      f_q   final state of piece q, begun at zero
                                                       s_qr  sum of dt over the pieces between q and r

f_q (B, E, N) and the sums (B, E) go round by one all-gather, whatever L is: nothing that grows with it leaves a
process. What that asks of the two operations is in pieces.py. What runs outside of the context does not change.

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
from torch.distributed.device_mesh import DeviceMesh

SPLITTABLE = {"mamba", "bimamba", "mlp", "moe"}  # mixers that know what to do in a context, or see single tokens only
SHORTEST = 16  # tokens of a padded piece: more than convolutions reach

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
    """What came of the calls of `once` in a block."""

    results: list[Any]
    recalls: bool  # or adds to them


def once(work: Callable[[], Any]) -> Any:
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
