"""The selective scan of complex A in Triton: plan and launches. The kernels: triton_complex_kernels.py.

As triton.py, but simpler: chunks are always run all at once, and no scratch is kept. States are saved twice as often,
as the backward reaches each group of steps from the saved state before it.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from ..sequences import checkpoint_slots, piece_numbers
from ..triton_runtime import ceil_div, sum_first_axis, with_rows
from .triton_complex_kernels import chunk_gradients, pass_states, scan_backward, scan_forward

CHUNK = 256  # steps that one program runs
EVERY = 16  # steps between saved states
_STEPS = 4  # of a group
_AHEAD = 8  # chunks whose states `pass_states` loads at once
_CHANNELS = 32  # of a program of `pass_states`


@cache
def _forward_tile(n_states: int, per_group: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_D, warps) of a program: one warp, so that no sum over states leaves it."""
    block_n = triton.next_power_of_2(n_states)
    return block_n, min(32, max(1, 512 // block_n), triton.next_power_of_2(per_group)), 1


@cache
def _backward_tile(n_states: int, per_group: int) -> tuple[int, int, int]:
    """128 pairs a warp, which registers hold. Of fewer channels there would be more shares of dB and dC."""
    block_n = triton.next_power_of_2(n_states)
    block_d = min(32, max(16 if block_n <= 64 else 8, 512 // block_n), triton.next_power_of_2(per_group))
    return block_n, block_d, min(16, max(1, block_n * block_d // 128))


def _pairs(x: Tensor | None) -> Tensor | None:
    """Real and imaginary parts side by side, contiguous, in float32."""
    return None if x is None else torch.view_as_real(x.to(torch.complex64).resolve_conj().contiguous())


def _planes(x: Tensor) -> Tensor:
    """(D, N) as (2, N, D), or (N, D) if real, in float32."""
    return (torch.stack((x.real, x.imag)) if x.is_complex() else x).float().mT.contiguous()


def _by_token(x: Tensor) -> Tensor:
    x = _pairs(x) if x.is_complex() else x.resolve_neg()
    return x if x.dim() == 4 else with_rows(x)


class _Problem:
    """Arguments of the kernels, and how many programs there are."""

    def __init__(self, tile, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse):
        self.n_tokens, n_channels = u.shape
        self.n_states, self.n_seqs = A.shape[1], batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.length = self.n_tokens // max(batch, 1)  # of each sequence; of all if packed
        self.several = self.length > CHUNK  # whether a sequence may have more than one chunk
        self.n_chunks = piece_numbers(self.n_tokens, self.n_seqs, CHUNK, packed=cu_seqlens is not None)
        per_group = n_channels // next((x.shape[1] for x in (B, C) if x.dim() == 3), 1)
        block_n, block_d, self.num_warps = tile(self.n_states, per_group)
        self.tiles_of_group = ceil_div(per_group, block_d)
        self.n_programs = self.n_chunks * (n_channels // per_group) * self.tiles_of_group
        self.of_chunks = self.n_chunks, 2, self.n_states, n_channels
        u, delta, z = (None if x is None else with_rows(x.resolve_neg()) for x in (u, delta, z))
        kinds = {"STATIC_B": B.dim() == 2, "STATIC_C": C.dim() == 2}
        kinds |= {"COMPLEX_B": B.is_complex(), "COMPLEX_C": C.is_complex()}
        B, C = (_planes(x) if x.dim() == 2 else _by_token(x) for x in (B, C))
        D, delta_bias, cu_seqlens = (None if x is None else x.contiguous() for x in (D, delta_bias, cu_seqlens))
        self.arguments = {
            **kinds, "u": u, "delta": delta, "A": _planes(A), "B": B, "C": C, "D": D, "z": z, "bias": delta_bias,
            "cu_seqlens": cu_seqlens, "length": self.length, "n_seqs": self.n_seqs, "zero": 0 if block_n > 1 else None,
            "u_stride": u.stride(0), "delta_stride": delta.stride(0), "z_stride": 0 if z is None else z.stride(0),
            "B_stride": B.stride(0), "B_group": B.stride(1), "C_stride": C.stride(0), "C_group": C.stride(1),
            "n_channels": n_channels, "per_group": per_group, "N": self.n_states, "BLOCK_N": block_n,
            "BLOCK_D": block_d, "SOFTPLUS": softplus, "REVERSE": reverse, "K": _STEPS, "CHUNK": CHUNK, "EVERY": EVERY,
        }  # fmt: skip

    def launch(self, kernel, **more) -> None:
        given = {name: x for name, x in self.arguments.items() if name in kernel.arg_names}
        kernel[(self.n_programs,)](**given, **more, num_warps=self.num_warps)

    def chunk_states(self) -> tuple[Tensor, Tensor]:
        """Room for a state, and for a sum of dt and what it lost, of each chunk."""
        on = self.arguments["u"].device
        return torch.empty(self.of_chunks, device=on), torch.empty(self.n_chunks, 2, self.of_chunks[3], device=on)

    def carry(self, own: Tensor, sums: Tensor, first: Tensor | None, *, backwards: bool) -> None:
        n_channels = self.of_chunks[3]
        pass_states[(self.n_seqs * self.n_states * ceil_div(n_channels, _CHANNELS),)](
            own, sums, self.arguments["A"], _pairs(first), self.arguments["cu_seqlens"], self.length, n_channels,
            self.n_states, BLOCK=_CHANNELS, AHEAD=_AHEAD, CHUNK=CHUNK, BACKWARDS=backwards, num_warps=1,
        )  # fmt: skip


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    on = u.device
    with torch.cuda.device_of(u):
        p = _Problem(_forward_tile, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
        y = torch.empty(u.shape, dtype=u.dtype, device=on)
        final = torch.empty(p.n_seqs, *A.shape, dtype=torch.complex64, device=on)
        shape = saved_shape(u.shape[0], p.n_seqs, *A.shape) if save else (0, *A.shape)
        saved = torch.empty(shape, dtype=torch.complex64, device=on)
        results = {"y": y, "final": torch.view_as_real(final), "saved": torch.view_as_real(saved) if save else None}
        entering = None
        if p.several or initial_state is not None:
            entering, sums = p.chunk_states()
            if p.several:
                nothing = dict.fromkeys(("entering", "y", "final", "saved"))
                p.launch(scan_forward, **nothing, own=entering, sums=sums, ENDS=True)
            p.carry(entering, sums, initial_state, backwards=False)
        p.launch(scan_forward, **results, entering=entering, own=None, sums=None, ENDS=False)
    return y, final, saved


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse
):
    on = u.device
    with torch.cuda.device_of(u):
        p = _Problem(_backward_tile, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
        dy = with_rows(dy.resolve_neg())
        du, ddelta, dz = (None if x is None else torch.empty(x.shape, dtype=x.dtype, device=on) for x in (u, delta, z))
        dh0 = None if initial_state is None else torch.empty(initial_state.shape, dtype=torch.complex64, device=on)
        own, sums = p.chunk_states()
        if p.several:
            p.launch(chunk_gradients, dy=dy, dy_stride=dy.stride(0), own=own, sums=sums)
        from_zero = not p.several and dfinal is None
        if not from_zero:
            p.carry(own, sums, dfinal, backwards=True)

        def share(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            parts = (2,) if x.is_complex() else ()
            if x.dim() == 3:
                return torch.empty(p.tiles_of_group, *parts, *x.shape, device=on)
            return torch.empty(p.n_chunks, *parts, *x.shape[::-1], device=on)

        shares = [share(x) for x in (B, C, D, delta_bias)]
        p.launch(
            scan_backward, dy=dy, dy_stride=dy.stride(0), saved=torch.view_as_real(saved), own=own, du=du,
            ddelta=ddelta, dB=shares[0], dC=shares[1], dD=shares[2], dz=dz, dbias=shares[3],
            dh0=None if dh0 is None else torch.view_as_real(dh0), n_tokens=p.n_tokens, FROM_ZERO=from_zero,
        )  # fmt: skip

        def total(x: Tensor | None, shares: Tensor | None) -> Tensor | None:
            if x is None or shares is None:
                return None
            found = sum_first_axis(shares) if len(shares) else shares.new_zeros(shares.shape[1:])
            found = torch.complex(*found) if x.is_complex() else found
            return found.mT if x.dim() == 2 else found  # (N, D) to (D, N)

        dB, dC, dD, dbias = (total(x, s) for x, s in zip((B, C, D, delta_bias), shares, strict=True))
        dA = total(A, own)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


def saved_shape(n_tokens: int, n_seqs: int, n_channels: int, n_states: int) -> tuple[int, int, int]:
    """Shape of the saved states that `forward` returns."""
    return checkpoint_slots(n_tokens, n_seqs, EVERY), n_states, n_channels
