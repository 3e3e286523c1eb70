"""The Linear Recurrent Unit (arXiv 2303.06349): a recurrence that never changes, of complex states that channels share.

    h_t = lambda h_{t-1} + gamma B u_t            lambda = exp(-exp(nu_log) + i exp(theta_log)), |lambda| < 1 always
    y_t = Re(C h_t) + D u_t                       gamma  = exp(gamma_log), at first sqrt(1 - |lambda|^2)
    out = out_proj(g) sigmoid(gate_proj(g)),  g = gelu(y)            the paper's layer, short of norm and residual

Parameter names are minimal-LRU's; its `out1` is out_proj, its `out2` gate_proj. The factor gamma keeps the size of h
alike for all lambda; it is learnt, independently of lambda.

`kernels.selective_scan` does not fit. Its states belong to one channel each, which reads 2 Re(C_d h_d) of its own; here
C mixes all states into all channels, so that h itself is needed, and to get both of its parts the scan would have to
run twice. And as lambda never changes, its powers are known beforehand: the scan below is recursive doubling over the
whole sequence, log2(L) products with them.

Letters: B batch, L length, D d_model, N states, S sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LRUConfig
from .padding import forward_as_pack


class LRUState(NamedTuple):
    """What an LRU remembers of a sequence."""

    h: Tensor  # (B, N, 2), float32: real and imaginary parts


class LRU(nn.Module):
    """(B, L, d_model) -> (B, L, d_model), causal."""

    projects_input = False  # it is added to the result as well

    def __init__(self, d_model: int, config: LRUConfig | None = None):
        super().__init__()
        self.config = c = config or LRUConfig()
        n_states = c.n_states or d_model
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(n_states)) for _ in range(3))
        self.B_re, self.B_im = (nn.Parameter(torch.empty(n_states, d_model)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.empty(d_model, n_states)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        self.gate_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's (section 3.2 to 3.4).

        lambda         uniform by area in the ring r_min <= |lambda| <= r_max, with angles up to max_phase
        gamma_log      log sqrt(1 - |lambda|^2)
        B, C, D        normal; B of variance 1 / D and C of 2 / N, halved between real and imaginary part (D: 1)
        """
        c, (d_model, n_states) = self.config, self.C_re.shape
        radius2 = torch.rand(n_states) * (c.r_max**2 - c.r_min**2) + c.r_min**2
        radius2 = radius2.clamp(1e-12, 1 - 1e-6)  # neither of the ring's edges has a logarithm if it is 0 or 1
        self.nu_log.copy_(torch.log(-0.5 * radius2.log()))
        self.theta_log.copy_(torch.log(c.max_phase * torch.rand(n_states).clamp(min=1e-6)))
        self.gamma_log.copy_(0.5 * torch.log1p(-radius2))
        for weight in (self.B_re, self.B_im):
            nn.init.normal_(weight, std=(2 * d_model) ** -0.5)
        for weight in (self.C_re, self.C_im):
            nn.init.normal_(weight, std=n_states**-0.5)
        nn.init.normal_(self.D)

    @property
    def log_lambda(self) -> Tensor:
        """(N,) complex64, complex128 in a float64 model."""
        dtype = torch.promote_types(self.nu_log.dtype, torch.float32)
        return torch.complex(-self.nu_log.to(dtype).exp(), self.theta_log.to(dtype).exp())

    def forward(
        self,
        hidden: Tensor,
        state: LRUState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LRUState]:
        """hidden (B, L, d_model) -> the same shape, or (that, state) iff return_state."""
        x = self._driven(hidden)
        start = None if state is None else torch.view_as_complex(state.h.to(x.real.dtype))
        h, last = diagonal_scan(x, self.log_lambda, start, cu_seqlens)
        y = self._read_out(h, hidden)
        return (y, LRUState(torch.view_as_real(last))) if return_state else y

    forward_padded = forward_as_pack

    @torch.no_grad()
    def step(self, hidden: Tensor, state: LRUState) -> Tensor:
        """hidden (B, d_model) -> (B, d_model); `state` updated in place."""
        h = self.log_lambda.exp() * torch.view_as_complex(state.h) + self._driven(hidden)
        state.h.copy_(torch.view_as_real(h))
        return self._read_out(h, hidden)

    def init_state(self, batch_size: int, max_length: int | None = None) -> LRUState:
        """The state before the first token; it does not grow, whatever `max_length` is."""
        dtype = torch.promote_types(self.nu_log.dtype, torch.float32)
        return LRUState(self.nu_log.new_zeros(batch_size, len(self.nu_log), 2, dtype=dtype))

    def _driven(self, hidden: Tensor) -> Tensor:
        """(.., D) -> gamma B u (.., N), complex."""
        re, im = F.linear(hidden, torch.cat((self.B_re, self.B_im))).chunk(2, dim=-1)
        dtype = torch.promote_types(re.dtype, torch.float32)
        gamma = self.gamma_log.to(dtype).exp()
        return torch.complex(gamma * re.to(dtype), gamma * im.to(dtype))

    def _read_out(self, h: Tensor, hidden: Tensor) -> Tensor:
        """(.., N), (.., D) -> the layer's result (.., D)."""
        parts = torch.cat((h.real, h.imag), -1).to(hidden.dtype)
        y = F.linear(parts, torch.cat((self.C_re, -self.C_im), 1)) + self.D * hidden
        y = F.gelu(y, approximate="tanh")
        return self.out_proj(y) * torch.sigmoid(self.gate_proj(y))


def diagonal_scan(
    x: Tensor, log_decay: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_decay) h_{t-1} + x_t for x (B, L, N) complex, log_decay (N,): (h (B, L, N), the last of each).

    state (B, N) is h before the first step. With cu_seqlens (S + 1,) B = 1 holds S sequences, and states are (S, N);
    the last state of an empty one is that before it.
    """
    batch, length, n_states = x.shape
    tokens = torch.arange(length, device=x.device)
    if cu_seqlens is None:
        if state is None:
            state = x.new_zeros(batch, n_states)
        elif length:
            x = torch.cat((x[:, :1] + (log_decay.exp() * state)[:, None], x[:, 1:]), 1)
        h = _Doubling.apply(x, log_decay, tokens, tokens.flip(0))
        return h, h[:, -1] if length else state
    bounds = cu_seqlens.to(torch.int64)
    starts, ends = bounds[:-1], bounds[1:]
    sequence = torch.searchsorted(bounds, tokens, right=True) - 1  # in `ends`, a slice, inductor could not
    place = tokens - starts[sequence]
    if state is None:
        state = x.new_zeros(len(starts), n_states)
    else:
        x = x + torch.where((place == 0)[:, None], (log_decay.exp() * state)[sequence], 0)
    h = _Doubling.apply(x, log_decay, place, ends[sequence] - 1 - tokens)
    return h, torch.where((ends > starts)[:, None], h[0, (ends - 1).clamp(min=0)], state) if length else state


class _Doubling(torch.autograd.Function):
    """The scan from h = 0 by recursive doubling (Hillis and Steele, 1986).

    place, left (L,): how many tokens of its own sequence stand before and after each. After the round with shift s
    each h_t holds what its last 2 s inputs contribute. Only h is kept for the backward, which is the same scan from
    the other end: dL/dx_t = g_t = dL/dh_t + conj(decay) g_{t+1} within a sequence.
    """

    @staticmethod
    def forward(ctx, x, log_decay, place, left):  # pyright: ignore[reportIncompatibleMethodOverride]
        h = _doubled(x, log_decay, place)
        ctx.save_for_backward(h, log_decay, place, left)
        return h

    @staticmethod
    def backward(ctx, dh):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, log_decay, place, left = ctx.saved_tensors
        g = _doubled(dh.flip(1), log_decay.conj(), left.flip(0)).flip(1)
        before = torch.where((place == 0)[:, None], 0, h.roll(1, 1))
        return g, (g * (before * log_decay.exp()).conj()).sum((0, 1)), None, None


def _doubled(x: Tensor, log_decay: Tensor, place: Tensor) -> Tensor:
    exponent = log_decay.to(torch.complex128)  # its high powers lose no accuracy, and there are few of them
    h, shift = x, 1
    while shift < x.shape[1]:
        power = torch.exp(shift * exponent).to(x.dtype)
        reaches = (place[shift:] >= shift)[:, None]
        h = torch.cat((h[:, :shift], h[:, shift:] + torch.where(reaches, power, 0) * h[:, :-shift]), 1)
        shift *= 2
    return h
