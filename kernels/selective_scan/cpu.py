"""Selective scan on the CPU: serial in time, vectorised over channels, compiled by numba.

One job is a tile of up to 64 channels of one sequence. Its state (N, tile) stays in the first-level cache while time
runs, so nothing of size (tokens, D, N) is ever stored. For the backward the forward leaves a checkpoint of the state
every `CHECKPOINT` steps; the backward walks these pieces from the last to the first, runs each one again into a
scratch buffer that fits the second-level cache, and then goes back through it.

Letters: T tokens of all sequences, S sequences, D channels, N states, G groups, w channels of a tile, n one state.
Arrays here are numpy, float32, C-contiguous, in rows of channels: A, states and static B or C are (.., N, D).
An option that is absent comes as an array of size 0.
"""

import numpy as np
import torch
from torch import Tensor

from ..numba_runtime import LOG2E, REDUCE, exp2, inline, jit, parallel, sigmoid, softplus
from ..sequences import checkpoint_slots, sequence_bounds

TILE = 64  # channels of a job
CHECKPOINT = 64  # steps between saved states, which so cost N / 64 of a (T, D) tensor


# How these functions are cut is what makes LLVM vectorise their inner loops. Each one is compiled by itself, works on a
# piece of time, and touches only small contiguous buffers, as `tile[n, d]`: an index such as x[t, c0 + d] is guarded
# against being negative, a slice in the inner loop costs two atomic reference counts, and a function with many arrays
# needs more overlap checks than LLVM is willing to make (each measured: 10 to 20 times slower).
# (Unpacking one large array into several would make them strided, with the same effect: hence `_buffer`.)
# In them K is the steps of the piece, w the channels of the tile. A static B or C comes as (N, TILE), else that tile is
# empty and B, C are (K, N).


@inline()
def _buffer(rows):
    return np.empty((rows, TILE), np.float32)


@jit
def _load(source, order, c0, c1, out):
    """out[i, :w] = source[order[i], c0:c1]; zeros where the source is absent."""
    for i in range(order.size):
        if source.size > 0:
            out[i, : c1 - c0] = source[order[i], c0:c1]
        else:
            out[i, : c1 - c0] = np.float32(0.0)


@jit
def _store(tile, order, c0, c1, out):
    """The reverse of `_load`; nothing where the target is absent."""
    if out.size > 0:
        for i in range(order.size):
            out[order[i], c0:c1] = tile[i, : c1 - c0]


@jit
def _load_group(source, order, g, out):
    """out[i] = source[order[i], g] for a B or C that depends on the token."""
    if source.size > 0:
        for i in range(order.size):
            out[i] = source[order[i], g]


@jit
def _discretise(raw, u, bias, use_softplus, K, w, dt, dtu):
    """dt = softplus(delta + bias) and dt u; `raw` becomes delta + bias."""
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
def _scan(dt, dtu, A2, B, B_tile, C, C_tile, K, w, state, y):
    """h = exp2(dt A log2 e) h + dt u B and y = C h over the piece."""
    for i in range(K):
        for d in range(w):
            y[i, d] = np.float32(0.0)
        for n in range(state.shape[0]):
            if B_tile.size > 0:
                for d in range(w):
                    state[n, d] = exp2(dt[i, d] * A2[n, d]) * state[n, d] + dtu[i, d] * B_tile[n, d]
            else:
                b = B[i, n]
                for d in range(w):
                    state[n, d] = exp2(dt[i, d] * A2[n, d]) * state[n, d] + dtu[i, d] * b
            if C_tile.size > 0:
                for d in range(w):
                    y[i, d] += C_tile[n, d] * state[n, d]
            else:
                c = C[i, n]
                for d in range(w):
                    y[i, d] += c * state[n, d]


@jit
def _scan_keeping_states(dt, dtu, A2, B, B_tile, K, w, states, decays):
    """As `_scan`, from states[:, 0] and with all that the backward needs: states (N, 1 + K, w) and decays (N, K, w)."""
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
def _read_out(states, C, C_tile, K, w, y):
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
def _scan_backward(dy, dt, dtu, A2, B, B_tile, C, C_tile, states, decays, K, w,
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
def _gate(z, K, w, y):
    for i in range(K):
        for d in range(w):
            y[i, d] *= z[i, d] * sigmoid(z[i, d])


@jit
def _gate_backward(z, y, K, w, dy, dz):
    """Given y before the gate and dL/d(y silu(z)): dz, and dy becomes dL/dy."""
    one = np.float32(1.0)
    for i in range(K):
        for d in range(w):
            gate = sigmoid(z[i, d])
            dz[i, d] = dy[i, d] * y[i, d] * gate * (one + z[i, d] * (one - gate))
        for d in range(w):
            dy[i, d] *= z[i, d] * sigmoid(z[i, d])


@jit
def _add_skip(D, u, K, w, y):
    for i in range(K):
        for d in range(w):
            y[i, d] += D[0, d] * u[i, d]


@jit
def _input_backward(raw, u, dt, D, dy, d_dtu, use_softplus, K, w, d_dt, du, dD, dbias):
    """Backward of `_discretise` and of the skip D u: du; d_dt becomes ddelta; dD and dbias are added to."""
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


@jit
def _forward(first, last, tiles, bounds, u, delta, A2, B, Bs, C, Cs, D, z, bias, h0,
             use_softplus, reverse, save, y, final, checkpoints):  # fmt: skip
    N = A2.shape[0]
    raw, u_, z_, dt = _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT)
    dtu, y_ = _buffer(CHECKPOINT), _buffer(CHECKPOINT)
    A_, h = _buffer(N), _buffer(N)
    B_, C_ = np.empty((CHECKPOINT, N), np.float32), np.empty((CHECKPOINT, N), np.float32)
    Bs_, Cs_ = _buffer(Bs.shape[0]), _buffer(Cs.shape[0])
    D_, bias_ = _buffer(1), _buffer(1)
    states, only = np.arange(N), np.zeros(1, np.int64)
    for job in range(first, last):
        s, tile = job // tiles.shape[0], job % tiles.shape[0]
        c0, c1, g = tiles[tile]
        w = c1 - c0
        _load(A2, states, c0, c1, A_)
        _load(h0[s], states, c0, c1, h)
        _load(Bs, states[: Bs.shape[0]], c0, c1, Bs_)
        _load(Cs, states[: Cs.shape[0]], c0, c1, Cs_)
        _load(D, only, c0, c1, D_)
        _load(bias, only, c0, c1, bias_)
        length = bounds[s + 1] - bounds[s]
        for begin in range(0, length, CHECKPOINT):
            K = min(CHECKPOINT, length - begin)
            order = np.arange(bounds[s] + begin, bounds[s] + begin + K)
            if reverse:
                order = np.arange(bounds[s + 1] - 1 - begin, bounds[s + 1] - 1 - begin - K, -1)
            if save:
                _store(h, states, c0, c1, checkpoints[bounds[s] // CHECKPOINT + s + begin // CHECKPOINT])
            _load(delta, order, c0, c1, raw)
            _load(u, order, c0, c1, u_)
            _load_group(B, order, g, B_)
            _load_group(C, order, g, C_)
            _discretise(raw, u_, bias_, use_softplus, K, w, dt, dtu)
            _scan(dt, dtu, A_, B_, Bs_, C_, Cs_, K, w, h, y_)
            if D.size > 0:
                _add_skip(D_, u_, K, w, y_)
            if z.size > 0:
                _load(z, order, c0, c1, z_)
                _gate(z_, K, w, y_)
            _store(y_, order, c0, c1, y)
        _store(h, states, c0, c1, final[s])


@jit
def _backward(first, last, tiles, bounds, u, delta, A2, B, Bs, C, Cs, D, z, bias, checkpoints, dy, dfinal,
              use_softplus, reverse, du, ddelta, dA, dB, dBs, dC, dCs, dD, dz, dbias, dh0):  # fmt: skip
    N = A2.shape[0]
    raw, u_, z_, dt = _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT)
    dtu, y_, dy_, dz_ = _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT)
    d_dt, d_dtu, du_ = _buffer(CHECKPOINT), _buffer(CHECKPOINT), _buffer(CHECKPOINT)
    kept, decays = np.empty((N, CHECKPOINT + 1, TILE), np.float32), np.empty((N, CHECKPOINT, TILE), np.float32)
    A_, grad, dA_ = _buffer(N), _buffer(N), _buffer(N)
    B_, C_ = np.empty((CHECKPOINT, N), np.float32), np.empty((CHECKPOINT, N), np.float32)
    dB_, dC_ = np.empty((CHECKPOINT, N), np.float32), np.empty((CHECKPOINT, N), np.float32)
    Bs_, dBs_ = _buffer(Bs.shape[0]), _buffer(Bs.shape[0])
    Cs_, dCs_ = _buffer(Cs.shape[0]), _buffer(Cs.shape[0])
    D_, bias_, dD_, dbias_ = _buffer(1), _buffer(1), _buffer(1), _buffer(1)
    states, only, scratch = np.arange(N), np.zeros(1, np.int64), np.empty(TILE, np.float32)
    for job in range(first, last):
        s, tile = job // tiles.shape[0], job % tiles.shape[0]
        c0, c1, g = tiles[tile]
        w = c1 - c0
        _load(A2, states, c0, c1, A_)
        _load(dfinal[s], states, c0, c1, grad)
        _load(Bs, states[: Bs.shape[0]], c0, c1, Bs_)
        _load(Cs, states[: Cs.shape[0]], c0, c1, Cs_)
        _load(D, only, c0, c1, D_)
        _load(bias, only, c0, c1, bias_)
        for sums in (dA_, dBs_, dCs_, dD_, dbias_):
            sums[:] = np.float32(0.0)
        length = bounds[s + 1] - bounds[s]
        for piece in range((length + CHECKPOINT - 1) // CHECKPOINT - 1, -1, -1):
            begin = piece * CHECKPOINT
            K = min(CHECKPOINT, length - begin)
            order = np.arange(bounds[s] + begin, bounds[s] + begin + K)
            if reverse:
                order = np.arange(bounds[s + 1] - 1 - begin, bounds[s + 1] - 1 - begin - K, -1)
            _load(delta, order, c0, c1, raw)
            _load(u, order, c0, c1, u_)
            _load(dy, order, c0, c1, dy_)
            _load_group(B, order, g, B_)
            _load_group(C, order, g, C_)
            _discretise(raw, u_, bias_, use_softplus, K, w, dt, dtu)
            _load(checkpoints[bounds[s] // CHECKPOINT + s + piece], states, c0, c1, kept[:, 0])
            _scan_keeping_states(dt, dtu, A_, B_, Bs_, K, w, kept, decays)
            if z.size > 0:
                _load(z, order, c0, c1, z_)
                _read_out(kept, C_, Cs_, K, w, y_)
                _add_skip(D_, u_, K, w, y_)
                _gate_backward(z_, y_, K, w, dy_, dz_)
                _store(dz_, order, c0, c1, dz)
            _scan_backward(
                dy_,
                dt,
                dtu,
                A_,
                B_,
                Bs_,
                C_,
                Cs_,
                kept,
                decays,
                K,
                w,
                grad,
                d_dt,
                d_dtu,
                dA_,
                dB_,
                dBs_,
                dC_,
                dCs_,
                scratch,
            )
            _input_backward(raw, u_, dt, D_, dy_, d_dtu, use_softplus, K, w, d_dt, du_, dD_, dbias_)
            _store(du_, order, c0, c1, du)
            _store(d_dt, order, c0, c1, ddelta)
            for i in range(K):
                if dB.size > 0:
                    dB[tile, order[i]] = dB_[i]
                if dC.size > 0:
                    dC[tile, order[i]] = dC_[i]
        _store(dA_, states, c0, c1, dA[s])
        _store(dBs_, states[: Bs.shape[0]], c0, c1, dBs[s])
        _store(dCs_, states[: Cs.shape[0]], c0, c1, dCs[s])
        _store(dD_, only, c0, c1, dD[s])
        _store(dbias_, only, c0, c1, dbias[s])
        _store(grad, states, c0, c1, dh0[s])


def _array(x: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """x as float32 numpy with as many dimensions as `shape`, leading ones added; of that (empty) shape if absent."""
    if x is None:
        return np.empty(shape, np.float32)
    return x.detach().to(torch.float32).contiguous().numpy().reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))


def _split_static(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(by token, by channel): one of them holds B (or C), the other is empty."""
    return (
        (_array(None, (0, 0, 0)), _array(x.mT, (0, 0)))
        if x.dim() == 2
        else (_array(x, (0, 0, 0)), _array(None, (0, 0)))
    )


def _prepare(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch):
    """What both directions share: tiles (n, 3) of (first channel, last channel, group), sequence bounds, arrays."""
    n_groups = next((x.shape[1] for x in (B, C) if x.dim() == 3), 1)
    per_group = u.shape[1] // n_groups
    tiles = [
        (first, min(first + TILE, (group + 1) * per_group), group)
        for group in range(n_groups)
        for first in range(group * per_group, (group + 1) * per_group, TILE)
    ]
    bounds = sequence_bounds(cu_seqlens, batch, u.shape[0]).numpy()
    arrays = (
        *(_array(u, (0, 0)), _array(delta, (0, 0)), _array(A.mT.float() * LOG2E, (0, 0))),
        *(*_split_static(B), *_split_static(C)),
        *(_array(D, (0, 0)), _array(z, (0, 0)), _array(delta_bias, (0, 0))),
    )
    return np.array(tiles, np.int64).reshape(-1, 3), bounds, arrays


def _state(x: Tensor | None, n_seqs: int) -> np.ndarray:
    return _array(None if x is None else x.mT, (n_seqs, 0, 0))


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    tiles, bounds, arrays = _prepare(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch)
    n_seqs, (n_channels, n_states) = len(bounds) - 1, A.shape
    y = np.empty(u.shape, np.float32)
    final = np.empty((n_seqs, n_states, n_channels), np.float32)
    checkpoints = np.empty(saved_shape(u.shape[0], n_seqs, *A.shape) if save else (0, n_states, n_channels), np.float32)
    h0 = _state(initial_state, n_seqs)
    parallel(_forward, n_seqs * len(tiles), tiles, bounds, *arrays, h0, softplus, reverse, save, y, final, checkpoints)
    return torch.from_numpy(y).to(u.dtype), torch.from_numpy(final).mT.contiguous(), torch.from_numpy(checkpoints)


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, checkpoints, softplus, reverse
):
    tiles, bounds, arrays = _prepare(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch)
    n_seqs, n_tokens, (n_channels, n_states) = len(bounds) - 1, u.shape[0], A.shape
    static_B, static_C = B.dim() == 2, C.dim() == 2
    by_token, by_channel = (len(tiles), n_tokens, n_states), (n_seqs, n_states, n_channels)

    def buffer(shape: tuple[int, ...], wanted: bool = True) -> np.ndarray:
        return np.empty(shape if wanted else (shape[0],) + (0,) * (len(shape) - 1), np.float32)

    du, ddelta, dz = buffer(u.shape), buffer(u.shape), buffer(u.shape, z is not None)
    dA, dh0 = buffer(by_channel), buffer(by_channel, initial_state is not None)
    dB, dBs = buffer(by_token, not static_B), buffer(by_channel, static_B)
    dC, dCs = buffer(by_token, not static_C), buffer(by_channel, static_C)
    dD, dbias = buffer((n_seqs, 1, n_channels), D is not None), buffer((n_seqs, 1, n_channels), delta_bias is not None)
    parallel(
        *(_backward, n_seqs * len(tiles), tiles, bounds, *arrays, checkpoints.numpy(), _array(dy, (0, 0))),
        *(_state(dfinal, n_seqs), softplus, reverse),
        *(du, ddelta, dA, dB, dBs, dC, dCs, dD, dz, dbias, dh0),
    )

    def over_channels(static: bool, partial: np.ndarray, by_channel: np.ndarray, n_groups: int) -> Tensor:
        """The tiles' shares summed in a fixed order: (T, G, N), or (D, N) if static."""
        if static:
            return torch.from_numpy(by_channel).sum(0).mT
        by_group = torch.from_numpy(partial).unflatten(0, (n_groups, len(tiles) // n_groups))
        return by_group.sum(1).transpose(0, 1)

    return (
        *(torch.from_numpy(du), torch.from_numpy(ddelta), torch.from_numpy(dA).sum(0).mT),
        *(over_channels(static_B, dB, dBs, B.shape[1]), over_channels(static_C, dC, dCs, C.shape[1])),
        *(torch.from_numpy(dD).sum((0, 1)), torch.from_numpy(dz), torch.from_numpy(dbias).sum((0, 1))),
        torch.from_numpy(dh0).mT,
    )


def saved_shape(n_tokens: int, n_seqs: int, n_channels: int, n_states: int) -> tuple[int, int, int]:
    """Shape of the saved states that `forward` returns."""
    return checkpoint_slots(n_tokens, n_seqs, CHECKPOINT), n_states, n_channels
