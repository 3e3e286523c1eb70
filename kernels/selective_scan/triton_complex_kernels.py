"""The Triton scan of complex A: lanes over channels, the states of a channel in its lane's registers, time in a loop.

The chunks of a sequence are always run all at once (triton_chunks.py says how), whatever else there is to do.

Complex numbers that others see (final and initial states, B and C of tokens) are pairs side by side. Those that only
these kernels see are two planes, of real and of imaginary parts: neighbours in memory are then neighbouring channels,
by which Triton gives each lane a channel. (By pairs it gave each a state, and every sum over states crossed lanes.)

    h_t = exp(dt A) h_{t-1} + dt u B;  y = 2 Re(C h) + D u, times silu(z)

Of L, a gradient is dL/d(Re) + i dL/d(Im). That of h, G, takes 2 dL/dy conj(C) at each step and conj(exp(dt A)) on the
way to the one before; B's is dt u G, C's 2 dL/dy conj(h), and that of dt A is conj(h_{t-1}) times G at the step before.

Letters: T tokens of all sequences laid end to end, S sequences, D channels, N states, G groups. What is absent is None.
"""

import triton
import triton.language as tl

from ..triton_runtime import LOG2E, load_float, load_rows, piece_of, sigmoid, softplus_and_slope, token_of
from .triton_chunks import chunks_of, pairs_at, states_of, step_size, tile_of
from .triton_complex_numbers import (
    add_step,
    decay_of,
    decay_over,
    load_pairs,
    load_planes,
    rows_of,
    store_pairs,
    store_planes,
    times,
)

# Of the strides the kernels learn nothing: so a row is computed as its batch is.
_STRIDES = (
    *("dy_stride", "u_stride", "delta_stride", "z_stride"),
    *("B_stride", "B_group", "C_stride", "C_group"),
)


@triton.jit(do_not_specialize=["length", "n_seqs", "zero", *_STRIDES])
def scan_forward(
    u, delta, A, B, C, D, z, bias, cu_seqlens, entering, own, sums, y, final, saved,
    length, n_seqs, zero, u_stride, delta_stride, z_stride, B_stride, B_group, C_stride, C_group,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, COMPLEX_B: tl.constexpr, COMPLEX_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr,
    ENDS: tl.constexpr,
):  # fmt: skip
    """A tile of channels of one chunk, from its state in `entering` (chunk, 2, N, D), or from 0.

    ENDS: only what the chunk arrives at from 0, own (chunk, 2, N, D), and its sum of dt and what that lost, sums
    (chunk, 2, D); not of a sequence's last chunk, after which nothing comes. saved (slot, 2, N, D): the state before
    every EVERY-th step. A and static B, C (2, N, D), of what is real (N, D).
    """
    n_tiles: tl.constexpr = n_channels // per_group * ((per_group + BLOCK_D - 1) // BLOCK_D)
    number = tl.program_id(0) // n_tiles
    s, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, CHUNK)
    if (begin >= length) & (begin > 0):
        return
    if ENDS:
        if begin + CHUNK >= length:
            return
    group, _, d, in_d = tile_of(tl.program_id(0) % n_tiles, per_group, BLOCK_D)
    n, in_n = states_of(N, BLOCK_N)
    at, inside = pairs_at(n, d, in_n, in_d, n_channels, 1, zero)
    of_state = n[:, None] + d[None, :] * N
    PLANE: tl.constexpr = N * n_channels
    A_re, A_im = load_planes(A, at, PLANE, inside)
    A2 = A_re * LOG2E
    skip, bias_row = load_float(D, d, in_d), load_float(bias, d, in_d)
    if STATIC_B:
        b_re, b_im = load_planes(B, at, PLANE, inside, COMPLEX_B)
    else:
        B += group * B_group
    if STATIC_C:
        c_re, c_im = load_planes(C, at, PLANE, inside, COMPLEX_C)
    else:
        C += group * C_group
    h_re, h_im = load_planes(entering, number.to(tl.int64) * 2 * PLANE + at, PLANE, inside)
    total, lost = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    end = tl.minimum(begin + CHUNK, length)
    for step in range(begin, end, K):
        if saved is not None:
            if step % EVERY == 0:
                slot = start // EVERY + s + step // EVERY
                store_planes(saved, slot * 2 * PLANE + at, PLANE, h_re, h_im, inside)
        token = token_of(start, length, step, REVERSE)
        us = load_rows(u, token, u_stride, d, in_d, step, end, K, REVERSE)
        deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, K, REVERSE)
        zs = us
        if z is not None:
            zs = load_rows(z, token, z_stride, d, in_d, step, end, K, REVERSE)
        if not STATIC_B:
            bs_re, bs_im = rows_of(B, token, B_stride, n, in_n, step, end, K, REVERSE, COMPLEX_B)
        if not ENDS and not STATIC_C:
            cs_re, cs_im = rows_of(C, token, C_stride, n, in_n, step, end, K, REVERSE, COMPLEX_C)
        for i in tl.static_range(K):
            x = us[i].to(tl.float32)
            dt = step_size(deltas[i].to(tl.float32) + bias_row, step + i, end, SOFTPLUS, False)
            total, lost = add_step(total, lost, dt)
            if not STATIC_B:
                b_re, b_im = bs_re[i], bs_im[i]
            e_re, e_im = decay_of(dt[None, :], A2, A_im)
            h_re, h_im = times(e_re, e_im, h_re, h_im)
            h_re = tl.fma((dt * x)[None, :], b_re, h_re)
            h_im = tl.fma((dt * x)[None, :], b_im, h_im)
            if not ENDS:
                if not STATIC_C:
                    c_re, c_im = cs_re[i], cs_im[i]
                out = 2.0 * tl.sum(c_re * h_re - c_im * h_im, axis=0) + skip * x
                if z is not None:
                    gate = zs[i].to(tl.float32)
                    out *= gate * sigmoid(gate)
                row = token - i if REVERSE else token + i
                tl.store(y + row * n_channels + d, out, mask=in_d & (step + i < end))
    if ENDS:
        store_planes(own, number.to(tl.int64) * 2 * PLANE + at, PLANE, h_re, h_im, inside)
        store_planes(sums, number.to(tl.int64) * 2 * n_channels + d, n_channels, total, lost, in_d)
    else:
        if end == length:
            store_pairs(final, s.to(tl.int64) * PLANE + of_state, h_re, h_im, inside)


@triton.jit(do_not_specialize=["length"])
def pass_states(
    own, sums, A, first, cu_seqlens, length, n_channels: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """As that of triton_chunks.py. BACKWARDS gradients pass, which take the conjugate of a decay."""
    per_state = tl.cdiv(n_channels, BLOCK)
    s = tl.program_id(0) // (N * per_state)
    n = tl.program_id(0) // per_state % N
    d = tl.program_id(0) % per_state * BLOCK + tl.arange(0, BLOCK)
    in_d = d < n_channels
    chunks, slot = chunks_of(cu_seqlens, s, length, CHUNK)
    PLANE: tl.constexpr = N * n_channels
    at = n * n_channels + d
    A_re, A_im = load_planes(A, at, PLANE, in_d)
    A2 = A_re * LOG2E
    h_re, h_im = load_pairs(first, (s.to(tl.int64) * n_channels + d) * N + n, in_d)
    for i in range(0, chunks, AHEAD):
        ends_re, ends_im, totals, losts = (), (), (), ()
        for k in tl.static_range(AHEAD):
            chunk = slot + (chunks - 1 - (i + k) if BACKWARDS else i + k)
            there = in_d & (i + k < chunks - 1)  # nothing comes after the last
            re, im = load_planes(own, chunk * (2 * PLANE) + at, PLANE, there)
            ends_re += (re,)
            ends_im += (im,)
            total, lost = load_planes(sums, chunk * (2 * n_channels) + d, n_channels, there)
            totals += (total,)
            losts += (lost,)
        for k in tl.static_range(AHEAD):
            chunk = slot + (chunks - 1 - (i + k) if BACKWARDS else i + k)
            store_planes(own, chunk * (2 * PLANE) + at, PLANE, h_re, h_im, in_d & (i + k < chunks))
            e_re, e_im = decay_over(totals[k], losts[k], A2, A_im)
            if BACKWARDS:
                e_im = -e_im
            h_re, h_im = times(e_re, e_im, h_re, h_im)
            h_re += ends_re[k]
            h_im += ends_im[k]


@triton.jit(do_not_specialize=["length", "n_seqs", "zero", *_STRIDES])
def chunk_gradients(
    delta, A, C, dy, z, bias, cu_seqlens, own, sums, length, n_seqs, zero,
    delta_stride, C_stride, C_group, dy_stride, z_stride,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_C: tl.constexpr, COMPLEX_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """G before a chunk if it is 0 after it, own (chunk, 2, N, D), and the chunk's sum of dt and what that lost, sums.

    Not of a sequence's first chunk, before which nothing comes.
    """
    n_tiles: tl.constexpr = n_channels // per_group * ((per_group + BLOCK_D - 1) // BLOCK_D)
    number = tl.program_id(0) // n_tiles
    _, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, CHUNK)
    if (begin == 0) | (begin >= length):
        return
    group, _, d, in_d = tile_of(tl.program_id(0) % n_tiles, per_group, BLOCK_D)
    n, in_n = states_of(N, BLOCK_N)
    at, inside = pairs_at(n, d, in_n, in_d, n_channels, 1, zero)
    PLANE: tl.constexpr = N * n_channels
    A_re, A_im = load_planes(A, at, PLANE, inside)
    A2 = A_re * LOG2E
    bias_row = load_float(bias, d, in_d)
    if STATIC_C:
        c_re, c_im = load_planes(C, at, PLANE, inside, COMPLEX_C)
    else:
        C += group * C_group
    g_re, g_im = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total, lost = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    end = tl.minimum(begin + CHUNK, length)
    for j in range(tl.cdiv(end - begin, K) - 1, -1, -1):
        step = begin + j * K
        token = token_of(start, length, step, REVERSE)
        deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, K, REVERSE)
        dys = load_rows(dy, token, dy_stride, d, in_d, step, end, K, REVERSE)
        zs = dys
        if z is not None:
            zs = load_rows(z, token, z_stride, d, in_d, step, end, K, REVERSE)
        if not STATIC_C:
            cs_re, cs_im = rows_of(C, token, C_stride, n, in_n, step, end, K, REVERSE, COMPLEX_C)
        for i in tl.static_range(K - 1, -1, -1):
            dt = step_size(deltas[i].to(tl.float32) + bias_row, step + i, end, SOFTPLUS, False)
            total, lost = add_step(total, lost, dt)
            dout = dys[i].to(tl.float32)
            if z is not None:
                gate = zs[i].to(tl.float32)
                dout *= gate * sigmoid(gate)
            if not STATIC_C:
                c_re, c_im = cs_re[i], cs_im[i]
            e_re, e_im = decay_of(dt[None, :], A2, A_im)
            g_re += 2.0 * dout[None, :] * c_re
            g_im -= 2.0 * dout[None, :] * c_im
            g_re, g_im = times(e_re, -e_im, g_re, g_im)
    store_planes(own, number.to(tl.int64) * 2 * PLANE + at, PLANE, g_re, g_im, inside)
    store_planes(sums, number.to(tl.int64) * 2 * n_channels + d, n_channels, total, lost, in_d)


@triton.jit(do_not_specialize=["length", "n_seqs", "n_tokens", *_STRIDES])
def scan_backward(
    dy, u, delta, A, B, C, D, z, bias, cu_seqlens, saved, own, du, ddelta, dB, dC, dD, dz, dbias, dh0,
    length, n_seqs, n_tokens, dy_stride, u_stride, delta_stride, z_stride, B_stride, B_group, C_stride, C_group,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, COMPLEX_B: tl.constexpr, COMPLEX_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr,
    FROM_ZERO: tl.constexpr,
):  # fmt: skip
    """A tile of channels of one chunk. own (chunk, 2, N, D): G after it (FROM_ZERO: 0); its share of dA replaces it.

    Between two saved states, groups of K steps from the last to the first: each is reached from the saved state, its
    states and decays kept in registers, and gone back through. Shares of complex dB and dC: (tile of the group, 2, T,
    G, N), or (chunk, 2, N, D) if static, of real ones without the 2; of dD and dbias: (chunk, D).
    """
    n_groups: tl.constexpr = n_channels // per_group
    n_tiles: tl.constexpr = n_groups * ((per_group + BLOCK_D - 1) // BLOCK_D)
    number = tl.program_id(0) // n_tiles
    s, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, CHUNK)
    group, tile, d, in_d = tile_of(tl.program_id(0) % n_tiles, per_group, BLOCK_D)
    n, in_n = states_of(N, BLOCK_N)
    at, inside = pairs_at(n, d, in_n, in_d, n_channels, 1, None)
    PLANE: tl.constexpr = N * n_channels
    chunk_at = number.to(tl.int64) * 2 * PLANE + at
    A_re, A_im = load_planes(A, at, PLANE, inside)
    A2 = A_re * LOG2E
    skip, bias_row = load_float(D, d, in_d), load_float(bias, d, in_d)
    g_re, g_im = load_planes(None if FROM_ZERO else own, chunk_at, PLANE, inside)
    nothing = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dA_re, dA_im = nothing, nothing
    sum_dD, sum_dbias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    share_stride: tl.constexpr = n_groups * N
    share_plane = n_tokens.to(tl.int64) * share_stride
    share_at = tile * share_plane + group * N + n
    dB += tile * share_plane if COMPLEX_B and not STATIC_B else 0  # both planes of the tiles before
    dC += tile * share_plane if COMPLEX_C and not STATIC_C else 0
    if STATIC_B:
        b_re, b_im = load_planes(B, at, PLANE, inside, COMPLEX_B)
        dB_re, dB_im = nothing, nothing
    else:
        B += group * B_group
    if STATIC_C:
        c_re, c_im = load_planes(C, at, PLANE, inside, COMPLEX_C)
        dC_re, dC_im = nothing, nothing
    else:
        C += group * C_group

    end = tl.minimum(begin + CHUNK, length)
    for j in range(tl.cdiv(end - begin, K) - 1, -1, -1):
        last = begin + j * K  # first step of the group at hand
        piece = last // EVERY
        h_re, h_im = load_planes(saved, (start // EVERY + s + piece) * 2 * PLANE + at, PLANE, inside)
        for step in range(piece * EVERY, last, K):
            token = token_of(start, length, step, REVERSE)
            us = load_rows(u, token, u_stride, d, in_d, step, end, K, REVERSE, True)
            deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, K, REVERSE, True)
            if not STATIC_B:
                bs_re, bs_im = rows_of(B, token, B_stride, n, in_n, step, end, K, REVERSE, COMPLEX_B)
            for i in tl.static_range(K):
                dt = step_size(deltas[i].to(tl.float32) + bias_row, 0, 0, SOFTPLUS, True)
                if not STATIC_B:
                    b_re, b_im = bs_re[i], bs_im[i]
                e_re, e_im = decay_of(dt[None, :], A2, A_im)
                h_re, h_im = times(e_re, e_im, h_re, h_im)
                drive = (dt * us[i].to(tl.float32))[None, :]
                h_re, h_im = tl.fma(drive, b_re, h_re), tl.fma(drive, b_im, h_im)

        token = token_of(start, length, last, REVERSE)
        us = load_rows(u, token, u_stride, d, in_d, last, end, K, REVERSE)
        deltas = load_rows(delta, token, delta_stride, d, in_d, last, end, K, REVERSE)
        dys = load_rows(dy, token, dy_stride, d, in_d, last, end, K, REVERSE)
        zs = us
        if z is not None:
            zs = load_rows(z, token, z_stride, d, in_d, last, end, K, REVERSE)
        if not STATIC_B:
            bs_re, bs_im = rows_of(B, token, B_stride, n, in_n, last, end, K, REVERSE, COMPLEX_B)
        if not STATIC_C:
            cs_re, cs_im = rows_of(C, token, C_stride, n, in_n, last, end, K, REVERSE, COMPLEX_C)
        states_re, states_im, decays_re, decays_im = (h_re,), (h_im,), (), ()
        dts, slopes = (), ()
        for i in tl.static_range(K):
            raw = deltas[i].to(tl.float32) + bias_row
            dt, slope = raw, raw
            if SOFTPLUS:
                dt, slope = softplus_and_slope(raw)
            dt = tl.where(last + i < end, dt, 0.0)
            dts += (dt,)
            slopes += (slope,)
            if not STATIC_B:
                b_re, b_im = bs_re[i], bs_im[i]
            e_re, e_im = decay_of(dt[None, :], A2, A_im)
            h_re, h_im = times(e_re, e_im, states_re[i], states_im[i])
            drive = (dt * us[i].to(tl.float32))[None, :]
            decays_re += (e_re,)
            decays_im += (e_im,)
            states_re += (tl.fma(drive, b_re, h_re),)
            states_im += (tl.fma(drive, b_im, h_im),)

        for i in tl.static_range(K - 1, -1, -1):
            x, dt, dout = us[i].to(tl.float32), dts[i], dys[i].to(tl.float32)
            row = token - i if REVERSE else token + i
            row_at = row * n_channels + d
            valid = last + i < end
            if not STATIC_B:
                b_re, b_im = bs_re[i], bs_im[i]
            if not STATIC_C:
                c_re, c_im = cs_re[i], cs_im[i]
            h_re, h_im = states_re[i + 1], states_im[i + 1]
            # y = (2 Re(C h) + D u) silu(z)
            if z is not None:
                gate = zs[i].to(tl.float32)
                sig = sigmoid(gate)
                out = 2.0 * tl.sum(c_re * h_re - c_im * h_im, axis=0) + skip * x
                tl.store(dz + row_at, out * dout * sig * (1.0 + gate * (1.0 - sig)), mask=in_d & valid)
                dout *= gate * sig
            twice = 2.0 * dout[None, :]
            if STATIC_C:
                dC_re += twice * h_re
                dC_im -= twice * h_im
            else:
                re, im = tl.sum(twice * h_re, axis=1), -tl.sum(twice * h_im, axis=1)
                store_planes(dC, row * share_stride + share_at, share_plane, re, im, in_n & valid, COMPLEX_C)
            sum_dD += dout * x
            g_re += twice * c_re
            g_im -= twice * c_im
            # h = exp(dt A) h + dt u B
            drive = (dt * x)[None, :]
            if STATIC_B:
                dB_re += drive * g_re
                dB_im += drive * g_im
            else:
                re, im = tl.sum(drive * g_re, axis=1), tl.sum(drive * g_im, axis=1)
                store_planes(dB, row * share_stride + share_at, share_plane, re, im, in_n & valid, COMPLEX_B)
            d_dtu = tl.sum(g_re * b_re + g_im * b_im, axis=0)
            g_re, g_im = times(decays_re[i], -decays_im[i], g_re, g_im)
            exponent_re, exponent_im = times(states_re[i], -states_im[i], g_re, g_im)
            dA_re += dt[None, :] * exponent_re
            dA_im += dt[None, :] * exponent_im
            d_dt = tl.sum(exponent_re * A_re + exponent_im * A_im, axis=0) + d_dtu * x
            # dt = softplus(delta + bias)
            if SOFTPLUS:
                d_dt *= slopes[i]
            sum_dbias += tl.where(valid, d_dt, 0.0)
            tl.store(ddelta + row_at, d_dt, mask=in_d & valid)
            tl.store(du + row_at, d_dtu * dt + dout * skip, mask=in_d & valid)

    # A gap in the numbers of chunks (piece_of) leaves zeros as its shares.
    if dh0 is not None:
        if begin == 0:
            store_pairs(dh0, s.to(tl.int64) * PLANE + n[:, None] + d[None, :] * N, g_re, g_im, inside)
    store_planes(own, chunk_at, PLANE, dA_re, dA_im, inside)
    if STATIC_B:
        at_B = chunk_at if COMPLEX_B else number.to(tl.int64) * PLANE + at
        store_planes(dB, at_B, PLANE, dB_re, dB_im, inside, COMPLEX_B)
    if STATIC_C:
        at_C = chunk_at if COMPLEX_C else number.to(tl.int64) * PLANE + at
        store_planes(dC, at_C, PLANE, dC_re, dC_im, inside, COMPLEX_C)
    if dD is not None:
        tl.store(dD + number.to(tl.int64) * n_channels + d, sum_dD, mask=in_d)
    if dbias is not None:
        tl.store(dbias + number.to(tl.int64) * n_channels + d, sum_dbias, mask=in_d)
