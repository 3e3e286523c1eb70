"""Residual add and norm on the CPU: one pass over the rows, vectorised over channels, compiled by numba.

One job is a piece of the rows. Arrays are float32, C-contiguous; what is absent comes as an array of size 0.
"""

import numpy as np
import torch
from torch import Tensor

from ..numba_runtime import REDUCE, copied, inline, jit, parallel, wide

PIECE = 1 << 17  # elements of a job: fewer are done before another thread wakes up


@inline(REDUCE)
def _mean(x, row, width):
    total = np.float32(0.0)
    for d in range(width):
        total += x[row, d]
    return total / np.float32(width)


@inline(REDUCE)
def _inverse_deviation(x, row, width, mean, eps):
    total = np.float32(0.0)
    for d in range(width):
        total += (x[row, d] - mean) * (x[row, d] - mean)
    return np.float32(1.0) / np.sqrt(total / np.float32(width) + eps)


@inline(REDUCE)
def _mean_of_product(a, b, c, row, width, mean, scale):
    """Mean of a b (c - mean) scale over the row."""
    total = np.float32(0.0)
    for d in range(width):
        total += a[row, d] * b[d] * (c[row, d] - mean)
    return total * scale / np.float32(width)


@inline(REDUCE)
def _mean_of_gradient(dy, weight, row, width):
    total = np.float32(0.0)
    for d in range(width):
        total += dy[row, d] * weight[d]
    return total / np.float32(width)


@jit
def _forward(first, last, piece, x, residual, weight, bias, eps, centred, stream, y):
    wide()
    width = np.uint64(x.shape[1])
    source = stream if residual.size > 0 else x
    for t in range(first * piece, min(last * piece, x.shape[0])):
        row = np.uint64(t)  # a signed index is guarded against being negative, which keeps loops from being vectorised
        if residual.size > 0:
            for d in range(width):
                stream[row, d] = residual[row, d] + x[row, d]
        mean = _mean(source, row, width) if centred else np.float32(0.0)
        scale = _inverse_deviation(source, row, width, mean, eps)
        for d in range(width):
            y[row, d] = (source[row, d] - mean) * scale * weight[d] + bias[d]


@jit
def _backward(first, last, piece, dy, dstream, stream, weight, eps, centred, dresidual, dweight, dbias):
    """dweight and dbias are this job's shares."""
    wide()
    width = np.uint64(stream.shape[1])
    for job in range(first, last):
        share = np.uint64(job)
        for d in range(width):
            dweight[share, d] = np.float32(0.0)
            dbias[share, d] = np.float32(0.0)
        for t in range(job * piece, min((job + 1) * piece, stream.shape[0])):
            row = np.uint64(t)
            mean = _mean(stream, row, width) if centred else np.float32(0.0)
            scale = _inverse_deviation(stream, row, width, mean, eps)
            along = _mean_of_product(dy, weight, stream, row, width, mean, scale)
            offset = _mean_of_gradient(dy, weight, row, width) if centred else np.float32(0.0)
            for d in range(width):
                normed = (stream[row, d] - mean) * scale
                dresidual[row, d] = (dy[row, d] * weight[d] - offset - normed * along) * scale
            for d in range(width):
                dweight[share, d] += dy[row, d] * ((stream[row, d] - mean) * scale)
            for d in range(width):
                dbias[share, d] += dy[row, d]
            if dstream.size > 0:
                for d in range(width):
                    dresidual[row, d] += dstream[row, d]


def _array(x: Tensor | None, *shape: int) -> np.ndarray:
    """x as float32 numpy; zeros of `shape` if absent."""
    return np.zeros(shape, np.float32) if x is None else x.detach().to(torch.float32).contiguous().numpy()


def _jobs(x: Tensor) -> tuple[int, int]:
    """Their number and the rows of each, which never depend on the number of threads: nor does a sum over rows."""
    n_rows, width = x.shape
    piece = max(PIECE // width, 1)
    return -(-n_rows // piece), piece


def forward(x, residual, weight, bias, eps, centred, dtype):
    n_jobs, piece = _jobs(x)
    y = np.empty(x.shape, np.float32)
    stream = np.empty((0, 0) if residual is None else x.shape, np.float32)
    arrays = (_array(x), _array(residual, 0, 0), _array(copied(weight)), _array(copied(bias), len(weight)))
    parallel(_forward, n_jobs, piece, *arrays, np.float32(eps), centred, stream, y)
    stream = torch.from_numpy(stream)
    return torch.from_numpy(y).to(dtype), stream.view(-1) if residual is None else stream


def backward(dy, dstream, stream, weight, bias, eps, centred, x_dtype):
    """Gradients of (residual, x, weight, bias)."""
    n_jobs, piece = _jobs(stream)
    dresidual = np.empty(stream.shape, np.float32)
    dweight, dbias = (np.empty((n_jobs, len(weight)), np.float32) for _ in range(2))
    arrays = (_array(dy), _array(dstream, 0, 0), _array(stream), _array(copied(weight)))
    parallel(_backward, n_jobs, piece, *arrays, np.float32(eps), centred, dresidual, dweight, dbias)
    dresidual = torch.from_numpy(dresidual)
    return dresidual, dresidual.to(x_dtype), torch.from_numpy(dweight).sum(0), torch.from_numpy(dbias).sum(0)
