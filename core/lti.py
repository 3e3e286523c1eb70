"""Linear time-invariant state-space mixers: what S4D (s4d.py) and S4 (s4.py) have in common.

    x_t = A x_{t-1} + B u_t      y_t = C x_t + D u_t      one such system for each channel, the same at every step
    out = GLU(out_proj(gelu(y)))

As nothing depends on the input, a whole sequence is a convolution with the kernel K_l = C A^l B, by FFT; a step is the
recurrence. Powers of A are made by squaring, for both the kernel and the states, so that the two forms compute with the
same A. The kernel of length L = a b is a product of two thin matrices, C A^(b i) and A^j B: memory grows with a + b.

Complex systems are written in real numbers: a state of N complex numbers is S = 2N real ones, real parts first.
Letters: B batch, L length, H channels (d_model), S real numbers of a channel's state.
"""

from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .padding import Padding, rolled

DYNAMICS_LR = 1e-3  # the most that A, B and the step sizes learn at (arXiv 2111.00396, appendix D.2)


class LTIState(NamedTuple):
    """What the mixer remembers of a sequence."""

    ssm: Tensor  # (B, H, S), float32 at least


class Transition(Protocol):
    """The matrices A of all channels."""

    def __call__(self, x: Tensor) -> Tensor:
        """A x of vectors (.., H, n, S), n of each channel."""
        ...

    def squared(self) -> "Transition": ...

    def transposed(self) -> "Transition": ...


class Diagonal(NamedTuple):
    """Diagonal A: real, or complex on states of twice as many real numbers."""

    entries: Tensor  # (H, N)

    def __call__(self, x: Tensor) -> Tensor:
        entries = self.entries[:, None]
        if not entries.is_complex():
            return entries * x
        real, imag = x.chunk(2, -1)
        a, b = entries.real, entries.imag
        return torch.cat((a * real - b * imag, b * real + a * imag), -1)

    def squared(self) -> "Diagonal":
        return Diagonal(self.entries * self.entries)

    def transposed(self) -> "Diagonal":
        return Diagonal(self.entries.conj())


class Dense(NamedTuple):
    """Any real A."""

    matrix: Tensor  # (H, S, S)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def squared(self) -> "Dense":
        return Dense(self.matrix @ self.matrix)

    def transposed(self) -> "Dense":
        return Dense(self.matrix.mT)


class System(NamedTuple):
    """The discrete system of each channel, in real numbers."""

    A: Transition
    B: Tensor  # (H, S)
    C: Tensor  # (H, S)


class Powers(NamedTuple):
    """What the kernel and the states of L steps are made of; b is a power of 2 near the root of L, and so is a."""

    columns: Tensor  # (H, b, S): A^j B
    rows: Tensor  # (H, a, S): C A^(b i)
    A_b: Transition  # A^b

    @classmethod
    def of(cls, system: System, length: int) -> "Powers":
        b = 1 << -(-max(length - 1, 0).bit_length() // 2)
        a = 1 << (-(-length // b) - 1).bit_length()
        A_b = system.A
        for _ in range(b.bit_length() - 1):
            A_b = A_b.squared()
        return cls(powers_on(system.A, system.B, b), powers_on(A_b.transposed(), system.C, a), A_b)

    def kernel(self, length: int) -> Tensor:
        """(H, L)."""
        return (self.rows @ self.columns.mT).flatten(-2)[..., :length]

    def free_response(self, A: Transition, state: Tensor, length: int) -> Tensor:
        """y (B, H, L) of a state (B, H, S) and no input."""
        after = powers_on(A, A(state.unsqueeze(-2)).squeeze(-2), self.columns.shape[1])
        return (self.rows @ after.mT).flatten(-2)[..., :length]

    def driven_state(self, u: Tensor) -> Tensor:
        """The state (B, H, S) after inputs (B, H, L), from rest."""
        (a, b), A_b = (self.rows.shape[1], self.columns.shape[1]), self.A_b
        blocks = F.pad(u, (a * b - u.shape[-1], 0)).unflatten(-1, (a, b))
        states = blocks @ self.columns.flip(1)  # of each block alone
        while states.shape[-2] > 1:
            states = A_b(states[..., 0::2, :]) + states[..., 1::2, :]
            A_b = A_b.squared()
        return states.squeeze(-2)


def powers_on(A: Transition, x: Tensor, n: int) -> Tensor:
    """x, A x, .., A^(n-1) x of vectors (.., H, S): (.., H, n, S). n is a power of 2."""
    columns = x.unsqueeze(-2)
    while columns.shape[-2] < n:
        columns = torch.cat((columns, A(columns)), -2)
        A = A.squared()
    return columns


def power_on(A: Transition, x: Tensor, n: Tensor, most: int) -> Tensor:
    """A^n x of vectors (B, H, S), for n (B,) of its own in each row, at most `most`."""
    x = x.unsqueeze(-2)
    for bit in range(most.bit_length()):
        x = torch.where((n >> bit & 1).bool()[:, None, None, None], A(x), x)
        A = A.squared()
    return x.squeeze(-2)


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """u (B, H, L), kernel (H, L) -> (B, H, L), by FFT."""
    length = u.shape[-1]
    n = 1 << max(2 * length - 1, 1).bit_length() - 1
    n = next(size for size in (n, n // 2 * 3, 2 * n) if size >= 2 * length - 1)  # of 2s and a 3: fast everywhere
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., :length]


class LTIMixer(nn.Module):
    """(B, L, d_model) -> (B, L, d_model), causal. Kinds give `system`, the discrete systems of their parameters."""

    projects_input = False  # it is mixed in full precision

    def __init__(self, d_model: int, n_numbers: int):
        super().__init__()
        self.n_numbers = n_numbers  # S
        self.D = nn.Parameter(torch.randn(d_model))
        self.D._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue] - read by optim.py
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self._kept: tuple[Any, System] | None = None  # for `step`

    def system(self) -> System:
        raise NotImplementedError

    def forward(
        self,
        hidden: Tensor,
        state: LTIState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LTIState]:
        """hidden (B, L, d_model) -> the same shape, or (that, state) iff return_state.

        cu_seqlens (S + 1,) is read by the host, so it cannot be compiled into one graph.
        """
        if cu_seqlens is None:
            y, after = self._mix(hidden, state, return_state)
        else:
            pieces = [
                self._mix(hidden[:, start:end], None if state is None else LTIState(state.ssm[i : i + 1]), return_state)
                for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))
            ]
            y = torch.cat([piece for piece, _ in pieces], 1)
            after = (
                LTIState(torch.cat([after.ssm for _, after in pieces if after is not None])) if return_state else None
            )
        y = self._out(y)
        return y if after is None else (y, after)

    def forward_padded(
        self, hidden: Tensor, padding: Padding, *, state: LTIState | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LTIState]:
        """`forward` of rows that hold padding."""
        places = torch.arange(hidden.shape[1], device=hidden.device)
        hidden = padding.moved_left(hidden).masked_fill((places >= padding.n_real[:, None])[..., None], 0)
        y, after = self._mix(hidden, state, return_state, padding.n_real)
        y = self._out(padding.moved_back(y))
        return y if after is None else (y, after)

    @torch.no_grad()
    def step(self, hidden: Tensor, state: LTIState) -> Tensor:
        """hidden (B, d_model) -> (B, d_model); `state` updated in place."""
        with _in_full_precision(hidden):
            A, B, C = self._kept_system()
            u = hidden.to(state.ssm.dtype)
            x = A(state.ssm.unsqueeze(-2)).squeeze(-2) + B * u[..., None]
            state.ssm.copy_(x)
            y = (C * x).sum(-1) + self.D * u
        return self._out(y.to(hidden.dtype))

    def init_state(self, batch_size: int, max_length: int | None = None) -> LTIState:
        """The state before the first token; it does not grow, whatever `max_length` is."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        return LTIState(self.D.new_zeros(batch_size, len(self.D), self.n_numbers, dtype=dtype))

    def _mix(
        self, hidden: Tensor, state: LTIState | None, return_state: bool, n_real: Tensor | None = None
    ) -> tuple[Tensor, LTIState | None]:
        """The systems' outputs (B, L, H). Of a row, what is after its n_real tokens is zero."""
        batch, length, _ = hidden.shape
        if length == 0:
            after = self.init_state(batch) if state is None else LTIState(state.ssm.clone())
            return hidden, after if return_state else None
        with _in_full_precision(hidden):
            system = self.system()
            powers = Powers.of(system, length)
            u = hidden.to(system.B.dtype).mT
            y = causal_convolution(u, powers.kernel(length)) + self.D[:, None] * u
            if state is not None:
                y = y + powers.free_response(system.A, state.ssm, length)
            after = None
            if return_state:
                # Tokens at the end of their rows, after zeros, which leave a system at rest where it is.
                after = powers.driven_state(u if n_real is None else rolled(u.mT, n_real).mT)
                if state is not None:
                    n = torch.full((batch,), length, device=u.device) if n_real is None else n_real
                    after = after + power_on(system.A, state.ssm, n, length)
        return y.mT.to(hidden.dtype), None if after is None else LTIState(after)

    def _out(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), dim=-1)

    def _kept_system(self) -> System:
        """`system`, made anew only when a parameter has changed."""
        key = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.system()
        return self._kept[1]


def dynamics(value: Tensor) -> nn.Parameter:
    """A parameter that shapes the system: it learns slowly, and nothing draws it to zero (see optim.py)."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    parameter._max_lr = DYNAMICS_LR  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def log_uniform(n: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """Logarithms of n step sizes."""
    bounds = torch.tensor([low, high]).log()
    return torch.lerp(bounds[0], bounds[1], torch.rand(n))


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
