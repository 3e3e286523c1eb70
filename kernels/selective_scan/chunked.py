"""Selective scan in plain PyTorch with bounded memory: float64, complex A on a CPU, devices without a kernel of ours.

Tokens go through in pieces of `PIECE`. Inside a piece all steps advance together by recursive doubling (Hillis and
Steele, 1986): after k rounds each step holds the recurrence of the last 2^k steps as a pair (decay, input). Only one
piece's (PIECE, D, N) tensors are alive at a time; the backward runs each piece again from the saved state before it.

Letters: T tokens of all sequences laid end to end, S sequences, D channels, N states, G groups. A token that opens a
sequence gets decay 0, with the initial state added to its input, so that nothing crosses from one sequence to the next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sequences import sequence_bounds

PIECE = 64  # steps


def _doubling(decay: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """All states of h_t = decay_t h_{t-1} + x_t from h_{-1} = h: (K, D, N)."""
    x = x.clone()
    x[0] += decay[0] * h
    shift = 1
    while shift < len(x):
        x = torch.cat((x[:shift], x[shift:] + decay[shift:] * x[:-shift]))
        decay = torch.cat((decay[:shift], decay[shift:] * decay[:-shift]))
        shift *= 2
    return x


class _Problem:
    """The inputs in the dtype of the sums, flipped if the scan runs backwards, with sequence starts marked."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse):
        self.real = torch.promote_types(u.dtype, torch.float32)
        self.dtype = self.real.to_complex() if A.is_complex() else self.real
        self.softplus, self.reverse = softplus, reverse
        self.bounds = sequence_bounds(cu_seqlens, batch, u.shape[0]).to(u.device)
        if reverse:
            self.bounds = u.shape[0] - self.bounds.flip(0)
        self.u = self.by_time(u)
        self.z = None if z is None else self.by_time(z)
        self.A, self.D = A.to(self.dtype), None if D is None else D.to(self.real)
        self.B, self.C = (
            m.to(self.dtype if m.is_complex() else self.real) if m.dim() == 2 else self.by_time(m) for m in (B, C)
        )
        self.raw = self.by_time(delta)
        if delta_bias is not None:
            self.raw = self.raw + delta_bias.to(self.real)
        self.dt = F.softplus(self.raw, threshold=700.0) if softplus else self.raw
        n_seqs = len(self.bounds) - 1
        self.h0 = (
            A.new_zeros(n_seqs, *A.shape, dtype=self.dtype)
            if initial_state is None
            else self.by_sequence(initial_state)
        )
        # The sequence that each token opens, or -1. An empty sequence opens no token.
        lengths = self.bounds.diff()
        self.opens = torch.full((u.shape[0] + 1,), -1, device=u.device)
        order = torch.arange(n_seqs, device=u.device)
        self.opens[torch.where(lengths > 0, self.bounds[:-1], u.shape[0])] = order
        self.opens = self.opens[:-1]
        self.empty = lengths == 0

    def by_time(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype if x.is_complex() else self.real)
        return x.flip(0) if self.reverse else x

    def by_sequence(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).flip(0) if self.reverse else x.to(self.dtype)

    def per_channel(self, m: Tensor, piece: slice) -> Tensor:
        """B or C for a piece of time: (K, D, N), or (D, N) if static."""
        return m if m.dim() == 2 else m[piece].repeat_interleave(self.u.shape[1] // m.shape[1], dim=1)

    def step(self, piece: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(decay, decay short of the resets, input) of a piece, each (K, D, N)."""
        decay = torch.exp(self.dt[piece, :, None] * self.A)
        x = (self.dt[piece] * self.u[piece])[..., None] * self.per_channel(self.B, piece)
        opens = self.opens[piece]
        start = (opens >= 0)[:, None, None]
        x = x + torch.where(start, decay * self.h0[opens.clamp(min=0)], 0)
        return torch.where(start, 0, decay), decay, x


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    p = _Problem(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse)
    n_tokens = u.shape[0]
    y = torch.empty(u.shape, dtype=p.real, device=u.device)
    ends = torch.where(p.empty, -1, p.bounds[1:] - 1)
    final = p.h0.clone()
    checkpoints = p.A.new_empty(-(-n_tokens // PIECE) if save else 0, *A.shape)
    h = torch.zeros_like(p.A)
    for i, begin in enumerate(range(0, n_tokens, PIECE)):
        piece = slice(begin, begin + PIECE)
        if save:
            checkpoints[i] = h
        decay, _, x = p.step(piece)
        states = _doubling(decay, x, h)
        y[piece] = _read_out(states, p.per_channel(p.C, piece))
        inside = (ends >= begin) & (ends < begin + len(states))
        final = torch.where(inside[:, None, None], states[(ends - begin).clamp(0, len(states) - 1)], final)
        h = states[-1]
    if p.D is not None:
        y += p.D * p.u
    if p.z is not None:
        y *= F.silu(p.z)
    y = y.flip(0) if reverse else y
    return y.to(u.dtype), final.flip(0) if reverse else final, checkpoints


def _read_out(states: Tensor, C: Tensor) -> Tensor:
    y = (states * C).sum(-1)
    return 2 * y.real if y.is_complex() else y


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, checkpoints, softplus, reverse
):
    p = _Problem(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse)
    n_tokens = u.shape[0]
    dy = p.by_time(dy)
    du, ddt, y = torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(dy)
    dA = torch.zeros_like(p.A)
    dB, dC = (torch.zeros_like(m) for m in (p.B, p.C))
    dh0 = torch.zeros_like(p.h0) if dfinal is None else torch.where(p.empty[:, None, None], p.by_sequence(dfinal), 0)
    ends = torch.where(p.empty, n_tokens, p.bounds[1:] - 1)
    dout = dy if p.z is None else dy * F.silu(p.z)
    factor = 2 if A.is_complex() else 1  # y = 2 Re(C h)
    g = torch.zeros_like(p.A)  # dL/dh that comes from the steps after the piece
    for i in range(len(checkpoints) - 1, -1, -1):
        piece = slice(i * PIECE, min((i + 1) * PIECE, n_tokens))
        K = piece.stop - piece.start
        decay, decay_raw, x = p.step(piece)
        states = _doubling(decay, x, checkpoints[i])
        B_, C_ = p.per_channel(p.B, piece), p.per_channel(p.C, piece)
        y[piece] = _read_out(states, C_)
        # dL/dh_t = conj(C_t) dy_t + conj(decay_{t+1}) dL/dh_{t+1}: the same recurrence, backwards in time.
        d_out = factor * dout[piece, :, None]
        own = (d_out * C_.conj()).expand(K, *A.shape).to(p.dtype).clone()
        if dfinal is not None:
            inside = (ends >= piece.start) & (ends < piece.stop)
            own.index_add_(
                0,
                torch.where(inside, ends - piece.start, 0),
                torch.where(inside[:, None, None], p.by_sequence(dfinal), 0),
            )
        own[-1] += g
        shifted = torch.cat((decay[1:], torch.zeros_like(decay[:1]))).conj()
        grads = _doubling(shifted.flip(0), own.flip(0), torch.zeros_like(g)).flip(0)
        g = decay[0].conj() * grads[0]

        opens = p.opens[piece]
        start = (opens >= 0)[:, None, None]
        before = torch.cat((checkpoints[i][None], states[:-1]))
        before = torch.where(start, p.h0[opens.clamp(min=0)], before)
        through = grads * decay_raw.conj()  # dL/dh_{t-1}, resets aside
        dh0.index_add_(0, opens.clamp(min=0), torch.where(start, through, 0))
        d_exponent = through * before.conj()
        dA += (d_exponent * p.dt[piece, :, None]).sum(0)
        d_dtu = _real(grads * B_.conj()).sum(-1)
        ddt[piece] = _real(d_exponent * p.A.conj()).sum(-1) + d_dtu * p.u[piece]
        du[piece] = d_dtu * p.dt[piece]
        _add_matrix_grad(dB, grads * (p.dt[piece] * p.u[piece])[..., None], piece)
        _add_matrix_grad(dC, d_out * states.conj(), piece)
    if softplus:
        ddt = ddt * torch.sigmoid(p.raw)
    dD = dz = dbias = absent = dy.new_empty(0)
    if p.D is not None:
        dD = (dout * p.u).sum(0)
        du += dout * p.D
        y += p.D * p.u
    if p.z is not None:
        sig = torch.sigmoid(p.z)
        dz = dy * y * sig * (1 + p.z * (1 - sig))
    if delta_bias is not None:
        dbias = ddt.sum(0)

    def back(x: Tensor) -> Tensor:
        return x.flip(0) if reverse else x

    dB, dC = (d if d.dim() == 2 else back(d) for d in (dB, dC))
    return back(du), back(ddt), dA, dB, dC, dD, back(dz), dbias, absent if initial_state is None else back(dh0)


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _add_matrix_grad(total: Tensor, share: Tensor, piece: slice) -> None:
    """Add dL/dB (or C) of a piece, (K, D, N), to the gradient in the form in which the matrix was given."""
    if not total.is_complex():
        share = _real(share)
    if total.dim() == 2:
        total += share.sum(0)
    else:
        n_groups = total.shape[1]
        total[piece] = share.view(len(share), n_groups, -1, share.shape[-1]).sum(2)


def saved_shape(n_tokens: int, n_seqs: int, n_channels: int, n_states: int) -> tuple[int, int, int]:
    """Shape of the saved states that `forward` returns."""
    return -(-n_tokens // PIECE), n_channels, n_states
