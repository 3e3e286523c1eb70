"""Selective scan in Triton: serial in time, lanes over channels and states, the state in registers.

One program is a tile of channels of one sequence; its state (BLOCK_N, BLOCK_D) stays in registers while time runs, and
nothing of size (tokens, D, N) is ever stored. Steps are taken in unrolled groups of K whose loads are all issued first.

For the backward the forward leaves the state before every `CHECKPOINT`-th step. The backward walks these pieces from
the last to the first: it runs a piece forwards once, leaving the state before each group in a scratch of its own, and
then takes the groups from the last to the first: it runs each again, its states now kept in registers, and goes back
through it.

No atomics: a program writes its own share of the gradients that channels or sequences have in common, and a second
kernel adds the shares in a fixed order. The tile is chosen from D, G and N alone, so that no result of a sequence
depends on how many others there are.

Letters: T tokens of all sequences laid end to end, S sequences, D channels, N states, G groups. What is absent is None.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import checkpoint_slots
from ..triton_runtime import LN2, LOG2E, load_float, load_rows, sigmoid, softplus, sum_first_axis, token_of, with_rows

CHECKPOINT = 64  # steps between saved states, which so cost N / 64 of a (T, D) tensor
FORWARD_STEPS = 8  # K of the forward: loads in flight
BACKWARD_STEPS = 4  # K of the backward, which keeps K states in registers


@triton.jit
def _job(cu_seqlens, length, n_channels, per_group, BLOCK_D: tl.constexpr):
    """This program's sequence, its first token and length; its group, its tile of the group, its channels there."""
    tiles_per_group = tl.cdiv(per_group, BLOCK_D)
    n_tiles = n_channels // per_group * tiles_per_group
    s = tl.program_id(0) // n_tiles
    tile = tl.program_id(0) % n_tiles
    if cu_seqlens is None:
        start = s.to(tl.int64) * length
    else:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        length = (tl.load(cu_seqlens + s + 1) - start).to(tl.int32)
    in_group = tile % tiles_per_group * BLOCK_D + tl.arange(0, BLOCK_D)
    return s, start, length, tile // tiles_per_group, tile % tiles_per_group, in_group


@triton.jit
def _step_size(raw, valid, SOFTPLUS: tl.constexpr):
    """dt from delta + bias: 0 beyond the last step, which so leaves the state as it is."""
    return tl.where(valid, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _advance(h, A2, dt, dtu, b):
    return tl.exp2(dt[None, :] * A2) * h + dtu[None, :] * b


@triton.jit(do_not_specialize=["length"])
def _forward(
    u, delta, A, B, C, D, z, bias, h0, cu_seqlens, y, final, saved,
    u_stride, delta_stride, B_stride, B_group, C_stride, C_group, z_stride, length, n_channels, per_group,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr, EVERY: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    s, start, length, group, _, in_group = _job(cu_seqlens, length, n_channels, per_group, BLOCK_D)
    d, n = group * per_group + in_group, tl.arange(0, BLOCK_N)
    in_d, in_n = in_group < per_group, n < N
    at, inside = d[None, :] * N + n[:, None], in_d[None, :] & in_n[:, None]
    state_at = s.to(tl.int64) * n_channels * N + at

    A2 = load_float(A, at, inside) * LOG2E
    skip, bias_row = load_float(D, d, in_d), load_float(bias, d, in_d)
    h = load_float(h0, state_at, inside)
    if STATIC_B:
        b = load_float(B, at, inside)
    else:
        B += group * B_group
    if STATIC_C:
        c = load_float(C, at, inside)
    else:
        C += group * C_group

    for step in range(0, length, K):
        if saved is not None:
            if step % EVERY == 0:
                slot = start // EVERY + s + step // EVERY
                tl.store(saved + slot * n_channels * N + at, h, mask=inside)
        token = token_of(start, length, step, REVERSE)
        us = load_rows(u, token, u_stride, d, in_d, step, length, K, REVERSE)
        deltas = load_rows(delta, token, delta_stride, d, in_d, step, length, K, REVERSE)
        if z is not None:
            zs = load_rows(z, token, z_stride, d, in_d, step, length, K, REVERSE)
        if not STATIC_B:
            bs = load_rows(B, token, B_stride, n, in_n, step, length, K, REVERSE)
        if not STATIC_C:
            cs = load_rows(C, token, C_stride, n, in_n, step, length, K, REVERSE)
        for i in tl.static_range(K):
            valid = step + i < length
            x = us[i].to(tl.float32)
            dt = _step_size(deltas[i].to(tl.float32) + bias_row, valid, SOFTPLUS)
            if not STATIC_B:
                b = bs[i].to(tl.float32)[:, None]
            if not STATIC_C:
                c = cs[i].to(tl.float32)[:, None]
            h = _advance(h, A2, dt, dt * x, b)
            out = tl.sum(h * c, axis=0) + skip * x
            if z is not None:
                gate = zs[i].to(tl.float32)
                out *= gate * sigmoid(gate)
            row = token - i if REVERSE else token + i
            tl.store(y + row * n_channels + d, out, mask=in_d & valid)
    tl.store(final + state_at, h, mask=inside)


@triton.jit(do_not_specialize=["length", "n_tokens"])
def _backward(
    dy, dfinal, u, delta, A, B, C, D, z, bias, cu_seqlens, saved, scratch,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
    dy_stride, u_stride, delta_stride, B_stride, B_group, C_stride, C_group, z_stride,
    length, n_tokens, n_channels, per_group,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr, EVERY: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    s, start, length, group, tile, in_group = _job(cu_seqlens, length, n_channels, per_group, BLOCK_D)
    d, n = group * per_group + in_group, tl.arange(0, BLOCK_N)
    in_d, in_n = in_group < per_group, n < N
    at, inside = d[None, :] * N + n[:, None], in_d[None, :] & in_n[:, None]
    state_at = s.to(tl.int64) * n_channels * N + at
    scratch += tl.program_id(0).to(tl.int64) * ((EVERY // K - 1) * BLOCK_N * BLOCK_D)
    scratch_at = tl.arange(0, BLOCK_D)[None, :] * BLOCK_N + n[:, None]

    A2 = load_float(A, at, inside) * LOG2E
    skip, bias_row = load_float(D, d, in_d), load_float(bias, d, in_d)
    grad = load_float(dfinal, state_at, inside)  # dL/dh after the step at hand
    sum_dA = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_dD, sum_dbias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    # The share of a tile of channels in the gradients of a token's B and C, (tile, token, group, N)
    share_at = (tile.to(tl.int64) * n_tokens * (n_channels // per_group) + group) * N + n
    share_stride = n_channels // per_group * N
    if STATIC_B:
        b, sum_dB = load_float(B, at, inside), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        B += group * B_group
    if STATIC_C:
        c, sum_dC = load_float(C, at, inside), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        C += group * C_group

    for piece in range(tl.cdiv(length, EVERY) - 1, -1, -1):
        slot = start // EVERY + s + piece
        h = load_float(saved, slot * n_channels * N + at, inside)
        last = tl.cdiv(tl.minimum(EVERY, length - piece * EVERY), K) - 1  # group of the piece
        for j in range(last):
            tl.store(scratch + j * (BLOCK_N * BLOCK_D) + scratch_at, h)
            step = piece * EVERY + j * K
            token = token_of(start, length, step, REVERSE)
            us = load_rows(u, token, u_stride, d, in_d, step, length, K, REVERSE)
            deltas = load_rows(delta, token, delta_stride, d, in_d, step, length, K, REVERSE)
            if not STATIC_B:
                bs = load_rows(B, token, B_stride, n, in_n, step, length, K, REVERSE)
            for i in tl.static_range(K):
                dt = _step_size(deltas[i].to(tl.float32) + bias_row, True, SOFTPLUS)
                if not STATIC_B:
                    b = bs[i].to(tl.float32)[:, None]
                h = _advance(h, A2, dt, dt * us[i].to(tl.float32), b)
        tl.debug_barrier()  # what one thread has written to the scratch another may read

        for j in range(last, -1, -1):
            step = piece * EVERY + j * K
            token = token_of(start, length, step, REVERSE)
            us = load_rows(u, token, u_stride, d, in_d, step, length, K, REVERSE)
            deltas = load_rows(delta, token, delta_stride, d, in_d, step, length, K, REVERSE)
            dys = load_rows(dy, token, dy_stride, d, in_d, step, length, K, REVERSE)
            if z is not None:
                zs = load_rows(z, token, z_stride, d, in_d, step, length, K, REVERSE)
            if not STATIC_B:
                bs = load_rows(B, token, B_stride, n, in_n, step, length, K, REVERSE)
            if not STATIC_C:
                cs = load_rows(C, token, C_stride, n, in_n, step, length, K, REVERSE)
            states, raws, dts = (h,), (), ()
            for i in tl.static_range(K):
                raws += (deltas[i].to(tl.float32) + bias_row,)
                dts += (_step_size(raws[i], step + i < length, SOFTPLUS),)
                if not STATIC_B:
                    b = bs[i].to(tl.float32)[:, None]
                states += (_advance(states[i], A2, dts[i], dts[i] * us[i].to(tl.float32), b),)

            for i in tl.static_range(K - 1, -1, -1):
                valid = step + i < length
                row = token - i if REVERSE else token + i
                row_at = row * n_channels + d
                x, dt, dout = us[i].to(tl.float32), dts[i], dys[i].to(tl.float32)
                if not STATIC_B:
                    b = bs[i].to(tl.float32)[:, None]
                if not STATIC_C:
                    c = cs[i].to(tl.float32)[:, None]
                # y = (C h + D u) silu(z)
                if z is not None:
                    gate = zs[i].to(tl.float32)
                    sig = sigmoid(gate)
                    out = tl.sum(states[i + 1] * c, axis=0) + skip * x
                    tl.store(dz + row_at, dout * out * sig * (1.0 + gate * (1.0 - sig)), mask=in_d & valid)
                    dout *= gate * sig
                if STATIC_C:
                    sum_dC += dout[None, :] * states[i + 1]
                else:
                    share = tl.sum(dout[None, :] * states[i + 1], axis=1)
                    tl.store(dC + row * share_stride + share_at, share, mask=in_n & valid)
                sum_dD += dout * x
                grad += dout[None, :] * c
                # h = exp(dt A) h + dt u B
                if STATIC_B:
                    sum_dB += grad * (dt * x)[None, :]
                else:
                    share = tl.sum(grad * (dt * x)[None, :], axis=1)
                    tl.store(dB + row * share_stride + share_at, share, mask=in_n & valid)
                d_dtu = tl.sum(grad * b, axis=0)
                grad *= tl.exp2(dt[None, :] * A2)
                d_exponent = grad * states[i]
                sum_dA += d_exponent * dt[None, :]
                d_dt = tl.sum(d_exponent * A2, axis=0) * LN2 + d_dtu * x
                # dt = softplus(delta + bias)
                if SOFTPLUS:
                    d_dt *= sigmoid(raws[i])
                sum_dbias += tl.where(valid, d_dt, 0.0)
                tl.store(ddelta + row_at, d_dt, mask=in_d & valid)
                tl.store(du + row_at, d_dtu * dt + dout * skip, mask=in_d & valid)
            h = tl.load(
                scratch + (j - 1) * (BLOCK_N * BLOCK_D) + scratch_at, mask=(n >= 0)[:, None] & (j > 0), other=0.0
            )
        tl.debug_barrier()  # all have read the scratch

    tl.store(dA + state_at, sum_dA, mask=inside)
    if STATIC_B:
        tl.store(dB + state_at, sum_dB, mask=inside)
    if STATIC_C:
        tl.store(dC + state_at, sum_dC, mask=inside)
    sum_at = s.to(tl.int64) * n_channels + d
    if dD is not None:
        tl.store(dD + sum_at, sum_dD, mask=in_d)
    if dbias is not None:
        tl.store(dbias + sum_at, sum_dbias, mask=in_d)
    if dh0 is not None:
        tl.store(dh0 + state_at, grad, mask=inside)


def _tile(n_states: int, per_group: int, is_backward: bool) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_D, warps) of a program: 512 (state, channel) pairs a warp, 16 a lane, as registers allow.

    Two cases want fewer channels: very many states, which spread over several warps so that each sum over them goes
    through shared memory; and the backward of 16 states, which keeps those of K steps (2.9 ms instead of 3.8 at batch
    8, length 2048, 2048 channels on an H100).
    """
    block_n = triton.next_power_of_2(n_states)
    narrow = block_n > 64 or (is_backward and block_n == 16)
    block_d = min(16 if narrow else 32, triton.next_power_of_2(per_group))
    return block_n, block_d, max(1, block_n * block_d // 512)


def _arguments(
    u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, is_backward=False
) -> tuple[int, dict]:
    """What both directions share: the number of sequences, and arguments of the kernels."""
    n_channels, n_states = A.shape
    n_seqs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_group = n_channels // next((x.shape[1] for x in (B, C) if x.dim() == 3), 1)
    block_n, block_d, num_warps = _tile(n_states, per_group, is_backward)
    u, delta, z = (None if x is None else with_rows(x) for x in (u, delta, z))
    B, C = (x.contiguous() if x.dim() == 2 else with_rows(x) for x in (B, C))
    D, bias, cu_seqlens = (None if x is None else x.contiguous() for x in (D, delta_bias, cu_seqlens))
    return n_seqs, {
        "u": u, "delta": delta, "A": A.contiguous(), "B": B, "C": C, "D": D, "z": z, "bias": bias,
        "cu_seqlens": cu_seqlens, "length": u.shape[0] // max(batch, 1), "n_channels": n_channels,
        "per_group": per_group, "u_stride": u.stride(0), "delta_stride": delta.stride(0),
        "z_stride": 0 if z is None else z.stride(0), "B_stride": B.stride(0), "B_group": B.stride(1),
        "C_stride": C.stride(0), "C_group": C.stride(1), "N": n_states, "BLOCK_N": block_n, "BLOCK_D": block_d,
        "EVERY": CHECKPOINT, "STATIC_B": B.dim() == 2, "STATIC_C": C.dim() == 2, "SOFTPLUS": softplus,
        "REVERSE": reverse, "num_warps": num_warps,
    }  # fmt: skip


def _n_tiles(arguments: dict) -> int:
    """Tiles of channels of a sequence."""
    n_groups = arguments["n_channels"] // arguments["per_group"]
    return n_groups * triton.cdiv(arguments["per_group"], arguments["BLOCK_D"])


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    n_seqs, arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = torch.empty(n_seqs, *A.shape, device=u.device)
    saved = torch.empty(saved_shape(u.shape[0], n_seqs, *A.shape) if save else (0, *A.shape), device=u.device)
    h0 = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(u):
        _forward[(n_seqs * _n_tiles(arguments),)](
            **arguments, h0=h0, y=y, final=final, saved=saved if save else None, K=FORWARD_STEPS
        )
    return y, final, saved


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse
):
    n_seqs, arguments = _arguments(
        u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, is_backward=True
    )
    n_programs = n_seqs * _n_tiles(arguments)
    tiles_of_group = triton.cdiv(arguments["per_group"], arguments["BLOCK_D"])

    def empty(like: Tensor | None) -> Tensor | None:
        return None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def shares(like: Tensor | None) -> Tensor | None:
        """Room for the shares in a gradient: those of a group's tiles if it depends on the token, else of sequences."""
        if like is None:
            return None
        return torch.empty(tiles_of_group if like.dim() == 3 else n_seqs, *like.shape, device=like.device)

    du, ddelta, dz, dh0 = empty(u), empty(delta), empty(z), empty(initial_state)
    dA, dB, dC, dD, dbias = shares(A), shares(B), shares(C), shares(D), shares(delta_bias)
    block = arguments["BLOCK_N"], arguments["BLOCK_D"]
    scratch = torch.empty(n_programs, CHECKPOINT // BACKWARD_STEPS - 1, *block, device=u.device)
    dy = with_rows(dy)
    with torch.cuda.device_of(u):
        _backward[(n_programs,)](
            **arguments, dy=dy, dfinal=None if dfinal is None else dfinal.contiguous(), saved=saved, scratch=scratch,
            du=du, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dz=dz, dbias=dbias, dh0=dh0,
            dy_stride=dy.stride(0), n_tokens=u.shape[0], K=BACKWARD_STEPS,
        )  # fmt: skip
        dA, dB, dC, dD, dbias = (None if x is None else sum_first_axis(x) for x in (dA, dB, dC, dD, dbias))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


def step(state, u, delta, A, B, C, D, z, delta_bias, softplus):
    """A batch of sequences of one token each, their final state written over the initial one."""
    n_seqs, arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, None, u.shape[0], softplus, False)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    h = state.contiguous()
    with torch.cuda.device_of(u):
        _forward[(n_seqs * _n_tiles(arguments),)](**arguments, h0=h, y=y, final=h, saved=None, K=1)
    if h is not state:
        state.copy_(h)
    return y


def saved_shape(n_tokens: int, n_seqs: int, n_channels: int, n_states: int) -> tuple[int, int, int]:
    """Shape of the saved states that `forward` returns."""
    return checkpoint_slots(n_tokens, n_seqs, CHECKPOINT), n_channels, n_states
