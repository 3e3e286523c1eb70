"""The forward of the CPU scan, by lanes.

`LANES` channels of a tile are taken through a whole piece of time before the next: a state and its row of A stay in
registers, and dt, dt u and y in small buffers of the first-level cache. With AVX-512 the update of `LANES` states is
12 instructions, of which two start in a cycle; measured, it takes 6.4 cycles, in all half of the scan's time. Rows are
asked for a piece ahead: waiting for them took a fifth.

Letters as in cpu.py. A static B or C comes as (N, TILE), else that tile is empty and B, C are (K, N).
"""

import numpy as np

from .. import numba_lanes as lanes
from ..numba_lanes import LANES
from ..numba_runtime import TILE, buffer, inline, jit, load, store, wide
from .cpu_pieces import load_group, order_of

CHECKPOINT = 64  # steps between saved states, which so cost N / 64 of a (T, D) tensor
PIECE = 16  # steps that the forward takes at once, a divisor of CHECKPOINT
SIDE = 8  # tiles that it takes side by side: whole rows come from memory much faster than parts of them


@jit
def project(t, W, w, dt):
    """dt = t W, of a whole piece: four steps share what is loaded of W."""
    wide()
    for d in range(0, w, LANES):
        for i in range(0, PIECE, 4):
            first = second = third = fourth = lanes.fill(np.float32(0.0))
            for r in range(W.shape[0]):
                row = lanes.load(W, r, d, LANES)
                first, second = first + row * t[i, r], second + row * t[i + 1, r]
                third, fourth = third + row * t[i + 2, r], fourth + row * t[i + 3, r]
            lanes.store(first, dt, i, d, LANES)
            lanes.store(second, dt, i + 1, d, LANES)
            lanes.store(third, dt, i + 2, d, LANES)
            lanes.store(fourth, dt, i + 3, d, LANES)


@jit
def discretise(u, delta, projected, D, bias, order, ahead, c0, w, use_softplus, dt, dtu, y):
    """dt = softplus(delta + bias), dt u and, to begin y with, the skip D u. Where it is `projected`, delta is in dt."""
    wide()
    for i in range(order.size):
        for d in range(0, w, LANES):
            lanes.prefetch(u, order[i] + ahead, c0 + d)
            x = lanes.load(u, order[i], c0 + d, w - d)
            if projected:
                step = lanes.load(dt, i, d, LANES)
            else:
                lanes.prefetch(delta, order[i] + ahead, c0 + d)
                step = lanes.load(delta, order[i], c0 + d, w - d)
            step = step + lanes.load(bias, 0, d, LANES)
            if use_softplus:
                step = lanes.softplus(step)
            lanes.store(step, dt, i, d, LANES)
            lanes.store(step * x, dtu, i, d, LANES)
            lanes.store(lanes.load(D, 0, d, LANES) * x, y, i, d, LANES)


@inline()
def _advanced(h, x, a, xu, b):
    return xu * b + lanes.exp2(x * a) * h


@jit
def advance(dt, dtu, A2, B, B_tile, C, C_tile, K, w, state, y):
    """h = exp2(dt A log2 e) h + dt u B and y += C h over the piece."""
    wide()
    n_states = state.shape[0]
    in_pairs = n_states - n_states % 2 if B_tile.size == 0 and C_tile.size == 0 else 0  # as in Mamba
    for d in range(0, w, LANES):
        for n in range(0, in_pairs, 2):  # two states share what a step loads
            a, a_next = lanes.load(A2, n, d, LANES), lanes.load(A2, n + 1, d, LANES)
            h, h_next = lanes.load(state, n, d, LANES), lanes.load(state, n + 1, d, LANES)
            for i in range(K):
                x, xu = lanes.load(dt, i, d, LANES), lanes.load(dtu, i, d, LANES)
                h = _advanced(h, x, a, xu, B[i, n])
                h_next = _advanced(h_next, x, a_next, xu, B[i, n + 1])
                lanes.store(lanes.load(y, i, d, LANES) + h * C[i, n] + h_next * C[i, n + 1], y, i, d, LANES)
            lanes.store(h, state, n, d, LANES)
            lanes.store(h_next, state, n + 1, d, LANES)
        for n in range(in_pairs, n_states):
            a, h = lanes.load(A2, n, d, LANES), lanes.load(state, n, d, LANES)
            for i in range(K):
                b = lanes.load(B_tile, n, d, LANES) if B_tile.size > 0 else lanes.fill(B[i, n])
                c = lanes.load(C_tile, n, d, LANES) if C_tile.size > 0 else lanes.fill(C[i, n])
                h = _advanced(h, lanes.load(dt, i, d, LANES), a, lanes.load(dtu, i, d, LANES), b)
                lanes.store(lanes.load(y, i, d, LANES) + h * c, y, i, d, LANES)
            lanes.store(h, state, n, d, LANES)


@jit
def gate(tile, z, z0, order, ahead, c0, w, y):
    """y = tile silu(z), or the tile as it is where there is no z."""
    wide()
    for i in range(order.size):
        for d in range(0, w, LANES):
            out = lanes.load(tile, i, d, LANES)
            if z.size > 0:
                lanes.prefetch(z, order[i] + ahead, z0 + c0 + d)
                out = out * lanes.silu(lanes.load(z, order[i], z0 + c0 + d, w - d))
            lanes.prefetch(y, order[i] + ahead, c0 + d)
            lanes.store(out, y, order[i], c0 + d, w - d)


@jit
def forward(first, last, tiles, bounds, delta, delta0, W, u, A2, B, B0, Bs, C, C0, Cs, D, z, z0, bias, h0,
            use_softplus, reverse, save, y, final, checkpoints):  # fmt: skip
    """The jobs first to last: job s * len(tiles) + k is the k-th tile of sequence s."""
    N, n_tiles, rank = A2.shape[0], tiles.shape[0], W.shape[0]
    # Zeros, since a tile may fill only some of its columns, and lanes compute with the rest as well.
    A_, h = np.zeros((SIDE, N, TILE), np.float32), np.zeros((SIDE, N, TILE), np.float32)
    Bs_, Cs_ = np.zeros((SIDE, Bs.shape[0], TILE), np.float32), np.zeros((SIDE, Cs.shape[0], TILE), np.float32)
    W_, t_ = np.zeros((SIDE, rank, TILE), np.float32), np.zeros((PIECE, rank), np.float32)
    dt, dtu, y_ = buffer(PIECE), buffer(PIECE), buffer(PIECE)
    D_, bias_ = np.zeros((SIDE, 1, TILE), np.float32), np.zeros((SIDE, 1, TILE), np.float32)
    B_, C_ = np.empty((PIECE, N), np.float32), np.empty((PIECE, N), np.float32)
    states, ranks, only = np.arange(N), np.arange(rank), np.zeros(1, np.int64)
    job = first
    while job < last:
        s, leftmost = job // n_tiles, job % n_tiles
        group = tiles[leftmost, 2]
        side = 0
        while side < SIDE and job < last and leftmost + side < n_tiles and tiles[leftmost + side, 2] == group:
            c0, c1, _ = tiles[leftmost + side]
            load(W, ranks, c0, c1, W_[side])
            load(A2, states, c0, c1, A_[side])
            load(h0[s], states, c0, c1, h[side])
            load(Bs, states[: Bs.shape[0]], c0, c1, Bs_[side])
            load(Cs, states[: Cs.shape[0]], c0, c1, Cs_[side])
            load(D, only, c0, c1, D_[side])
            load(bias, only, c0, c1, bias_[side])
            side, job = side + 1, job + 1
        for begin in range(0, bounds[s + 1] - bounds[s], PIECE):
            order = order_of(bounds, s, begin, PIECE, reverse)
            load_group(delta, delta0, order, t_)
            load_group(B, B0 + group * N, order, B_)
            load_group(C, C0 + group * N, order, C_)
            ahead = -PIECE if reverse else PIECE
            slot = bounds[s] // CHECKPOINT + s + begin // CHECKPOINT
            for k in range(side):
                c0, c1, _ = tiles[leftmost + k]
                w = c1 - c0
                if save and begin % CHECKPOINT == 0:
                    store(h[k], states, c0, c1, checkpoints[slot])
                if rank > 0:
                    project(t_, W_[k], w, dt)
                discretise(u, delta, rank > 0, D_[k], bias_[k], order, ahead, c0, w, use_softplus, dt, dtu, y_)
                advance(dt, dtu, A_[k], B_, Bs_[k], C_, Cs_[k], order.size, w, h[k], y_)
                gate(y_, z, z0, order, ahead, c0, w, y)
        for k in range(side):
            c0, c1, _ = tiles[leftmost + k]
            store(h[k], states, c0, c1, final[s])
