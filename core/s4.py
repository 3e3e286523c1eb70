"""S4: a linear time-invariant state-space layer whose matrix is diagonal plus low rank (arXiv 2111.00396): SaShiMi's.

    A = diag(Lambda) - P P*                Lambda = -exp(A_real) - i A_imag; A contracts, whatever they are
    dA = (1 - dt/2 A)^-1 (1 + dt/2 A)      bilinear transform; dB = (1 - dt/2 A)^-1 dt B, dt = exp(inv_dt)
    y_t = 2 Re(C x_t) + D u_t              x of N complex numbers stands for 2N: each and its conjugate

Parameter names are those of state-spaces/s4's models/s4/s4.py without the axis of its 1 channel; its output_linear.0 is
out_proj here. Its kernel comes from FFT nodes by a Cauchy product, and what it learns as C is C (1 - dA^L) for one
length L. Here dA is written out as a real matrix: its powers are contractions, so that the kernel of any length can be
made of them directly, and C is C. `plain_C` turns the one into the other. Letters: H channels, N states.
"""

import copy

import torch
from torch import Tensor, nn

from .lti import Dense, LTIMixer, System, at_least_float32, dynamics, log_uniform


class S4(LTIMixer):
    """(B, L, d_model) -> (B, L, d_model), causal. d_state counts real numbers: 64 are 32 complex ones."""

    def __init__(self, d_model: int, d_state: int = 64):
        """Initialisation: HiPPO-LegS; dt log-uniform in [1e-3, 1e-1]."""
        if d_state % 2:
            raise ValueError(f"d_state is {d_state}; S4 needs an even number")
        super().__init__(d_model, d_state)
        eigenvalues, P, B = (x.to(torch.complex64).repeat(d_model, 1) for x in hippo_legs(d_state))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d_model, d_state // 2, dtype=torch.complex64)))
        self.inv_dt = dynamics(log_uniform(d_model))
        self.A_real = dynamics((-eigenvalues.real).log())
        self.A_imag = dynamics(-eigenvalues.imag)
        self.P = dynamics(torch.view_as_real(P))
        self.B = dynamics(torch.view_as_real(B))

    def system(self) -> System:
        dt = at_least_float32(self.inv_dt).exp()[:, None]
        P, B, C = (torch.view_as_complex(at_least_float32(x)) for x in (self.P, self.B, self.C))
        eigenvalues = torch.complex(-at_least_float32(self.A_real).exp(), -self.A_imag.to(dt.dtype))
        # (1 - dt/2 A)^-1 by the Sherman-Morrison formula; P* x of the whole state is 2 Re of that of its half.
        inverse = 1 / (1 - dt / 2 * eigenvalues)
        left, right = inverse * P, inverse.conj() * P
        scale = dt / (1 + dt * (P.conj() * left).real.sum(-1, keepdim=True))
        resolvent = _as_real_matrix(inverse) - (scale * _as_real(left))[:, :, None] * _as_real(right)[:, None]
        identity = torch.eye(self.n_numbers, dtype=dt.dtype, device=dt.device)
        dB = (resolvent @ _as_real(dt * B)[..., None]).squeeze(-1)
        return System(Dense(2 * resolvent - identity), dB, 2 * _as_real(C.conj()))


def plain_C(layer: S4, learnt: Tensor, length: int) -> Tensor:
    """C (H, N, 2) of what the official code learns for `length` steps: learnt = C (1 - dA^length). 0: it is C."""
    if length == 0:
        return learnt
    A = copy.deepcopy(layer).double().system().A
    assert isinstance(A, Dense)
    power = torch.linalg.matrix_power(A.matrix, length)
    identity = torch.eye(len(power[0]), dtype=power.dtype, device=power.device)
    row = _as_real(torch.view_as_complex(learnt.double()).conj())
    C = torch.linalg.solve((identity - power).mT, row)
    real, negative_imag = C.chunk(2, -1)
    return torch.stack((real, -negative_imag), -1).to(learnt.dtype)


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """(eigenvalues, P, B), complex128 (d_state / 2,) each, of HiPPO-LegS (arXiv 2008.07669) as diagonal plus rank one.

    With R_n = sqrt(2n + 1) the matrix -R R^T below the diagonal and -(n + 1) on it, plus R R^T / 2, is -1/2 plus a
    skew matrix, which a unitary basis makes diagonal. Of each pair of conjugates the one of negative angle is kept.
    """
    n = torch.arange(d_state, dtype=torch.float64)
    R = (2 * n + 1).sqrt()
    hippo = -(torch.outer(R, R).tril(-1) + torch.diag(n + 1))
    skew = hippo + torch.outer(R, R) / 2 + torch.eye(d_state) / 2
    angles, basis = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    angles, basis = angles[: d_state // 2], basis[:, : d_state // 2]
    eigenvalues = torch.complex(torch.full_like(angles, -0.5), angles)
    P, B = (basis.mH @ x.to(torch.complex128) for x in (R / 2**0.5, R))
    return eigenvalues, P, B


def _as_real(z: Tensor) -> Tensor:
    """(.., N) complex -> (.., 2N): real parts, then imaginary ones."""
    return torch.cat((z.real, z.imag), -1)


def _as_real_matrix(diagonal: Tensor) -> Tensor:
    """Complex diagonals (H, N) as matrices (H, 2N, 2N) on `_as_real` vectors."""
    real, imag = torch.diag_embed(diagonal.real), torch.diag_embed(diagonal.imag)
    return torch.cat((torch.cat((real, -imag), -1), torch.cat((imag, real), -1)), -2)
