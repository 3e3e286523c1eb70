"""Selective scan on the CPU: serial in time, vectorised over channels, compiled by numba.

One job is a tile of up to 64 channels of one sequence. Its state (N, tile) stays in registers and the first-level cache
while time runs, so nothing of size (tokens, D, N) is ever stored. For the backward the forward (cpu_forward.py) leaves
a checkpoint of the state every `CHECKPOINT` steps; the backward walks these pieces from the last to the first, runs
each one again into a scratch buffer that fits the second-level cache, and then goes back through it.

Letters: T tokens of all sequences, S sequences, D channels, N states, G groups, w channels of a tile, n one state.
Arrays here are numpy, float32, C-contiguous, in rows of channels: A, states and static B or C are (.., N, D).
An option that is absent comes as an array of size 0. z, B and C may be some columns of a wider array, from column z0,
B0, C0 on: B and C are (T, G N) there. In the forward delta may be the product of two, (T, R) and W (R, D).
"""

import numpy as np
import torch
from torch import Tensor

from ..numba_runtime import LOG2E, TILE, bounds_of, buffer, copied, jit, load, parallel, rows, store
from ..sequences import checkpoint_slots
from .cpu_forward import CHECKPOINT
from .cpu_forward import forward as _forward
from .cpu_pieces import (
    add_skip,
    discretise,
    gate_backward,
    input_backward,
    load_group,
    order_of,
    read_out,
    scan_backward,
    scan_keeping_states,
)


@jit
def _backward(first, last, tiles, bounds, delta, u, A2, B, B0, Bs, C, C0, Cs, D, z, z0, bias, checkpoints, dy,
              dfinal, use_softplus, reverse, du, ddelta, dA, dB, dBs, dC, dCs, dD, dz, dbias, dh0):  # fmt: skip
    N = A2.shape[0]
    raw, u_, z_, dt = buffer(CHECKPOINT), buffer(CHECKPOINT), buffer(CHECKPOINT), buffer(CHECKPOINT)
    dtu, y_, dy_, dz_ = buffer(CHECKPOINT), buffer(CHECKPOINT), buffer(CHECKPOINT), buffer(CHECKPOINT)
    d_dt, d_dtu, du_ = buffer(CHECKPOINT), buffer(CHECKPOINT), buffer(CHECKPOINT)
    kept, decays = np.empty((N, CHECKPOINT + 1, TILE), np.float32), np.empty((N, CHECKPOINT, TILE), np.float32)
    A_, grad, dA_ = buffer(N), buffer(N), buffer(N)
    B_, C_ = np.empty((CHECKPOINT, N), np.float32), np.empty((CHECKPOINT, N), np.float32)
    dB_, dC_ = np.empty((CHECKPOINT, N), np.float32), np.empty((CHECKPOINT, N), np.float32)
    Bs_, dBs_ = buffer(Bs.shape[0]), buffer(Bs.shape[0])
    Cs_, dCs_ = buffer(Cs.shape[0]), buffer(Cs.shape[0])
    D_, bias_, dD_, dbias_ = buffer(1), buffer(1), buffer(1), buffer(1)
    states, only, scratch = np.arange(N), np.zeros(1, np.int64), np.empty(TILE, np.float32)
    for job in range(first, last):
        s, tile = job // tiles.shape[0], job % tiles.shape[0]
        c0, c1, g = tiles[tile]
        w = c1 - c0
        load(A2, states, c0, c1, A_)
        load(dfinal[s], states, c0, c1, grad)
        load(Bs, states[: Bs.shape[0]], c0, c1, Bs_)
        load(Cs, states[: Cs.shape[0]], c0, c1, Cs_)
        load(D, only, c0, c1, D_)
        load(bias, only, c0, c1, bias_)
        for sums in (dA_, dBs_, dCs_, dD_, dbias_):
            sums[:] = np.float32(0.0)
        length = bounds[s + 1] - bounds[s]
        for piece in range((length + CHECKPOINT - 1) // CHECKPOINT - 1, -1, -1):
            begin = piece * CHECKPOINT
            K = min(CHECKPOINT, length - begin)
            order = order_of(bounds, s, begin, K, reverse)
            load(delta, order, c0, c1, raw)
            load(u, order, c0, c1, u_)
            load(dy, order, c0, c1, dy_)
            load_group(B, B0 + g * N, order, B_)
            load_group(C, C0 + g * N, order, C_)
            discretise(raw, u_, bias_, use_softplus, K, w, dt, dtu)
            load(checkpoints[bounds[s] // CHECKPOINT + s + piece], states, c0, c1, kept[:, 0])
            scan_keeping_states(dt, dtu, A_, B_, Bs_, K, w, kept, decays)
            if z.size > 0:
                load(z, order, z0 + c0, z0 + c1, z_)
                read_out(kept, C_, Cs_, K, w, y_)
                add_skip(D_, u_, K, w, y_)
                gate_backward(z_, y_, K, w, dy_, dz_)
                store(dz_, order, c0, c1, dz)
            scan_backward(
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
            input_backward(raw, u_, dt, D_, dy_, d_dtu, use_softplus, K, w, d_dt, du_, dD_, dbias_)
            store(du_, order, c0, c1, du)
            store(d_dt, order, c0, c1, ddelta)
            for i in range(K):
                if dB.size > 0:
                    dB[tile, order[i]] = dB_[i]
                if dC.size > 0:
                    dC[tile, order[i]] = dC_[i]
        store(dA_, states, c0, c1, dA[s])
        store(dBs_, states[: Bs.shape[0]], c0, c1, dBs[s])
        store(dCs_, states[: Cs.shape[0]], c0, c1, dCs[s])
        store(dD_, only, c0, c1, dD[s])
        store(dbias_, only, c0, c1, dbias[s])
        store(grad, states, c0, c1, dh0[s])


def _array(x: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """x as float32 numpy with as many dimensions as `shape`, leading ones added; of that (empty) shape if absent."""
    if x is None:
        return np.empty(shape, np.float32)
    return x.detach().to(torch.float32).contiguous().numpy().reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))


def _split_static(x: Tensor) -> tuple[np.ndarray, int, np.ndarray]:
    """(by token, its first column, by channel): one of the arrays holds B (or C), the other is empty."""
    if x.dim() == 2:
        return *rows(None), _array(x.mT, (0, 0))
    return *rows(x.flatten(1)), _array(None, (0, 0))


def _prepare(u, A, B, C, D, z, delta_bias, cu_seqlens, batch):
    """What both directions share: tiles (n, 3) of (first channel, last channel, group), sequence bounds, arrays."""
    n_groups = next((x.shape[1] for x in (B, C) if x.dim() == 3), 1)
    per_group = u.shape[1] // n_groups
    tiles = [
        (first, min(first + TILE, (group + 1) * per_group), group)
        for group in range(n_groups)
        for first in range(group * per_group, (group + 1) * per_group, TILE)
    ]
    bounds = bounds_of(cu_seqlens, batch, u.shape[0])
    arrays = (
        *(_array(u, (0, 0)), _array(A.mT.float() * LOG2E, (0, 0))),
        *(*_split_static(B), *_split_static(C)),
        *(_array(copied(D), (0, 0)), *rows(z), _array(copied(delta_bias), (0, 0))),
    )
    return np.array(tiles, np.int64).reshape(-1, 3), bounds, arrays


def _state(x: Tensor | None, n_seqs: int) -> np.ndarray:
    return _array(None if x is None else x.mT, (n_seqs, 0, 0))


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save, dt_proj=None, y=None
):
    """dt_proj (D, R): delta is (T, R) and its product with dt_proj' is made on the way, never stored.

    y (T, D), contiguous float32: room for the result. It may be u: a row of it is written after u's was read.
    """
    tiles, bounds, arrays = _prepare(u, A, B, C, D, z, delta_bias, cu_seqlens, batch)
    n_seqs, (n_channels, n_states) = len(bounds) - 1, A.shape
    y = np.empty(u.shape, np.float32) if y is None else y.numpy()
    final = np.empty((n_seqs, n_states, n_channels), np.float32)
    checkpoints = np.empty(saved_shape(u.shape[0], n_seqs, *A.shape) if save else (0, n_states, n_channels), np.float32)
    h0 = _state(initial_state, n_seqs)
    low = (_array(delta, (0, 0)), 0) if dt_proj is None else rows(delta)
    W = _array(None if dt_proj is None else copied(dt_proj).mT, (0, 0))
    results = y, final, checkpoints
    parallel(_forward, n_seqs * len(tiles), tiles, bounds, *low, W, *arrays, h0, softplus, reverse, save, *results)
    return torch.from_numpy(y).to(u.dtype), torch.from_numpy(final).mT, torch.from_numpy(checkpoints)


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, checkpoints, softplus, reverse,
    dz=None,
):  # fmt: skip
    """dz: room for z's gradient, which may be some columns of a wider matrix."""
    room = dz
    tiles, bounds, arrays = _prepare(u, A, B, C, D, z, delta_bias, cu_seqlens, batch)
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
        *(_backward, n_seqs * len(tiles), tiles, bounds, _array(delta, (0, 0)), *arrays, checkpoints.numpy()),
        _array(dy, (0, 0)),
        *(_state(dfinal, n_seqs), softplus, reverse),
        *(du, ddelta, dA, dB, dBs, dC, dCs, dD, dz, dbias, dh0),
    )

    if room is not None:
        room.copy_(torch.from_numpy(dz))

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
