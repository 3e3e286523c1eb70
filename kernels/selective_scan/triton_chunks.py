"""What both directions of the Triton scan share: chunks of time, and the pass that carries states from one to the next.

A sequence is cut into chunks of CHUNK steps, always at the same places. Over a chunk the recurrence is linear in the
state that enters it: it multiplies that state by exp2(A log2(e) (sum of dt)) and adds what the chunk by itself, from 0,
arrives at. So one pass finds each chunk's own end in parallel, `pass_states` carries the states over the chunks in
order, and a last pass runs every chunk, in parallel again, from the state that enters it. The gradient of the state
goes the same way, from the last chunk to the first.

A result must not depend on who ran the chunks. So where the forward walks a sequence in one program (a batch that fills
the GPU, which spares the first pass), it too enters each chunk but the first with decay * (state before) + (own end).
For that it keeps a second state, which starts each chunk from 0: one fused multiply-add more for each step, channel and
state. `tl.fma` is spelled out wherever states are computed, so that no compiler's choice tells the two apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import LOG2E, ceil_div, load_float, softplus, with_rows

_AHEAD = 16  # chunks whose states `pass_states` loads at once
_BLOCK = 1024  # numbers of each tensor that a program of `_prepare` takes


@triton.jit
def tile_of(number, per_group: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a tile of channels: its group, its number in the group, its channels, which of them there are."""
    tiles_per_group: tl.constexpr = (per_group + BLOCK_D - 1) // BLOCK_D
    in_group = number % tiles_per_group * BLOCK_D + tl.arange(0, BLOCK_D)
    group = number // tiles_per_group
    if per_group % BLOCK_D == 0:
        in_d = tl.full((BLOCK_D,), True, tl.int1)
    else:
        in_d = in_group < per_group
    return group, number % tiles_per_group, group * per_group + in_group, in_d


@triton.jit
def states_of(N: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    if N == BLOCK_N:
        in_n = tl.full((BLOCK_N,), True, tl.int1)
    else:
        in_n = n < N
    return n, in_n


@triton.jit
def pairs_at(n, d, in_n, in_d, N_STRIDE: tl.constexpr, D_STRIDE: tl.constexpr, zero):
    """Offsets of (state, channel) pairs in a matrix, (BLOCK_N, BLOCK_D), and which of them there are.

    Triton lays a program's pairs out over lanes by what it knows of these addresses: a lane would get four channels
    next to each other, to load them at once, and other lanes other states. `zero`, of which it knows nothing, leaves it
    one channel a lane and all states in it: no sum over states then crosses lanes. None where that is not wanted.
    """
    at = n[:, None] * N_STRIDE + d[None, :] * D_STRIDE
    if zero is not None:
        at += zero
    return at, in_n[:, None] & in_d[None, :]


@triton.jit
def step_size(raw, step, end, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr):
    """dt from delta + bias: 0 beyond the last step, which so leaves the state as it is."""
    dt = softplus(raw) if SOFTPLUS else raw
    return dt if WHOLE else tl.where(step < end, dt, 0.0)


@triton.jit
def chunks_of(cu_seqlens, s, length, CHUNK: tl.constexpr):
    """(How many chunks sequence s has, the number of the first.) As triton_runtime.piece_of counts them."""
    if cu_seqlens is None:
        chunks = tl.maximum(tl.cdiv(length, CHUNK), 1)
        first = s.to(tl.int64) * chunks
    else:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        chunks = tl.maximum(tl.cdiv((tl.load(cu_seqlens + s + 1) - start).to(tl.int32), CHUNK), 1)
        first = start // CHUNK + s
    return chunks, first


@triton.jit(do_not_specialize=["length"])
def pass_states(
    own, sums, A, first, cu_seqlens, length, n_channels: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Over a sequence's chunks, in the order of the scan or BACKWARDS: own[chunk] becomes what enters the chunk.

    own (chunk, N, D): what a chunk arrives at from 0. sums (chunk, D): of dt. A (N, D). first (S, D, N): what enters
    the first chunk.
    """
    per_state = tl.cdiv(n_channels, BLOCK)
    s = tl.program_id(0) // (N * per_state)
    n = tl.program_id(0) // per_state % N
    d = tl.program_id(0) % per_state * BLOCK + tl.arange(0, BLOCK)
    in_d = d < n_channels
    chunks, slot = chunks_of(cu_seqlens, s, length, CHUNK)
    A2 = load_float(A, n * n_channels + d, in_d) * LOG2E
    h = load_float(first, (s.to(tl.int64) * n_channels + d) * N + n, in_d)
    at = slot * N * n_channels + n * n_channels + d
    for i in range(0, chunks, AHEAD):
        ends, decays = (), ()
        for k in tl.static_range(AHEAD):
            chunk = chunks - 1 - (i + k) if BACKWARDS else i + k
            there = in_d & (i + k < chunks - 1)  # nothing comes after the last
            ends += (tl.load(own + at + chunk.to(tl.int64) * (N * n_channels), mask=there, other=0.0),)
            decays += (tl.load(sums + (slot + chunk) * n_channels + d, mask=there, other=0.0),)
        for k in tl.static_range(AHEAD):
            chunk = chunks - 1 - (i + k) if BACKWARDS else i + k
            tl.store(own + at + chunk.to(tl.int64) * (N * n_channels), h, mask=in_d & (i + k < chunks))
            h = tl.fma(tl.exp2(decays[k] * A2), h, ends[k])


def carry(own, sums, A, first, cu_seqlens, length: int, n_seqs: int, chunk: int, *, backwards: bool) -> None:
    """Launch `pass_states`."""
    n_states, n_channels = A.shape
    block = 32  # channels of a program
    pass_states[(n_seqs * n_states * ceil_div(n_channels, block),)](
        own, sums, A, first, cu_seqlens, length, n_channels, n_states, BLOCK=block, AHEAD=_AHEAD, CHUNK=chunk,
        BACKWARDS=backwards, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "B_stride", "B_group", "C_stride", "C_group"])
def _prepare(
    A, B, C, to_A, to_B, to_C, n_tokens, B_stride, B_group, C_stride, C_group,
    n_channels: tl.constexpr, G: tl.constexpr, N: tl.constexpr, STATIC_B: tl.constexpr, STATIC_C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What `prepare` returns: as many programs as the parameters have blocks, then those for the tokens' matrices."""
    program = tl.program_id(0)
    matrix_blocks: tl.constexpr = (n_channels * N + BLOCK - 1) // BLOCK
    if program < matrix_blocks:
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n_channels * N
        source = at % n_channels * N + at // n_channels
        tl.store(to_A + at, load_float(A, source, inside), mask=inside)
        if STATIC_B:
            tl.store(to_B + at, load_float(B, source, inside), mask=inside)
        if STATIC_C:
            tl.store(to_C + at, load_float(C, source, inside), mask=inside)
    else:
        at = (program - matrix_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        token, group, n = at // (G * N), at // N % G, at % N
        inside = token < n_tokens
        if (to_B is not None) and (not STATIC_B):
            tl.store(to_B + at, load_float(B, token * B_stride + group * B_group + n, inside), mask=inside)
        if (to_C is not None) and (not STATIC_C):
            tl.store(to_C + at, load_float(C, token * C_stride + group * C_group + n, inside), mask=inside)


def prepare(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C as the kernels read them fastest, in float32, by one launch.

    (D, N) becomes (N, D), for lanes that hold channels; (T, G, N), which every tile of channels reads anew, is
    converted once unless it is float32.
    """
    n_channels, n_states = A.shape

    def made(x: Tensor) -> Tensor | None:
        if x.dim() == 3:
            return None if x.dtype == torch.float32 else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        return torch.empty(n_states, n_channels, device=x.device)

    given = [x.contiguous() if x.dim() == 2 else with_rows(x) for x in (A, B, C)]
    new = [made(x) for x in given]
    by_token = next((x for x in new if x is not None and x.dim() == 3), None)
    n_tokens, groups = (0, 1) if by_token is None else by_token.shape[:2]
    blocks = ceil_div(n_channels * n_states, _BLOCK) + ceil_div(n_tokens * groups * n_states, _BLOCK)
    _prepare[(blocks,)](
        *given, *new, n_tokens, *(stride for x in given[1:] for stride in x.stride()[:2]), n_channels, groups, n_states,
        STATIC_B=B.dim() == 2, STATIC_C=C.dim() == 2, BLOCK=_BLOCK,
    )  # fmt: skip
    A, B, C = (x if y is None else y for x, y in zip(given, new, strict=True))
    return A, B, C
