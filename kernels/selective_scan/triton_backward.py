"""The Triton scan backwards. No atomics: every sum over programs is of shares, in a fixed order.

The gradient of the state passes from chunk to chunk as the state does (triton_chunks.py). With it at hand a program
takes its chunk in pieces, from the last to the first, each from a state that the forward saved before it: it runs the
piece forwards once, leaving the state before each group of K steps in a scratch of its own, and then takes the groups
from the last to the first: it runs each again, its states now kept in registers, and goes back through it.

Lanes hold four channels each and share out the states: sums over channels (for dB and dC) cost more than those over
states (for du and ddelta), and four channels are summed before any lane asks another.

Letters: T tokens of all sequences laid end to end, S sequences, D channels, N states, G groups. What is absent is None.
"""

import triton
import triton.language as tl

from ..triton_runtime import (
    LN2,
    LOG2E,
    SUM_TILE,
    load_float,
    load_rows,
    piece_of,
    sigmoid,
    softplus_and_slope,
    sum_block,
    token_of,
)
from .triton_chunks import pairs_at, states_of, step_size, tile_of


@triton.jit
def _reverse_steps(
    grad, total, A2, bias_row, c, delta, C, dy, z, token, step, end, d, in_d, n, in_n,
    delta_stride: tl.constexpr, C_stride: tl.constexpr, dy_stride: tl.constexpr, z_stride: tl.constexpr,
    STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Through K steps, from the last to the first: (dL/dh before them, sum of dt)."""
    deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, K, REVERSE, WHOLE)
    dys = load_rows(dy, token, dy_stride, d, in_d, step, end, K, REVERSE, WHOLE)
    if z is not None:
        zs = load_rows(z, token, z_stride, d, in_d, step, end, K, REVERSE, WHOLE)
    if not STATIC_C:
        cs = load_rows(C, token, C_stride, n, in_n, step, end, K, REVERSE, WHOLE)
    for i in tl.static_range(K - 1, -1, -1):
        dt = step_size(deltas[i].to(tl.float32) + bias_row, step + i, end, SOFTPLUS, WHOLE)
        total += dt
        dout = dys[i].to(tl.float32)
        if z is not None:
            gate = zs[i].to(tl.float32)
            dout *= gate * sigmoid(gate)
        if not STATIC_C:
            c = cs[i].to(tl.float32)[:, None]
        grad = (grad + dout[None, :] * c) * tl.exp2(dt[None, :] * A2)
    return grad, total


@triton.jit(do_not_specialize=["length", "n_seqs", "zero"])
def chunk_gradients(
    delta, A, C, dy, z, bias, cu_seqlens, own, sums, length, n_seqs, zero,
    delta_stride: tl.constexpr, C_stride: tl.constexpr, C_group: tl.constexpr, dy_stride: tl.constexpr,
    z_stride: tl.constexpr, n_channels: tl.constexpr, per_group: tl.constexpr,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dL/dh before a chunk if it is 0 after it, own (chunk, N, D), and the chunk's sum of dt, sums (chunk, D).

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
    A2, bias_row = load_float(A, at, inside) * LOG2E, load_float(bias, d, in_d)
    c = load_float(C, at, inside) if STATIC_C else None
    if not STATIC_C:
        C += group * C_group
    grad, total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    end = tl.minimum(begin + CHUNK, length)
    whole = begin + (end - begin) // K * K
    if whole < end:
        grad, total = _reverse_steps(
            grad, total, A2, bias_row, c, delta, C, dy, z, token_of(start, length, whole, REVERSE), whole, end,
            d, in_d, n, in_n, delta_stride, C_stride, dy_stride, z_stride, STATIC_C, SOFTPLUS, REVERSE, K, False,
        )  # fmt: skip
    for step in range(whole - K, begin - 1, -K):
        grad, total = _reverse_steps(
            grad, total, A2, bias_row, c, delta, C, dy, z, token_of(start, length, step, REVERSE), step, end,
            d, in_d, n, in_n, delta_stride, C_stride, dy_stride, z_stride, STATIC_C, SOFTPLUS, REVERSE, K, True,
        )  # fmt: skip
    slot = number.to(tl.int64)
    tl.store(own + slot * N * n_channels + at, grad, mask=inside)
    tl.store(sums + slot * n_channels + d, total, mask=in_d)


@triton.jit(do_not_specialize=["length", "n_seqs", "n_tokens", "first_program"])
def scan_backward(
    dy, u, delta, A, B, C, D, z, bias, cu_seqlens, saved, scratch,
    own, du, ddelta, dB, dC, dD, dz, dbias, dh0, length, n_seqs, n_tokens, first_program,
    dy_stride: tl.constexpr, u_stride: tl.constexpr, delta_stride: tl.constexpr, z_stride: tl.constexpr,
    B_stride: tl.constexpr, B_group: tl.constexpr, C_stride: tl.constexpr, C_group: tl.constexpr,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    K: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, FROM_ZERO: tl.constexpr,
):  # fmt: skip
    """A tile of channels of one chunk. own (chunk, N, D): dL/dh after it; its share of dA takes the place.

    FROM_ZERO: dL/dh is 0 after every chunk, whatever own holds.
    Shares of dB and dC: (tile of the group, T, G, N), or (chunk, N, D) if static; of dD and dbias: (chunk, D).
    """
    n_groups: tl.constexpr = n_channels // per_group
    n_tiles: tl.constexpr = n_groups * ((per_group + BLOCK_D - 1) // BLOCK_D)
    program = tl.program_id(0) + first_program
    number = program // n_tiles
    s, start, length, begin = piece_of(cu_seqlens, n_seqs, length, number, CHUNK)
    group, tile, d, in_d = tile_of(program % n_tiles, per_group, BLOCK_D)
    n, in_n = states_of(N, BLOCK_N)
    at, inside = pairs_at(n, d, in_n, in_d, n_channels, 1, None)
    chunk_at = number.to(tl.int64) * n_channels * N + at
    STATES: tl.constexpr = BLOCK_N * BLOCK_D
    scratch += tl.program_id(0).to(tl.int64) * ((EVERY // K - 1) * STATES)
    scratch_at = n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]

    A2 = load_float(A, at, inside) * LOG2E
    skip, bias_row = load_float(D, d, in_d), load_float(bias, d, in_d)
    grad = load_float(None if FROM_ZERO else own, chunk_at, inside)  # dL/dh after the step at hand
    sum_dA = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_dD, sum_dbias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    share_at = (tile.to(tl.int64) * n_tokens * n_groups + group) * N + n
    share_stride: tl.constexpr = n_groups * N
    if STATIC_B:
        b, sum_dB = load_float(B, at, inside), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        B += group * B_group
    if STATIC_C:
        c, sum_dC = load_float(C, at, inside), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        C += group * C_group

    end = tl.minimum(begin + CHUNK, length)
    for piece in range(tl.cdiv(end, EVERY) - 1, begin // EVERY - 1, -1):
        h = tl.load(saved + (start // EVERY + s + piece) * n_channels * N + at, mask=inside, other=0.0)
        last = tl.cdiv(tl.minimum(EVERY, end - piece * EVERY), K) - 1  # group of the piece
        for j in range(last):
            tl.store(scratch + j * STATES + scratch_at, h)
            step = piece * EVERY + j * K
            token = token_of(start, length, step, REVERSE)
            us = load_rows(u, token, u_stride, d, in_d, step, end, K, REVERSE, True)
            deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, K, REVERSE, True)
            if not STATIC_B:
                bs = load_rows(B, token, B_stride, n, in_n, step, end, K, REVERSE, True)
            for i in tl.static_range(K):
                dt = step_size(deltas[i].to(tl.float32) + bias_row, 0, 0, SOFTPLUS, True)
                if not STATIC_B:
                    b = bs[i].to(tl.float32)[:, None]
                h = tl.fma(tl.exp2(dt[None, :] * A2), h, (dt * us[i].to(tl.float32))[None, :] * b)
        tl.debug_barrier()  # what one thread has written to the scratch another may read

        for j in range(last, -1, -1):
            step = piece * EVERY + j * K
            token = token_of(start, length, step, REVERSE)
            us = load_rows(u, token, u_stride, d, in_d, step, end, K, REVERSE)
            deltas = load_rows(delta, token, delta_stride, d, in_d, step, end, K, REVERSE)
            dys = load_rows(dy, token, dy_stride, d, in_d, step, end, K, REVERSE)
            if z is not None:
                zs = load_rows(z, token, z_stride, d, in_d, step, end, K, REVERSE)
            if not STATIC_B:
                bs = load_rows(B, token, B_stride, n, in_n, step, end, K, REVERSE)
            if not STATIC_C:
                cs = load_rows(C, token, C_stride, n, in_n, step, end, K, REVERSE)
            states, decays, xs, dts, slopes, douts, z_factors = (h,), (), (), (), (), (), ()
            for i in tl.static_range(K):
                xs += (us[i].to(tl.float32),)
                raw = deltas[i].to(tl.float32) + bias_row
                if SOFTPLUS:
                    dt, slope = softplus_and_slope(raw)
                    slopes += (slope,)
                else:
                    dt = raw
                dts += (tl.where(step + i < end, dt, 0.0),)
                dout = dys[i].to(tl.float32)
                if z is not None:
                    gate = zs[i].to(tl.float32)
                    sig = sigmoid(gate)
                    z_factors += (dout * sig * (1.0 + gate * (1.0 - sig)),)
                    dout *= gate * sig
                douts += (dout,)
                if not STATIC_B:
                    b = bs[i].to(tl.float32)[:, None]
                decays += (tl.exp2(dts[i][None, :] * A2),)
                states += (tl.fma(decays[i], states[i], (dts[i] * xs[i])[None, :] * b),)

            for i in tl.static_range(K - 1, -1, -1):
                x, dt, dout = xs[i], dts[i], douts[i]
                row = token - i if REVERSE else token + i
                row_at = row * n_channels + d
                valid = step + i < end
                if not STATIC_B:
                    b = bs[i].to(tl.float32)[:, None]
                if not STATIC_C:
                    c = cs[i].to(tl.float32)[:, None]
                # y = (C h + D u) silu(z)
                if z is not None:
                    out = tl.sum(states[i + 1] * c, axis=0) + skip * x
                    tl.store(dz + row_at, out * z_factors[i], mask=in_d & valid)
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
                grad *= decays[i]
                d_exponent = grad * states[i]
                sum_dA += d_exponent * dt[None, :]
                d_dt = tl.sum(d_exponent * A2, axis=0) * LN2 + d_dtu * x
                # dt = softplus(delta + bias)
                if SOFTPLUS:
                    d_dt *= slopes[i]
                sum_dbias += tl.where(valid, d_dt, 0.0)
                tl.store(ddelta + row_at, d_dt, mask=in_d & valid)
                tl.store(du + row_at, d_dtu * dt + dout * skip, mask=in_d & valid)
            h = tl.load(scratch + (j - 1) * STATES + scratch_at, mask=(n >= 0)[:, None] & (j > 0), other=0.0)
        tl.debug_barrier()  # all have read the scratch

    # Also a number that no chunk has (piece_of) has its shares: zeros.
    if dh0 is not None:
        if begin == 0:
            of_state = s.to(tl.int64) * n_channels * N + (n[:, None] + d[None, :] * N)
            tl.store(dh0 + of_state, grad, mask=inside)
    tl.store(own + chunk_at, sum_dA, mask=inside)
    if STATIC_B:
        tl.store(dB + chunk_at, sum_dB, mask=inside)
    if STATIC_C:
        tl.store(dC + chunk_at, sum_dC, mask=inside)
    if dD is not None:
        tl.store(dD + number.to(tl.int64) * n_channels + d, sum_dD, mask=in_d)
    if dbias is not None:
        tl.store(dbias + number.to(tl.int64) * n_channels + d, sum_dbias, mask=in_d)


@triton.jit(do_not_specialize=["n_chunks", "n_tokens"])
def sum_shares(
    own, share_B, share_C, share_D, share_bias, dA, dB, dC, dD, dbias, n_chunks, n_tokens,
    n_channels: tl.constexpr, per_group: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, CHUNK_TERMS: tl.constexpr, TILE_TERMS: tl.constexpr,
):  # fmt: skip
    """The gradients of all that programs of `scan_backward` have in common, one sum after another."""
    n_tiles: tl.constexpr = (per_group + BLOCK_D - 1) // BLOCK_D
    pairs: tl.constexpr = N * n_channels
    block = tl.program_id(0)
    block = _sum(own, dA, block, n_chunks, pairs, N, CHUNK_TERMS)
    block = _sum(share_D, dD, block, n_chunks, n_channels, 1, CHUNK_TERMS)
    block = _sum(share_bias, dbias, block, n_chunks, n_channels, 1, CHUNK_TERMS)
    n = n_tokens.to(tl.int64) * (n_channels // per_group * N)
    if STATIC_B:
        block = _sum(share_B, dB, block, n_chunks, pairs, N, CHUNK_TERMS)
    else:
        block = _sum(share_B, dB, block, n_tiles, n, 1, TILE_TERMS)
    if STATIC_C:
        block = _sum(share_C, dC, block, n_chunks, pairs, N, CHUNK_TERMS)
    else:
        block = _sum(share_C, dC, block, n_tiles, n, 1, TILE_TERMS)


@triton.jit
def _sum(shares, total, block, n_terms, n, ROWS: tl.constexpr, TERMS: tl.constexpr):
    """`sum_block` if the block is one of this sum's; the block's number counted from the end of this sum."""
    if shares is not None:
        blocks = tl.cdiv(n, SUM_TILE // TERMS)
        if (block >= 0) & (block < blocks):
            sum_block(shares, total, block, n_terms, n, ROWS, TERMS)
        block -= blocks
    return block
