"""Causal depthwise convolution on the CPU: one pass over the tokens, vectorised over channels, compiled by numba.

One job is a piece of time of one sequence, all channels. Arrays are float32, C-contiguous; weights come as (W, D),
states as (S, W - 1, D), most recent last. `position` counts steps in the direction of the convolution.
"""

import numpy as np
import torch
from torch import Tensor

from ..numba_runtime import inline, jit, parallel, sigmoid
from ..sequences import sequence_bounds

PIECE = 256  # steps of a job: fixed, so that sums over time never depend on the number of threads


@inline()
def _token(bounds, s, position, reverse):
    return bounds[s + 1] - 1 - position if reverse else bounds[s] + position


@jit
def _accumulate(weight, x, out):
    for d in range(out.size):
        out[d] += weight[d] * x[d]


@jit
def _silu(y):
    for d in range(y.size):
        y[d] *= sigmoid(y[d])


@jit
def _silu_backward(y, dy):
    """dy becomes the gradient before the activation; y is the value there."""
    one = np.float32(1.0)
    for d in range(y.size):
        gate = sigmoid(y[d])
        dy[d] *= gate * (one + y[d] * (one - gate))


@jit
def _row(x, bounds, s, position, reverse, state, none):
    """The input at `position`: of the sequence, of the state before it (position < 0), or `none`."""
    if position >= 0:
        return x[_token(bounds, s, position, reverse)]
    return state[s, state.shape[1] + position] if state.size > 0 else none


@jit
def _forward(first, last, jobs, bounds, x, weight, bias, state, silu, reverse, y):
    width, none = weight.shape[0], np.zeros(weight.shape[1], np.float32)
    for job in range(first, last):
        s, begin = jobs[job, 0], jobs[job, 1]
        for position in range(begin, min(begin + PIECE, bounds[s + 1] - bounds[s])):
            out = y[_token(bounds, s, position, reverse)]
            out[:] = bias
            for k in range(width):
                _accumulate(weight[k], _row(x, bounds, s, position - (width - 1) + k, reverse, state, none), out)
            if silu:
                _silu(out)


@jit
def _backward(first, last, jobs, bounds, x, weight, bias, state, silu, reverse, dy, pre, dweight, dbias):
    """`pre` becomes the gradient before the activation; dweight and dbias this job's shares."""
    width, none = weight.shape[0], np.zeros(weight.shape[1], np.float32)
    value = np.empty(weight.shape[1], np.float32)
    for job in range(first, last):
        s, begin = jobs[job, 0], jobs[job, 1]
        for position in range(begin, min(begin + PIECE, bounds[s + 1] - bounds[s])):
            t = _token(bounds, s, position, reverse)
            d_out = pre[t]
            d_out[:] = dy[t]
            if silu:
                value[:] = bias
                for k in range(width):
                    _accumulate(weight[k], _row(x, bounds, s, position - (width - 1) + k, reverse, state, none), value)
                _silu_backward(value, d_out)
            for k in range(width):
                _accumulate(
                    d_out, _row(x, bounds, s, position - (width - 1) + k, reverse, state, none), dweight[job, k]
                )
            for d in range(d_out.size):
                dbias[job, d] += d_out[d]


@jit
def _backward_input(first, last, jobs, bounds, weight, reverse, pre, dx, dstate):
    """dx[t] = sum_k weight[W - 1 - k] pre[t + k], for the state's rows too."""
    width = weight.shape[0]
    for job in range(first, last):
        s, begin = jobs[job, 0], jobs[job, 1]
        length = bounds[s + 1] - bounds[s]
        from_position = 1 - width if begin == 0 and dstate.size > 0 else begin
        for position in range(from_position, min(begin + PIECE, length)):
            out = dx[_token(bounds, s, position, reverse)] if position >= 0 else dstate[s, width - 1 + position]
            out[:] = np.float32(0.0)
            for k in range(max(0, -position), min(width, length - position)):
                _accumulate(weight[width - 1 - k], pre[_token(bounds, s, position + k, reverse)], out)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


def _prepare(x, weight, bias, initial_state, cu_seqlens, batch):
    n_channels, width = weight.shape
    bounds = sequence_bounds(cu_seqlens, batch, x.shape[0]).numpy()
    # An empty sequence has a job as well: the gradient of its state must be written.
    jobs = [(s, begin) for s, n in enumerate(np.diff(bounds)) for begin in range(0, max(n, 1), PIECE)]
    bias = weight.new_zeros(n_channels) if bias is None else bias
    state = np.empty((0, width - 1, n_channels), np.float32) if initial_state is None else _array(initial_state.mT)
    return np.array(jobs, np.int64).reshape(-1, 2), bounds, (_array(x), _array(weight.mT), _array(bias), state)


def forward(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse):
    jobs, bounds, arrays = _prepare(x, weight, bias, initial_state, cu_seqlens, batch)
    y = np.empty(x.shape, np.float32)
    parallel(_forward, len(jobs), jobs, bounds, *arrays, silu, reverse, y)
    return torch.from_numpy(y).to(x.dtype)


def backward(dy, x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse):
    """Gradients of (x, weight, bias, initial_state)."""
    jobs, bounds, arrays = _prepare(x, weight, bias, initial_state, cu_seqlens, batch)
    (n_channels, width), n_jobs = weight.shape, len(jobs)
    pre, dx = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    dweight, dbias = np.zeros((n_jobs, width, n_channels), np.float32), np.zeros((n_jobs, n_channels), np.float32)
    dstate = np.empty_like(arrays[3])
    parallel(_backward, n_jobs, jobs, bounds, *arrays, silu, reverse, _array(dy), pre, dweight, dbias)
    parallel(_backward_input, n_jobs, jobs, bounds, arrays[1], reverse, pre, dx, dstate)
    shares = torch.from_numpy(dweight).sum(0).mT, torch.from_numpy(dbias).sum(0)
    return torch.from_numpy(dx), *shares, torch.from_numpy(dstate).mT
