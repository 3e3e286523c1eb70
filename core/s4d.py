"""S4D: a diagonal linear time-invariant state-space layer (arXiv 2206.11893).

    A = -exp(log_A_real) + i A_imag        zero-order hold: exp(dt A), (exp(dt A) - 1) / A, dt = exp(log_dt)
    y_t = 2 Re(C x_t) + D u_t              x of N complex numbers stands for 2N: each and its conjugate

The real kind has neither A_imag nor the factor 2. Parameter names are those of state-spaces/s4's models/s4/s4d.py; its
output_linear.0 is out_proj here. Letters: H channels, N states.
"""

import math

import torch
from torch import Tensor, nn

from .lti import Diagonal, LTIMixer, System, at_least_float32, dynamics, log_uniform


class S4D(LTIMixer):
    """(B, L, d_model) -> (B, L, d_model), causal. d_state counts real numbers: 64 are 32 complex ones, or 64 real."""

    def __init__(self, d_model: int, d_state: int = 64, *, is_complex: bool = True):
        """Initialisation: S4D-Lin, A_n = -1/2 + i pi n (S4D-Real, -(n + 1)); dt log-uniform in [1e-3, 1e-1]."""
        if is_complex and d_state % 2:
            raise ValueError(f"d_state is {d_state}; a complex S4D needs an even number")
        super().__init__(d_model, d_state)
        self.log_dt = dynamics(log_uniform(d_model))
        if is_complex:
            n = d_state // 2
            self.C = nn.Parameter(torch.randn(d_model, n, 2) / math.sqrt(2))
            self.log_A_real = dynamics(torch.full((d_model, n), math.log(0.5)))
            self.A_imag = dynamics((math.pi * torch.arange(n)).repeat(d_model, 1))
        else:
            self.C = nn.Parameter(torch.randn(d_model, d_state))
            self.log_A_real = dynamics(torch.arange(1, d_state + 1).log().repeat(d_model, 1))
            self.A_imag = None

    def system(self) -> System:
        dt = at_least_float32(self.log_dt).exp()[:, None]
        real, C = -at_least_float32(self.log_A_real).exp(), at_least_float32(self.C)
        if self.A_imag is None:
            A = Diagonal((dt * real).exp())
            return System(A, torch.expm1(dt * real) / real, C)
        eigenvalues = torch.complex(real, self.A_imag.to(real.dtype))
        B = _expm1(dt * eigenvalues) / eigenvalues
        return System(
            Diagonal((dt * eigenvalues).exp()),
            torch.cat((B.real, B.imag), -1),
            2 * torch.cat((C[..., 0], -C[..., 1]), -1),
        )


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 of complex z, without cancellation near 0."""
    growth, half = torch.expm1(z.real), torch.sin(z.imag / 2)
    return torch.complex(growth * torch.cos(z.imag) - 2 * half * half, (growth + 1) * torch.sin(z.imag))
