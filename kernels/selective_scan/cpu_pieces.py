"""The arithmetic of the CPU scan's backward: a piece of time of a tile of channels, in small contiguous buffers.

How these functions are cut is what makes LLVM vectorise their inner loops. Each one is compiled by itself, works on a
piece of time, and touches only small contiguous buffers, as `tile[n, d]`: an index such as x[t, c0 + d] is guarded
against being negative, a slice in the inner loop costs two atomic reference counts, and a function with many arrays
needs more overlap checks than LLVM is willing to make (each measured: 10 to 20 times slower). Unpacking one large array
into several would make them strided, with the same effect: hence `buffer`.

K is the steps of the piece, w the channels of the tile, n one of the N states. A static B or C comes as (N, TILE), else
that tile is empty and B, C are (K, N).
"""

import numpy as np

from ..numba_runtime import LOG2E, REDUCE, exp2, inline, jit, sigmoid, softplus, wide


@jit
def order_of(bounds, s, begin, most, reverse):
    """The tokens of sequence s from position `begin` on, at most so many, in the order of the recurrence."""
    first, last = bounds[s] + begin, min(bounds[s] + begin + most, bounds[s + 1])
    if reverse:
        first, last = bounds[s] + bounds[s + 1] - last, bounds[s] + bounds[s + 1] - first
        return np.arange(last - 1, first - 1, -1)
    return np.arange(first, last)


@jit
def load_group(source, first, order, out):
    """out[i] = source[order[i], first : first + N] for a B or C that depends on the token."""
    if source.size > 0:
        for i in range(order.size):
            for n in range(out.shape[1]):
                out[i, n] = source[order[i], first + n]


@jit
def discretise(raw, u, bias, use_softplus, K, w, dt, dtu):
    """dt = softplus(delta + bias) and dt u; `raw` becomes delta + bias."""
    wide()
    for i in range(K):
        for d in range(w):
            raw[i, d] += bias[0, d]
        if use_softplus:
            for d in range(w):
                dt[i, d] = softplus(raw[i, d])
        else:
            for d in range(w):
                dt[i, d] = raw[i, d]
        for d in range(w):
            dtu[i, d] = dt[i, d] * u[i, d]


@jit
def scan_keeping_states(dt, dtu, A2, B, B_tile, K, w, states, decays):
    """The recurrence from states[:, 0], with all that the backward needs: states (N, 1 + K, w) and decays (N, K, w)."""
    for n in range(A2.shape[0]):
        for i in range(K):
            for d in range(w):
                decays[n, i, d] = exp2(dt[i, d] * A2[n, d])
            if B_tile.size > 0:
                for d in range(w):
                    states[n, i + 1, d] = decays[n, i, d] * states[n, i, d] + dtu[i, d] * B_tile[n, d]
            else:
                b = B[i, n]
                for d in range(w):
                    states[n, i + 1, d] = decays[n, i, d] * states[n, i, d] + dtu[i, d] * b


@jit
def read_out(states, C, C_tile, K, w, y):
    """y = C h from the kept states."""
    y[:K, :w] = np.float32(0.0)
    for n in range(states.shape[0]):
        for i in range(K):
            if C_tile.size > 0:
                for d in range(w):
                    y[i, d] += C_tile[n, d] * states[n, i + 1, d]
            else:
                c = C[i, n]
                for d in range(w):
                    y[i, d] += c * states[n, i + 1, d]


@inline(REDUCE)
def _dot(a, b, w):
    total = np.float32(0.0)
    for d in range(w):
        total += a[d] * b[d]
    return total


@jit
def scan_backward(dy, dt, dtu, A2, B, B_tile, C, C_tile, states, decays, K, w,
                   grad, d_dt, d_dtu, dA, dB, dB_tile, dC, dC_tile, scratch):  # fmt: skip
    """Backward of y = C h, h = exp2(dt A log2 e) h + dt u B over the piece.

    grad is dL/dh after the piece on entry and before it on return. d_dt and d_dtu are written, d_dt short of the factor
    1 / log2 e; dA and the static dB_tile and dC_tile are added to; dB and dC (K, N) are this tile's share.
    """
    d_dt[:K, :w] = np.float32(0.0)
    d_dtu[:K, :w] = np.float32(0.0)
    for n in range(A2.shape[0]):
        for i in range(K - 1, -1, -1):
            if C_tile.size > 0:
                for d in range(w):
                    dC_tile[n, d] += dy[i, d] * states[n, i + 1, d]
                for d in range(w):
                    grad[n, d] += dy[i, d] * C_tile[n, d]
            else:
                dC[i, n] = _dot(dy[i], states[n, i + 1], w)
                c = C[i, n]
                for d in range(w):
                    grad[n, d] += dy[i, d] * c
            if B_tile.size > 0:
                for d in range(w):
                    dB_tile[n, d] += grad[n, d] * dtu[i, d]
                for d in range(w):
                    d_dtu[i, d] += grad[n, d] * B_tile[n, d]
            else:
                dB[i, n] = _dot(grad[n], dtu[i], w)
                b = B[i, n]
                for d in range(w):
                    d_dtu[i, d] += grad[n, d] * b
            for d in range(w):
                grad[n, d] *= decays[n, i, d]
            for d in range(w):
                scratch[d] = grad[n, d] * states[n, i, d]  # dL/d(dt A)
            for d in range(w):
                d_dt[i, d] += scratch[d] * A2[n, d]
            for d in range(w):
                dA[n, d] += scratch[d] * dt[i, d]


@jit
def gate_backward(z, y, K, w, dy, dz):
    """Given y before the gate and dL/d(y silu(z)): dz, and dy becomes dL/dy."""
    one = np.float32(1.0)
    for i in range(K):
        for d in range(w):
            gate = sigmoid(z[i, d])
            dz[i, d] = dy[i, d] * y[i, d] * gate * (one + z[i, d] * (one - gate))
        for d in range(w):
            dy[i, d] *= z[i, d] * sigmoid(z[i, d])


@jit
def add_skip(D, u, K, w, y):
    wide()
    for i in range(K):
        for d in range(w):
            y[i, d] += D[0, d] * u[i, d]


@jit
def input_backward(raw, u, dt, D, dy, d_dtu, use_softplus, K, w, d_dt, du, dD, dbias):
    """Backward of `discretise` and of the skip D u: du; d_dt becomes ddelta; dD and dbias are added to."""
    for i in range(K):
        for d in range(w):
            d_dt[i, d] = d_dt[i, d] * np.float32(1.0 / LOG2E) + d_dtu[i, d] * u[i, d]
        if use_softplus:
            for d in range(w):
                d_dt[i, d] *= sigmoid(raw[i, d])
        for d in range(w):
            du[i, d] = d_dtu[i, d] * dt[i, d] + dy[i, d] * D[0, d]
        for d in range(w):
            dD[0, d] += dy[i, d] * u[i, d]
        for d in range(w):
            dbias[0, d] += d_dt[i, d]
