"""A Mamba block and the norm before it on the CPU, for inference: some tokens at a time, from end to end.

By operations, each tensor between two of them, (T, E) or (T, 2E), goes to memory that all cores share and comes back
from it. Here a thread has sequences of its own, and takes PIECE tokens of one through the whole block while its own
cache holds them: only the stream and the result go to memory. Arrays are float32, C-contiguous; what is absent comes as
an array of size 0; weights of the products as `numba_products.packed` lays them out.

Letters: T tokens of all sequences, S sequences, M model width, E inner width, N states, R rank of dt, W taps.
"""

import os
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .. import numba_lanes as lanes
from .. import numba_products as products
from ..norm.cpu import _forward as norm
from ..numba_lanes import LANES
from ..numba_runtime import LOG2E, TILE, aligned, buffer, copied, jit, load, parallel, store, wide
from ..selective_scan import cpu_forward as scan
from ..selective_scan.cpu_pieces import load_group
from ..unchanged import keeps, made

PIECE = 192  # tokens: a multiple of the scan's piece and of the heights of the products' tiles
# From where on, and up to where, it is faster than the block by operations (measured): tokens of a sequence; numbers of
# in_proj and out_proj together, which lie in a core's own cache.
SHORTEST, LARGEST = 96, 1 << 19
# And where the weights lie ready (../unchanged.py), up to so many tokens of a sequence, and numbers.
FEW, LARGEST_OF_FEW = 32, 1 << 22


@cache
def _processors() -> int:
    """That this process may use. Not torch's threads: their number must not change a bit of a result."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pays(x: Tensor, n_channels: int) -> bool:
    """Whether x (S, L, M) is worth it: sequences for all processors alike, long enough, weights that a cache holds; or
    a few tokens of a sequence for each processor at most, and nothing to be made of the weights."""
    n_seqs, length, width = x.shape
    if keeps() and length <= FEW and n_seqs <= _processors():
        return width % TILE == 0 and 3 * width * n_channels <= LARGEST_OF_FEW and lanes.AVX512
    shares = -(-n_seqs // _processors()) * _processors()  # as if all had as much to do as the one that has most
    fits = length >= SHORTEST and width % TILE == 0 and 3 * width * n_channels <= LARGEST
    return fits and 20 * shares <= 21 * n_seqs and lanes.AVX512


@jit
def _convolve(x, rows, taps, bias):
    """silu(conv(x)) over x, of rows W - 1 on: from the last to the first, so that none is read after it was written."""
    wide()
    before = taps.shape[0] - 1
    for d in range(0, taps.shape[1], LANES):
        first = lanes.load(bias, 0, d, taps.shape[1] - d)
        for i in range(rows - 1, -1, -1):
            out = first
            for k in range(taps.shape[0]):
                out = out + lanes.load(taps, k, d, taps.shape[1] - d) * lanes.load(x, i + k, d, LANES)
            lanes.store(lanes.silu(out), x, before + i, d, LANES)


@jit
def _forward(
    first, last, length, x, residual, norm_weight, norm_bias, eps, centred, in_proj, gate_proj, taps, conv_bias, x_proj,
    dt_proj, dt_bias, A2, D, out_proj, conv_state, ssm_state, stream, out, last_inputs, last_states,
):  # fmt: skip
    """The sequences first to last. conv_state (S, W - 1, E), ssm_state (S, N, E), and so what they are at the end."""
    n_taps, E = taps.shape
    N, rank, n_tiles = A2.shape[0], dt_proj.shape[0], (E + TILE - 1) // TILE
    before = n_taps - 1
    hidden = aligned(PIECE, x.shape[1])
    inputs = aligned(before + PIECE, max(in_proj.shape[0] * in_proj.shape[2], n_tiles * TILE))
    ends = aligned(before, E)
    low, z = aligned(PIECE, x_proj.shape[0] * x_proj.shape[2]), buffer(PIECE)
    t_, B, C = aligned(PIECE, rank), aligned(PIECE, N), aligned(PIECE, N)
    dt, dtu, y = buffer(scan.PIECE), buffer(scan.PIECE), buffer(scan.PIECE)
    # Zeros, since the last tile may fill only some of its columns, and lanes compute with the rest as well.
    W_, A_ = np.zeros((n_tiles, rank, TILE), np.float32), np.zeros((n_tiles, N, TILE), np.float32)
    D_, bias_ = np.zeros((n_tiles, 1, TILE), np.float32), np.zeros((n_tiles, 1, TILE), np.float32)
    h = np.zeros((n_tiles, N, TILE), np.float32)
    states, ranks, only, tail = np.arange(N), np.arange(rank), np.zeros(1, np.int64), np.arange(before)
    no_delta, no_tile = np.empty((0, 0), np.float32), buffer(0)
    for k in range(n_tiles):
        c0, c1 = k * TILE, min((k + 1) * TILE, E)
        load(dt_proj, ranks, c0, c1, W_[k])
        load(A2, states, c0, c1, A_[k])
        load(D, only, c0, c1, D_[k])
        load(dt_bias, only, c0, c1, bias_[k])
    for s in range(first, last):
        for k in range(n_tiles):
            load(ssm_state[s], states, k * TILE, min((k + 1) * TILE, E), h[k])
        load(conv_state[s], tail, 0, E, ends)
        for begin in range(s * length, (s + 1) * length, PIECE):
            end = min(begin + PIECE, (s + 1) * length)
            rows = end - begin
            norm(0, 1, rows, x[begin:end], residual[begin:end], norm_weight, norm_bias, eps, centred, stream[begin:end],
                 hidden)  # fmt: skip
            products.multiply(hidden, rows, in_proj, inputs, before)
            load(ends, tail, 0, E, inputs)
            load(inputs, tail + rows, 0, E, ends)
            _convolve(inputs, rows, taps, conv_bias)
            u = inputs[before:]
            products.multiply(u, rows, x_proj, low, 0)
            order = np.arange(rows)
            load_group(low, 0, order, t_)
            load_group(low, rank, order, B)
            load_group(low, rank + N, order, C)
            for k in range(n_tiles):
                c0, w = k * TILE, min(TILE, E - k * TILE)
                products.multiply(hidden, rows, gate_proj[k : k + 1], z, 0)
                for i in range(0, rows, scan.PIECE):
                    own = order[i : i + scan.PIECE]
                    scan.project(t_[i : i + scan.PIECE], W_[k], w, dt)
                    scan.discretise(u, no_delta, True, D_[k], bias_[k], own, 0, c0, w, True, dt, dtu, y)
                    scan.advance(dt, dtu, A_[k], B[i:], no_tile, C[i:], no_tile, own.size, w, h[k], y)
                    scan.gate(y, z, -c0, own, 0, c0, w, u)
            products.multiply(u, rows, out_proj, out, begin)
        store(ends, tail, 0, E, last_inputs[s])
        for k in range(n_tiles):
            store(h[k], states, k * TILE, min((k + 1) * TILE, E), last_states[s])


def _array(x: Tensor | None, *shape: int) -> np.ndarray:
    """x as float32 numpy of that shape; zeros if absent."""
    return np.zeros(shape, np.float32) if x is None else copied(x).contiguous().numpy().reshape(shape)


def _state(x: Tensor | None, n_seqs: int) -> np.ndarray:
    """(S, E, any) -> (S, any, E); of size 0 if absent."""
    return np.empty((n_seqs, 0, 0), np.float32) if x is None else x.detach().mT.contiguous().numpy()


def _ready(norm_weight, norm_bias, eps, in_proj, out_proj, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D):
    """What `_forward` takes of the norm and the weights."""
    width, (E, N), rank, n_taps = in_proj.shape[1], A_log.shape, dt_proj.shape[1], conv.shape[2]
    onto, low, back = map(products.packed, (in_proj[:E], x_proj, out_proj))
    return (
        *(_array(norm_weight, width), _array(norm_bias, width), np.float32(eps), norm_bias is not None),
        *(onto, products.packed(in_proj[E:], TILE), _array(conv[:, 0].mT, n_taps, E), _array(conv_bias, 1, E), low),
        *(_array(dt_proj.mT, rank, E), _array(dt_bias, 1, E), _array(A_log.mT.exp() * -LOG2E, N, E), _array(D, 1, E)),
        back,
    )


def forward(x, residual, front, weights, conv_state, ssm_state):
    """As `interface.norm_and_mamba_block`; all are float32."""
    (w,), (n_seqs, length, _) = weights.scans, x.shape
    (E, N), n_taps = w.A_log.shape, w.conv.shape[2]
    rows = x.detach().flatten(0, 1).contiguous()
    onto = rows[:0] if residual is None else residual.detach().flatten(0, 1).contiguous()
    stream = rows if residual is None else torch.empty_like(rows)
    out = torch.empty_like(rows)
    last_inputs, last_states = x.new_empty(n_seqs, n_taps - 1, E), x.new_empty(n_seqs, N, E)
    ready = made(_ready, front.weight, front.bias, front.eps, weights.in_proj, weights.out_proj, *w)
    parallel(
        *(_forward, n_seqs, length, rows.numpy(), onto.numpy(), *ready),
        *(_state(conv_state, n_seqs), _state(ssm_state, n_seqs)),
        *(stream.numpy(), out.numpy(), last_inputs.numpy(), last_states.numpy()),
    )
    return out.view_as(x), stream.view_as(x), last_inputs.mT.contiguous(), last_states.mT.contiguous()
