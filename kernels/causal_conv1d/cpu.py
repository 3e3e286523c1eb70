"""Causal depthwise convolution on the CPU: one pass over the tokens, vectorised over channels, compiled by numba.

One job is a piece of time of one sequence, for a tile of channels; in the forward, for a wide block of them. Arrays are
float32, C-contiguous; weights come as (W, D), states as (S, W - 1, D), most recent last. x may be some columns of a
wider array, from column x0 on.
`position` counts steps in the direction of the convolution.
"""

import numpy as np
import torch
from torch import Tensor

from .. import numba_lanes as lanes
from ..numba_lanes import LANES
from ..numba_runtime import TILE, bounds_of, buffer, copied, inline, jit, load, parallel, rows, sigmoid, store, wide

PIECE = 128  # steps of a job: fixed, so that sums over time never depend on the number of threads
BLOCK = 512  # channels of a job of the forward
AHEAD = 8  # steps by which it asks for its rows before it needs them


@jit
def _order(bounds, s, begin, end, reverse):
    """The tokens at positions begin..end of sequence s."""
    if reverse:
        return np.arange(bounds[s + 1] - 1 - begin, bounds[s + 1] - 1 - end, -1)
    return np.arange(bounds[s] + begin, bounds[s] + end)


@jit
def _load_inputs(x, x0, state, bounds, s, begin, end, reverse, c0, c1, out):
    """out[i] = the input at position begin + i: before the sequence, the state or zeros."""
    before = min(max(-begin, 0), end - begin)
    if state.size > 0:
        load(state[s], np.arange(state.shape[1] - before, state.shape[1]), c0, c1, out)
    else:
        out[:before] = np.float32(0.0)
    load(x, _order(bounds, s, begin + before, end, reverse), x0 + c0, x0 + c1, out[before:])


@jit
def _convolve(x, weight, bias, K, w, y):
    """y[i] = bias + sum_k weight[k] x[i + k]."""
    for i in range(K):
        for d in range(w):
            y[i, d] = bias[0, d]
        for k in range(weight.shape[0]):
            for d in range(w):
                y[i, d] += weight[k, d] * x[i + k, d]


@jit
def _silu_backward(y, K, w, dy):
    """dy becomes the gradient before the activation; y is the value there."""
    one = np.float32(1.0)
    for i in range(K):
        for d in range(w):
            gate = sigmoid(y[i, d])
            dy[i, d] *= gate * (one + y[i, d] * (one - gate))


@jit
def _convolve_backward(x, dy, K, w, dweight, dbias):
    for i in range(K):
        for k in range(dweight.shape[0]):
            for d in range(w):
                dweight[k, d] += dy[i, d] * x[i + k, d]
        for d in range(w):
            dbias[0, d] += dy[i, d]


@jit
def _correlate(dy, weight, first, n, w, dx):
    """dx[j] = sum_k weight[W - 1 - k] dy[first + j + k]; dy is zero before its first row."""
    width = weight.shape[0]
    for j in range(n):
        for d in range(w):
            dx[j, d] = np.float32(0.0)
        for k in range(max(0, -first - j), width):
            for d in range(w):
                dx[j, d] += weight[width - 1 - k, d] * dy[first + j + k, d]


@inline()
def _four_taps(x, x0, row, step, weight, bias, c0, c1, silu, y):
    """A row of y, from the three rows before it and itself."""
    ahead = row + AHEAD * step
    for d in range(c0, c1, LANES):
        lanes.prefetch(x, ahead, x0 + d)
        lanes.prefetch(y, ahead, d)
        out = lanes.load(bias, 0, d, c1 - d)
        for k in range(4):
            out = out + lanes.load(weight, k, d, c1 - d) * lanes.load(x, row + (k - 3) * step, x0 + d, c1 - d)
        lanes.store(lanes.silu(out) if silu else out, y, row, d, c1 - d)


@inline()
def _add_tap(x, x0, source, weight, k, c0, c1, row, y):
    for d in range(c0, c1):
        y[row, d] += weight[k, d] * x[source, x0 + d]


@jit
def _forward(first, last, jobs, bounds, x, x0, weight, bias, state, silu, reverse, y):
    """Row by row, on the tensors themselves: whole rows come from memory much faster than tiles of them."""
    wide()
    width, n_channels = weight.shape
    n_blocks = (n_channels + BLOCK - 1) // BLOCK
    column = np.uint64(x0)  # unsigned: a signed index is guarded against being negative, which no SIMD loop does
    for job in range(first, last):
        s, begin = jobs[job // n_blocks]
        start = job % n_blocks * BLOCK
        c0, c1 = np.uint64(start), np.uint64(min(start + BLOCK, n_channels))
        origin, step = (bounds[s + 1] - 1, -1) if reverse else (bounds[s], 1)
        for position in range(begin, min(begin + PIECE, bounds[s + 1] - bounds[s])):
            t = origin + step * position
            row = np.uint64(t)
            if width == 4 and position >= 3:
                _four_taps(x, x0, t, step, weight, bias, start, min(start + BLOCK, n_channels), silu, y)
                continue
            for d in range(c0, c1):
                y[row, d] = bias[0, d]
            for k in range(width):
                ago = width - 1 - k
                if ago <= position:
                    _add_tap(x, column, np.uint64(t - ago * step), weight, k, c0, c1, row, y)
                elif state.size > 0:
                    _add_tap(state[s], np.uint64(0), np.uint64(k + position), weight, k, c0, c1, row, y)
            if silu:
                for d in range(c0, c1):
                    y[row, d] *= sigmoid(y[row, d])


@jit
def _backward(first, last, jobs, bounds, x, x0, weight, bias, state, silu, reverse, dy, dx, dweight, dbias, dstate):
    """dweight and dbias are this job's shares."""
    width, n_tiles = weight.shape[0], (weight.shape[1] + TILE - 1) // TILE
    # A piece's dx needs the gradients of the W - 1 steps after it as well.
    x_, y_, dy_ = buffer(PIECE + 2 * (width - 1)), buffer(PIECE + width - 1), buffer(PIECE + width - 1)
    weight_, bias_, dx_ = buffer(width), buffer(1), buffer(width - 1 + PIECE)
    dweight_, dbias_ = buffer(width), buffer(1)
    for job in range(first, last):
        s, begin = jobs[job // n_tiles]
        c0 = job % n_tiles * TILE
        c1 = min(c0 + TILE, weight.shape[1])
        w = c1 - c0
        length = bounds[s + 1] - bounds[s]
        end = min(begin + PIECE, length)
        after = min(end + width - 1, length)
        load(weight, np.arange(width), c0, c1, weight_)
        load(bias, np.zeros(1, np.int64), c0, c1, bias_)
        _load_inputs(x, x0, state, bounds, s, begin - (width - 1), after, reverse, c0, c1, x_)
        dy_[:] = np.float32(0.0)
        load(dy, _order(bounds, s, begin, after, reverse), c0, c1, dy_)
        if silu:
            _convolve(x_, weight_, bias_, after - begin, w, y_)
            _silu_backward(y_, after - begin, w, dy_)
        dweight_[:] = np.float32(0.0)
        dbias_[:] = np.float32(0.0)
        _convolve_backward(x_, dy_, end - begin, w, dweight_, dbias_)
        store(dweight_, np.arange(width), c0, c1, dweight[job // n_tiles])
        store(dbias_, np.zeros(1, np.int64), c0, c1, dbias[job // n_tiles])
        _correlate(dy_, weight_, 0, end - begin, w, dx_)
        store(dx_, _order(bounds, s, begin, end, reverse), c0, c1, dx)
        if begin == 0 and dstate.size > 0:
            _correlate(dy_, weight_, 1 - width, width - 1, w, dx_)
            store(dx_, np.arange(width - 1), c0, c1, dstate[s])


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


def _prepare(x, weight, bias, initial_state, cu_seqlens, batch):
    """Jobs' (sequence, first position), sequence bounds, and what both directions read."""
    n_channels, width = weight.shape
    bounds = bounds_of(cu_seqlens, batch, x.shape[0])
    # An empty sequence has a job as well: the gradient of its state must be written.
    jobs = [(s, begin) for s, n in enumerate(np.diff(bounds)) for begin in range(0, max(n, 1), PIECE)]
    bias = weight.new_zeros(n_channels) if bias is None else bias
    state = np.empty((0, width - 1, n_channels), np.float32) if initial_state is None else _array(initial_state.mT)
    arrays = (*rows(x), _array(copied(weight).mT), _array(copied(bias)[None]), state)
    return np.array(jobs, np.int64).reshape(-1, 2), bounds, arrays


def forward(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse):
    jobs, bounds, arrays = _prepare(x, weight, bias, initial_state, cu_seqlens, batch)
    y = np.empty(x.shape, np.float32)
    parallel(_forward, len(jobs) * -(-weight.shape[0] // BLOCK), jobs, bounds, *arrays, silu, reverse, y)
    return torch.from_numpy(y).to(x.dtype)


def backward(dy, x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse, dx=None):
    """Gradients of (x, weight, bias, initial_state). dx: room for the first, perhaps columns of a wider matrix."""
    room = dx
    jobs, bounds, arrays = _prepare(x, weight, bias, initial_state, cu_seqlens, batch)
    n_channels, width = weight.shape
    dx = np.empty(x.shape, np.float32)
    dweight, dbias = (np.empty((len(jobs), n, n_channels), np.float32) for n in (width, 1))
    dstate = np.empty_like(arrays[-1])
    n_jobs = len(jobs) * -(-n_channels // TILE)
    parallel(_backward, n_jobs, jobs, bounds, *arrays, silu, reverse, _array(dy), dx, dweight, dbias, dstate)
    if room is not None:
        room.copy_(torch.from_numpy(dx))
    shares = torch.from_numpy(dweight).sum(0).mT, torch.from_numpy(dbias).sum((0, 1))
    return torch.from_numpy(dx), *shares, torch.from_numpy(dstate).mT
