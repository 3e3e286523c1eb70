"""The sample-by-sample loop of an audio model as compiled code: network, choice of a code, and on to the next sample.

Between two samples there is no Python and no PyTorch: a step of the network alone would be some hundred calls of ten
microseconds, and at 16 kHz a sample has 62. What a model is stands in a table of instructions over one array of weights
and one array of values (fused.py makes them); which of them run depends on how many rates take a step at this sample.

Matrices lie with their outputs side by side, so that a product is a sum of rows, weighted by the inputs: loops over
outputs, and over channels, become vector code. Matrices are float32, or the upper half of it (bfloat16), for what takes
time is to bring them from the cache; all else is float32, and a code is drawn from a sum in float64.
Letters: M width, E inner width, N states, R rank of dt, W convolution width.
"""

import numpy as np
from numba.core import types
from numba.extending import overload

from ..kernels.numba_runtime import LOG2E, bits_to_float, exp2, inline, jit, sigmoid, softplus, wide

# Instructions, rows of int64: what, then sizes and places in `v` (values), `w` (weights) and `m` (matrices).
ADD, COPY, LINEAR, MAMBA, PUT, TAKE, MLP, NORM = range(8)
N_OPERANDS = 12
_LOG2E = np.float32(LOG2E)


def _widened(x):
    """An element of a matrix as float32."""
    raise NotImplementedError


@overload(_widened, inline="always")
def _widened_of(x):
    if x == types.uint16:
        return lambda x: bits_to_float(np.int32(np.uint32(x) << np.uint32(16)))  # pyright: ignore[reportCallIssue]
    return lambda x: x


@inline()
def _product(m, at, x, out):
    """out[:] += x W, of a matrix W (len(x), len(out)) at `at`."""
    width, stride, k = np.uint64(out.size), out.size, 0
    while k + 4 <= x.size:
        first = at + k * stride
        row0, row1 = m[first : first + stride], m[first + stride : first + 2 * stride]
        row2, row3 = m[first + 2 * stride : first + 3 * stride], m[first + 3 * stride : first + 4 * stride]
        x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
        for o in range(width):
            early = _widened(row0[o]) * x0 + _widened(row1[o]) * x1
            out[o] += early + (_widened(row2[o]) * x2 + _widened(row3[o]) * x3)
        k += 4
    while k < x.size:
        row, x0 = m[at + k * stride : at + (k + 1) * stride], x[k]
        for o in range(width):
            out[o] += _widened(row[o]) * x0
        k += 1


@jit
def _linear(v, w, m, op):
    """v[out] = W v[x] + bias."""
    wide()
    x_at, n_in, out_at, n_out, at = op[1], op[2], op[3], op[4], op[5]
    x, out = v[x_at : x_at + n_in], v[out_at : out_at + n_out]
    for o in range(np.uint64(n_out)):
        out[o] = w[np.uint64(at) + o]
    _product(m, op[6], x, out)


@jit
def _norm(x, w, at, centred, out):
    """RMSNorm or LayerNorm; weight and bias at `at`."""
    wide()
    width = np.uint64(x.size)
    mean = np.float32(0.0)
    if centred:
        for d in range(width):
            mean += x[d]
        mean /= np.float32(x.size)
    square = np.float32(0.0)
    for d in range(width):
        out[d] = x[d] - mean
        square += out[d] * out[d]
    scale = np.float32(1.0) / np.sqrt(square / np.float32(x.size) + w[at + 2 * x.size])
    weight, bias = w[at : at + x.size], w[at + x.size : at + 2 * x.size]
    for d in range(width):
        out[d] = out[d] * scale * weight[d] + bias[d]


@jit
def _mamba(v, w, m, op, normed, uz, low, dt, y):
    """x += out_proj(..(norm(x))): a whole block. The order of its weights is fused.py's."""
    wide()
    x_at, M, E, N, R, W, at, conv_at, ssm_at = op[1], op[2], op[3], op[4], op[5], op[6], op[7], op[8], op[9]
    channels = np.uint64(E)
    x, normed, uz, y, dt = v[x_at : x_at + M], normed[:M], uz[: 2 * E], y[:E], dt[:E]
    _norm(x, w, at, op[10], normed)
    at, of_matrix = at + 2 * M + 1, op[11]
    uz[:] = np.float32(0.0)
    _product(m, of_matrix, normed, uz)
    of_matrix += 2 * E * M
    u, z = uz[:E], uz[E:]
    bias, newest = w[at : at + E], w[at + E * W : at + E * W + E]  # taps W - 1 is the newest sample's
    for e in range(channels):
        y[e] = u[e] * newest[e] + bias[e]
    for k in range(W - 1):
        tap, old = w[at + E * (k + 1) : at + E * (k + 2)], v[conv_at + k * E : conv_at + (k + 1) * E]
        for e in range(channels):
            y[e] += old[e] * tap[e]
    for k in range(W - 2):
        old, newer = v[conv_at + k * E : conv_at + (k + 1) * E], v[conv_at + (k + 1) * E : conv_at + (k + 2) * E]
        for e in range(channels):
            old[e] = newer[e]
    if W > 1:
        last = v[conv_at + (W - 2) * E : conv_at + (W - 1) * E]
        for e in range(channels):
            last[e] = u[e]
    at += E * (W + 1)
    for e in range(channels):
        u[e] = y[e] * sigmoid(y[e])
    n_low = (R + 2 * N + 15) // 16 * 16
    low = low[:n_low]
    low[:] = np.float32(0.0)
    _product(m, of_matrix, u, low)
    of_matrix += n_low * E
    dt_bias = w[at : at + E]
    for e in range(channels):
        dt[e] = dt_bias[e]
    _product(m, of_matrix, low[:R], dt)
    of_matrix += E * R
    at += E
    skip = w[at : at + E]
    for e in range(channels):
        dt[e] = softplus(dt[e])
        y[e] = skip[e] * u[e]
    at += E
    for n in range(N):
        A, h = w[at + n * E : at + (n + 1) * E], v[ssm_at + n * E : ssm_at + (n + 1) * E]
        drive, readout = low[R + n], low[R + N + n]
        for e in range(channels):
            h[e] = exp2(dt[e] * A[e]) * h[e] + dt[e] * u[e] * drive
            y[e] += h[e] * readout
    for e in range(channels):
        y[e] *= z[e] * sigmoid(z[e])
    _product(m, of_matrix, y, x)


@inline()
def _erf(x):
    """To 2e-7: Abramowitz and Stegun 7.1.26 is 1.5e-7."""
    a = abs(x)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * a)
    p = t * (
        np.float32(0.254829592)
        + t
        * (
            np.float32(-0.284496736)
            + t * (np.float32(1.421413741) + t * (np.float32(-1.453152027) + t * np.float32(1.061405429)))
        )
    )
    value = np.float32(1.0) - p * exp2(-a * a * _LOG2E)
    return -value if x < np.float32(0.0) else value


@jit
def _mlp(v, w, m, op, normed, inner):
    """x += out_proj(gelu(in_proj(norm(x)))), with biases."""
    wide()
    x_at, M, F, at = op[1], op[2], op[3], op[7]
    x, normed, inner = v[x_at : x_at + M], normed[:M], inner[:F]
    _norm(x, w, at, op[10], normed)
    at += 2 * M + 1
    for o in range(np.uint64(F)):
        inner[o] = w[np.uint64(at) + o]
    _product(m, op[11], normed, inner)
    at += F
    for o in range(np.uint64(F)):
        inner[o] *= np.float32(0.5) * (np.float32(1.0) + _erf(inner[o] * np.float32(0.70710678)))
    for o in range(np.uint64(M)):
        x[o] += w[np.uint64(at) + o]
    _product(m, op[11] + F * M, inner, x)


@jit
def _network(v, w, m, ops, first, last, phase, normed, uz, low, dt, y):
    for i in range(first, last):
        op = ops[i]
        kind = op[0]
        if kind == MAMBA:
            _mamba(v, w, m, op, normed, uz, low, dt, y)
        elif kind == ADD:
            for d in range(op[3]):
                v[op[1] + d] += v[op[2] + d]
        elif kind == COPY:
            for d in range(op[3]):
                v[op[1] + d] = v[op[2] + d]
        elif kind == LINEAR:
            _linear(v, w, m, op)
        elif kind == PUT:  # into slot `phase` of a pool's pending steps, which channel d has at d p
            slot = phase // op[5] % op[4]
            for d in range(op[3]):
                v[op[1] + d * op[4] + slot] = v[op[2] + d]
        elif kind == TAKE:
            slot = phase // op[5] % op[4]
            for d in range(op[3]):
                v[op[1] + d] = v[op[2] + d * op[4] + slot]
        elif kind == MLP:
            _mlp(v, w, m, op, normed, uz)
        else:
            x = v[op[1] : op[1] + op[2]]
            _norm(x, w, op[7], op[10], normed[: op[2]])
            x[:] = normed[: op[2]]


@jit
def _choose(logits, temperature, top_k, top_p, min_p, uniform, p):
    """The code at quantile `uniform`: core/sampling.py's rules. -1 if the logits are not finite."""
    wide()
    n = np.uint64(logits.size)
    largest, best = np.float32(-np.inf), 0
    for i in range(logits.size):
        if not np.isfinite(logits[i]):
            return -1
        if logits[i] > largest:
            largest, best = logits[i], i
    if temperature == 0.0:
        return best
    scale = np.float32(LOG2E / temperature)
    for i in range(n):
        p[i] = exp2((logits[i] - largest) * scale)
    if top_k > 0 or top_p < 1.0:
        descending = np.sort(p)[::-1]
        least = descending[min(top_k, p.size) - 1] if top_k > 0 else np.float32(0.0)
        if top_p < 1.0:
            total = 0.0
            for i in range(p.size):
                total += descending[i] if descending[i] >= least else 0.0
            reached = 0.0
            for i in range(p.size):
                if reached >= top_p * total:
                    break
                reached += descending[i]
                least = max(least, descending[i]) if reached >= top_p * total else least
        for i in range(n):
            p[i] = p[i] if p[i] >= least else np.float32(0.0)
    floor = np.float32(min_p)  # of the largest, which is 1
    total = 0.0
    for i in range(p.size):
        p[i] = p[i] if p[i] >= floor else np.float32(0.0)
        total += p[i]
    target, cumulative = uniform * total, 0.0
    for i in range(p.size):
        cumulative += p[i]
        if cumulative > target or cumulative >= total:
            return i
    return best


@jit
def run(
    first_row, last_row, v, beside, w, m, ops, spans, strides, positions, codes, uniforms, out, seen, embedding_at,
    logits_at, width, sizes, guidance, temperature, top_k, top_p, min_p,
):  # fmt: skip
    """For rows first to last: read `codes`, and then each code that is drawn but the last.

    v (B, values), w (weights,), ops (n, N_OPERANDS); spans (rates, 2): the instructions of a sample at which so many
    rates beside the first take a step. strides (rates,): samples of a step. uniforms (B, n); out (B, n): what was
    drawn, -1 from where there was nothing to draw from. seen (B, n, 256) gets the logits, unless it is empty.
    """
    normed, uz, low = np.empty(sizes[0], np.float32), np.empty(sizes[1], np.float32), np.empty(sizes[2], np.float32)
    dt, y, p = np.empty(sizes[3], np.float32), np.empty(sizes[3], np.float32), np.empty(256, np.float32)
    period = strides[strides.size - 1]
    first, last = spans[:, 0], spans[:, 1]
    for row in range(first_row, last_row):
        code, phase = codes[row], positions[row] % period
        for t in range(uniforms.shape[1]):
            depth = 0
            while depth + 1 < strides.size and (phase + 1) % strides[depth + 1] == 0:
                depth += 1
            values = v[row]
            for d in range(width):
                values[d] = w[embedding_at + code * width + d]
            _network(values, w, m, ops, first[depth], last[depth], phase, normed, uz, low, dt, y)
            logits = values[logits_at : logits_at + 256]
            if beside.size > 0:
                values = beside[row]
                for d in range(width):
                    values[d] = w[embedding_at + code * width + d]
                _network(values, w, m, ops, first[depth], last[depth], phase, normed, uz, low, dt, y)
                for i in range(256):
                    without = values[logits_at + i]
                    logits[i] = without + guidance * (logits[i] - without)
            if seen.size > 0:
                seen[row, t] = logits
            code = _choose(logits, temperature, top_k, top_p, min_p, uniforms[row, t], p)
            out[row, t] = code
            if code < 0:
                out[row, t:] = -1
                break
            phase = (phase + 1) % period
