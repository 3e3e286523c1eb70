"""The Triton scan forwards: lanes over channels, the states of a channel in its lane's registers, time in a loop.

Steps are taken in unrolled groups of K. The rows of the next group are loaded while one is computed (B and C, of which
every lane needs all, only into the cache: `_touch`), and nothing is stored before a group's end: a store would hold up
every load after it. A group that the sequence ends in is run in smaller ones whose loads are masked.

Letters: T tokens of all sequences laid end to end, S sequences, D channels, N states, G groups. What is absent is None.
"""

import triton
import triton.language as tl

from ..triton_runtime import LOG2E, load_float, load_rows, piece_of, sigmoid, token_of
from .triton_chunks import pairs_at, states_of, step_size, tile_of


@triton.jit
def _touch(x, token, stride: tl.constexpr, n, in_n, there, K: tl.constexpr, REVERSE: tl.constexpr):
    """The rows of a group's K steps, a number to a lane: so that they are in the cache when every lane loads them all.

    Those loads wait for the second-level cache otherwise: there are no registers to issue them long before.
    """
    step = tl.arange(0, K)[:, None]
    token = token - step if REVERSE else token + step
    return tl.load(x + token * stride + n[None, :], mask=in_n[None, :] & there, other=0.0).to(tl.float32)


@triton.jit
def _keep(touched, room, n, in_n, zero, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store what was touched if `zero` is not 0: never, but the compiler does not know and so keeps the loads."""
    at = tl.arange(0, K)[:, None] * BLOCK_N + n[None, :]
    tl.store(room + at, touched, mask=in_n[None, :] & (zero != 0))


@triton.jit
def _steps(
    h, own, total, A2, skip, bias_row, b, c, us, deltas, zs, B, C, y, token, step, end, d, in_d, n, in_n,
    B_stride: tl.constexpr, C_stride: tl.constexpr, n_channels: tl.constexpr, STATIC_B: tl.constexpr,
    STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr, OWN: tl.constexpr,
    K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """K steps: (state, state from 0 at the start of the chunk if OWN, sum of dt)."""
    if not STATIC_B:
        bs = load_rows(B, token, B_stride, n, in_n, step, end, K, REVERSE, WHOLE)
    if not STATIC_C:
        cs = load_rows(C, token, C_stride, n, in_n, step, end, K, REVERSE, WHOLE)
    outs = ()
    for i in tl.static_range(K):
        x = us[i].to(tl.float32)
        dt = step_size(deltas[i].to(tl.float32) + bias_row, step + i, end, SOFTPLUS, WHOLE)
        total += dt
        if not STATIC_B:
            b = bs[i].to(tl.float32)[:, None]
        if not STATIC_C:
            c = cs[i].to(tl.float32)[:, None]
        decay, drive = tl.exp2(dt[None, :] * A2), (dt * x)[None, :] * b
        h = tl.fma(decay, h, drive)
        if OWN:
            own = tl.fma(decay, own, drive)
        out = tl.sum(h * c, axis=0) + skip * x
        if GATE:
            gate = zs[i].to(tl.float32)
            out *= gate * sigmoid(gate)
        outs += (out,)
    for i in tl.static_range(K):
        row = token - i if REVERSE else token + i
        inside = in_d if WHOLE else in_d & (step + i < end)
        tl.store(y + row * n_channels + d, outs[i], mask=inside)
    return h, own, total


@triton.jit(do_not_specialize=["length", "n_seqs", "zero"])
def scan_forward(
    u, delta, A, B, C, D, z, bias, h0, cu_seqlens, entering, y, final, saved, length, n_seqs, zero,
    u_stride: tl.constexpr, delta_stride: tl.constexpr, z_stride: tl.constexpr,
    B_stride: tl.constexpr, B_group: tl.constexpr, C_stride: tl.constexpr, C_group: tl.constexpr,
    N_STRIDE: tl.constexpr, D_STRIDE: tl.constexpr,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    K: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """A tile of channels of one chunk, from its state in `entering`; if that is None, of all chunks of a sequence.

    OWN: whether a sequence may have more than one of them. saved (slot, N, D): the state before every EVERY-th step.
    """
    n_tiles: tl.constexpr = n_channels // per_group * ((per_group + BLOCK_D - 1) // BLOCK_D)
    number = tl.program_id(0) // n_tiles
    group, _, d, in_d = tile_of(tl.program_id(0) % n_tiles, per_group, BLOCK_D)
    n, in_n = states_of(N, BLOCK_N)
    at, inside = pairs_at(n, d, in_n, in_d, n_channels, 1, zero)
    of_parameter, _ = pairs_at(n, d, in_n, in_d, N_STRIDE, D_STRIDE, zero)
    of_state = n[:, None] + d[None, :] * N
    if entering is None:
        s, begin = number, 0
        start = s.to(tl.int64) * length
        if cu_seqlens is not None:
            start = tl.load(cu_seqlens + s).to(tl.int64)
            length = (tl.load(cu_seqlens + s + 1) - start).to(tl.int32)
        stop = length
        h = load_float(h0, s.to(tl.int64) * n_channels * N + of_state, inside)
    else:
        s, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, CHUNK)
        if (begin >= length) & (begin > 0):
            return
        stop = tl.minimum(begin + CHUNK, length)
        h = tl.load(entering + number.to(tl.int64) * N * n_channels + at, mask=inside, other=0.0)

    A2 = load_float(A, of_parameter, inside) * LOG2E
    skip, bias_row = load_float(D, d, in_d), load_float(bias, d, in_d)
    b = load_float(B, of_parameter, inside) if STATIC_B else None
    c = load_float(C, of_parameter, inside) if STATIC_C else None
    if not STATIC_B:
        B += group * B_group
    if not STATIC_C:
        C += group * C_group

    TOUCH: tl.constexpr = K > 1 and zero is not None
    for chunk in range(begin, stop, CHUNK):
        end = tl.minimum(chunk + CHUNK, stop)
        whole = end - (end - chunk) % K
        before, own, total = h, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
        token = token_of(start, length, chunk, REVERSE)
        ready = chunk < whole
        next_u = load_rows(u, token, u_stride, d, in_d & ready, 0, 0, K, REVERSE, True)
        next_delta = load_rows(delta, token, delta_stride, d, in_d & ready, 0, 0, K, REVERSE, True)
        next_z = next_u
        if z is not None:
            next_z = load_rows(z, token, z_stride, d, in_d & ready, 0, 0, K, REVERSE, True)
        for step in range(chunk, whole, K):
            if saved is not None:
                if step % EVERY == 0:
                    slot = start // EVERY + s + step // EVERY
                    tl.store(saved + slot * n_channels * N + at, h, mask=inside)
            token = token_of(start, length, step, REVERSE)
            us, deltas, zs = next_u, next_delta, next_z
            after = token_of(start, length, step + K, REVERSE)
            ready = step + K < whole
            next_u = load_rows(u, after, u_stride, d, in_d & ready, 0, 0, K, REVERSE, True)
            next_delta = load_rows(delta, after, delta_stride, d, in_d & ready, 0, 0, K, REVERSE, True)
            if z is not None:
                next_z = load_rows(z, after, z_stride, d, in_d & ready, 0, 0, K, REVERSE, True)
            else:
                next_z = next_u
            touched = tl.zeros((K, BLOCK_N), tl.float32)
            if TOUCH and not STATIC_B:
                touched += _touch(B, after, B_stride, n, in_n, ready, K, REVERSE)
            if TOUCH and not STATIC_C:
                touched += _touch(C, after, C_stride, n, in_n, ready, K, REVERSE)
            h, own, total = _steps(
                h, own, total, A2, skip, bias_row, b, c, us, deltas, zs, B, C, y, token, step, end, d, in_d, n, in_n,
                B_stride, C_stride, n_channels, STATIC_B, STATIC_C, SOFTPLUS, REVERSE, z is not None, OWN, K, True,
            )  # fmt: skip
            if TOUCH:
                _keep(touched, final, n, in_n, zero, K, BLOCK_N)
        for step in range(whole, end, TAIL):
            if saved is not None:
                if step % EVERY == 0:
                    slot = start // EVERY + s + step // EVERY
                    tl.store(saved + slot * n_channels * N + at, h, mask=inside)
            token = token_of(start, length, step, REVERSE)
            us = load_rows(u, token, u_stride, d, in_d, step, end, TAIL, REVERSE)
            deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, TAIL, REVERSE)
            zs = us
            if z is not None:
                zs = load_rows(z, token, z_stride, d, in_d, step, end, TAIL, REVERSE)
            h, own, total = _steps(
                h, own, total, A2, skip, bias_row, b, c, us, deltas, zs, B, C, y, token, step, end, d, in_d, n, in_n,
                B_stride, C_stride, n_channels, STATIC_B, STATIC_C, SOFTPLUS, REVERSE, z is not None, OWN, TAIL, False,
            )  # fmt: skip
        if OWN:
            if end < length:
                h = tl.fma(tl.exp2(total[None, :] * A2), before, own)
    if stop == length:
        tl.store(final + s.to(tl.int64) * n_channels * N + of_state, h, mask=inside)


@triton.jit(do_not_specialize=["length", "n_seqs", "zero"])
def chunk_ends(
    u, delta, A, B, bias, cu_seqlens, own, sums, length, n_seqs, zero,
    u_stride: tl.constexpr, delta_stride: tl.constexpr, B_stride: tl.constexpr, B_group: tl.constexpr,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_B: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The state after a chunk that starts from 0, own (chunk, N, D), and its sum of dt, sums (chunk, D).

    Not of a sequence's last chunk, after which nothing comes: so every chunk here is whole.
    """
    n_tiles: tl.constexpr = n_channels // per_group * ((per_group + BLOCK_D - 1) // BLOCK_D)
    number = tl.program_id(0) // n_tiles
    _, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, CHUNK)
    if begin + CHUNK >= length:
        return
    group, _, d, in_d = tile_of(tl.program_id(0) % n_tiles, per_group, BLOCK_D)
    n, in_n = states_of(N, BLOCK_N)
    at, inside = pairs_at(n, d, in_n, in_d, n_channels, 1, zero)
    A2, bias_row = load_float(A, at, inside) * LOG2E, load_float(bias, d, in_d)
    if STATIC_B:
        b = load_float(B, at, inside)
    else:
        B += group * B_group
    h, total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    token = token_of(start, length, begin, REVERSE)
    next_u = load_rows(u, token, u_stride, d, in_d, 0, 0, K, REVERSE, True)
    next_delta = load_rows(delta, token, delta_stride, d, in_d, 0, 0, K, REVERSE, True)
    for step in range(begin, begin + CHUNK, K):
        token = token_of(start, length, step, REVERSE)
        after = token_of(start, length, step + K, REVERSE)
        us, deltas = next_u, next_delta
        ready = in_d & (step + K < begin + CHUNK)
        next_u = load_rows(u, after, u_stride, d, ready, 0, 0, K, REVERSE, True)
        next_delta = load_rows(delta, after, delta_stride, d, ready, 0, 0, K, REVERSE, True)
        if not STATIC_B:
            bs = load_rows(B, token, B_stride, n, in_n, step, length, K, REVERSE, True)
        for i in tl.static_range(K):
            dt = step_size(deltas[i].to(tl.float32) + bias_row, 0, 0, SOFTPLUS, True)
            total += dt
            if not STATIC_B:
                b = bs[i].to(tl.float32)[:, None]
            h = tl.fma(tl.exp2(dt[None, :] * A2), h, (dt * us[i].to(tl.float32))[None, :] * b)
    slot = number.to(tl.int64)
    tl.store(own + slot * N * n_channels + at, h, mask=inside)
    tl.store(sums + slot * n_channels + d, total, mask=in_d)
