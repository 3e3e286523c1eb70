"""A Mamba block's step on the CPU.

A step of PyTorch's operators spends its time between them: some thirty calls a block, of ten microseconds each. Here a
small block is one compiled call; of a larger one the two large products are PyTorch's, with all its threads. Where
the work of many sequences dwarfs that time, all of it is left to PyTorch.
Arrays are float32, C-contiguous; what is absent comes as an array of size 0.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm.cpu import forward as norm_forward
from ..numba_runtime import LOG2E, REDUCE, exp2, inline, jit, parallel, sigmoid, softplus, wide
from .reference import mamba_step_reference

_LOG2E = np.float32(LOG2E)
# Multiply-adds of in_proj, for all sequences: up to which one thread does the whole block, and from which PyTorch's
# operators are the faster (measured, on two cores).
ALONE, MANY = 300_000, 3_000_000
FEW = 2  # sequences for which they never are


@inline(REDUCE)
def _dot(a, row, b):
    total = np.float32(0.0)
    for k in range(np.uint64(b.size)):
        total += a[row, k] * b[k]
    return total


@inline(REDUCE)
def _sum(x):
    total = np.float32(0.0)
    for k in range(np.uint64(x.size)):
        total += x[k]
    return total


@inline(REDUCE)
def _sum_of_squares(x):
    total = np.float32(0.0)
    for k in range(np.uint64(x.size)):
        total += x[k] * x[k]
    return total


@jit
def _multiply(weight, x, out):
    """out (B, rows) = x (B, K) weight^T. A row of the weight serves all sequences while it is in the cache."""
    wide()
    for o in range(weight.shape[0]):
        row = np.uint64(o)
        for b in range(x.shape[0]):
            out[b, row] = _dot(weight, row, x[b])


@jit
def _norm(x, stream, weight, bias, eps, centred, new_stream, out):
    wide()
    width = np.uint64(x.shape[1])
    for b in range(x.shape[0]):
        values = new_stream[b]
        for d in range(width):
            values[d] = x[b, d] + stream[b, d] if stream.size > 0 else x[b, d]
        row = out[b]
        mean = _sum(values) / np.float32(width) if centred else np.float32(0.0)
        for d in range(width):
            row[d] = values[d] - mean
        scale = np.float32(1.0) / np.sqrt(_sum_of_squares(row) / np.float32(width) + eps)
        for d in range(width):
            row[d] = row[d] * scale * weight[d] + (bias[d] if bias.size > 0 else np.float32(0.0))


@jit
def _convolve(u, state, taps, bias):
    """u (B, 2E), its first half in place. state (B, E, W - 1)."""
    n_taps = taps.shape[1]
    for b in range(u.shape[0]):
        for e in range(taps.shape[0]):
            newest = u[b, e]
            mixed = newest * taps[e, n_taps - 1] + (bias[e] if bias.size > 0 else np.float32(0.0))
            for k in range(n_taps - 1):
                mixed += state[b, e, k] * taps[e, k]
            for k in range(n_taps - 2):
                state[b, e, k] = state[b, e, k + 1]
            if n_taps > 1:
                state[b, e, n_taps - 2] = newest
            u[b, e] = mixed


@jit
def _silu(x, width):
    wide()
    for b in range(x.shape[0]):
        row = x[b]
        for e in range(np.uint64(width)):
            row[e] *= sigmoid(row[e])


@jit
def _scan(uz, low, dt, dt_bias, A_log, skip, state, y):
    wide()
    n_channels, n_states = A_log.shape
    rank = low.shape[1] - 2 * n_states
    decays = np.empty(n_states, np.float32)
    for b in range(uz.shape[0]):
        step = dt[b]
        for e in range(np.uint64(n_channels)):
            step[e] = softplus(step[e] + dt_bias[e])
        drive, readout = low[b, rank : rank + n_states], low[b, rank + n_states :]
        for e in range(n_channels):
            h, A_row, dt_log2e, dtu = state[b, e], A_log[e], -step[e] * _LOG2E, step[e] * uz[b, e]
            for n in range(np.uint64(n_states)):
                decays[n] = exp2(dt_log2e * exp2(A_row[n] * _LOG2E))
            for n in range(np.uint64(n_states)):
                h[n] = decays[n] * h[n] + dtu * drive[n]
            y[b, e] = _dot(state[b], np.uint64(e), readout) + skip[e] * uz[b, e]
        gate, out = uz[b, n_channels:], y[b]
        for e in range(np.uint64(n_channels)):
            out[e] *= gate[e] * sigmoid(gate[e])


@jit
def _between(first, last, uz, conv_state, ssm_state, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, y):
    """From in_proj to out_proj, of sequences first to last."""
    n_channels, rank = dt_proj.shape
    rows = uz[first:last]
    low = np.empty((last - first, x_proj.shape[0]), np.float32)
    dt = np.empty((last - first, n_channels), np.float32)
    _convolve(rows, conv_state[first:last], conv, conv_bias)
    _silu(rows, n_channels)
    _multiply(x_proj, rows[:, :n_channels], low)
    _multiply(dt_proj, low[:, :rank], dt)
    _scan(rows, low, dt, dt_bias, A_log, D, ssm_state[first:last], y[first:last])


@jit
def _step(
    x, stream, conv_state, ssm_state, norm, norm_bias, in_proj, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
    out_proj, eps, centred, new_stream, out,
):  # fmt: skip
    n_rows = x.shape[0]
    normed = np.empty(x.shape, np.float32)
    uz = np.empty((n_rows, in_proj.shape[0]), np.float32)
    y = np.empty((n_rows, D.size), np.float32)
    _norm(x, stream, norm, norm_bias, eps, centred, new_stream, normed)
    _multiply(in_proj, normed, uz)
    _between(0, n_rows, uz, conv_state, ssm_state, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, y)
    _multiply(out_proj, y, out)


def _array(x: Tensor | None, n_dims: int = 1) -> np.ndarray:
    return np.empty((0,) * n_dims, np.float32) if x is None else x.detach().numpy()


def step(x, stream, conv_state, ssm_state, weights, eps, centred):
    work = len(x) * weights.in_proj.numel()
    if x.dtype != torch.float32 or (work > MANY and len(x) > FEW):
        return mamba_step_reference(x, stream, conv_state, ssm_state, weights, eps, centred)
    states = conv_state.numpy(), ssm_state.numpy()
    if work <= ALONE:
        new_stream, out = torch.empty_like(x), torch.empty_like(x)
        _step(
            x.detach().numpy(), _array(stream, 2), *states, *map(_array, weights), np.float32(eps), centred,
            new_stream.numpy(), out.numpy(),
        )  # fmt: skip
        return out, new_stream
    normed, new_stream = norm_forward(x, stream, weights.norm, weights.norm_bias, eps, centred, weights.norm.dtype)
    uz = F.linear(normed, weights.in_proj)
    y = x.new_empty(len(x), weights.D.numel())
    parallel(_between, len(x), uz.numpy(), *states, *map(_array, weights[3:10]), y.numpy())
    return F.linear(y, weights.out_proj), x if stream is None else new_stream
