"""The selective scan in Triton: plan and launches. The kernels: triton_forward.py, triton_backward.py.

A sequence is run in chunks of time (triton_chunks.py): by one program after another, or all at once. Nothing of size
(tokens, D, N) is stored: the forward keeps, for the backward, the state before every `checkpoint_every`-th step.

What a sequence's result is may depend on nothing but that sequence and the parameters, to the bit: so the tile and the
places of chunks and checkpoints follow from D, G and N alone. How many sequences there are only decides who runs the
chunks, which changes no bit.

No atomics: a program writes its own share of the gradients that channels or sequences have in common, and a second
kernel adds the shares in a fixed order.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from ..sequences import checkpoint_slots, piece_numbers
from ..triton_runtime import ceil_div, sum_blocks, terms_at_once, with_rows
from .triton_backward import chunk_gradients, scan_backward, sum_shares
from .triton_chunks import carry, prepare
from .triton_forward import chunk_ends, scan_forward

CHUNK = 256  # steps
_WARPS_A_SM = 12  # below these, the forward's chunks are run all at once
_TAIL = 4  # steps of a group where a sequence ends
_SCRATCH = 2**27  # bytes for the states of groups of all programs of one launch of the backward


def checkpoint_every(n_states: int) -> int:
    """Steps between saved states: of 32 states they take the room of a float32 (T, D) tensor."""
    return 32 if n_states <= 64 else 64


@cache
def _forward_tile(n_states: int, per_group: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_D, warps, steps of a group) of a program: 16 (state, channel) pairs a lane.

    32 where channels are many, which halves the loads of B and C: a fifth of the time at 2048 channels. One warp up to
    128 states, so that sums over states stay in it. Measured: benchmarks/SCAN_NOTES.md.
    """
    block_n = triton.next_power_of_2(n_states)
    wide = block_n == 1 or (block_n <= 16 and per_group >= 512)
    block_d = min(64 if wide else max(8, min(32, 512 // block_n)), triton.next_power_of_2(per_group))
    return block_n, block_d, max(1, block_n * block_d // 1024), 4 if block_n * block_d >= 1024 else 8


@cache
def _backward_tile(n_states: int, per_group: int) -> tuple[int, int, int, int]:
    """As the forward's; its groups are short, since a group's states and decays are kept in registers."""
    block_n = triton.next_power_of_2(n_states)
    block_d = min(64 if block_n == 1 else 16 if block_n > 64 else 32, triton.next_power_of_2(per_group))
    return block_n, block_d, max(1, block_n * block_d // 512), 2 if block_n > 32 else 4


@cache
def _names(kernel) -> tuple[str, ...]:
    return (*kernel.arg_names, "num_warps")


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _Problem:
    """Arguments of the kernels, and how many programs there are.

    The forward and the backward give A and static B, C as (N, D), a step as (D, N).
    """

    def __init__(self, tile, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse):
        self.n_tokens, self.n_channels = u.shape
        self.n_states = A.numel() // self.n_channels
        self.n_seqs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.length = self.n_tokens // max(batch, 1)  # of each sequence; of all if packed
        self.several = self.length > CHUNK  # whether a sequence may have more than one chunk
        per_group = self.n_channels // next((x.shape[1] for x in (B, C) if x.dim() == 3), 1)
        self.block_n, self.block_d, self.num_warps, self.steps = tile(self.n_states, per_group)
        self.tiles_of_group = ceil_div(per_group, self.block_d)
        self.n_tiles = self.n_channels // per_group * self.tiles_of_group
        self.n_chunks = piece_numbers(self.n_tokens, self.n_seqs, CHUNK, packed=cu_seqlens is not None)
        self.every = checkpoint_every(self.n_states)
        u, delta, z = (None if x is None else with_rows(x) for x in (u, delta, z))
        self.arguments = {
            "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": _contiguous(D), "z": z,
            "bias": _contiguous(delta_bias), "cu_seqlens": _contiguous(cu_seqlens),
            "length": self.length, "n_seqs": self.n_seqs, "n_channels": self.n_channels, "per_group": per_group,
            "u_stride": u.stride(0), "delta_stride": delta.stride(0), "z_stride": 0 if z is None else z.stride(0),
            "B_stride": B.stride(0), "B_group": B.stride(1), "C_stride": C.stride(0), "C_group": C.stride(1),
            "N": self.n_states, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "STATIC_B": B.dim() == 2,
            "STATIC_C": C.dim() == 2, "SOFTPLUS": softplus, "REVERSE": reverse, "CHUNK": CHUNK,
            "num_warps": self.num_warps, "zero": 0 if self.block_n > 1 else None,
        }  # fmt: skip

    def of(self, kernel, **more) -> dict:
        """Those of the arguments that a kernel takes, and `more`."""
        return {name: self.arguments[name] for name in _names(kernel) if name in self.arguments} | more

    def chunk_states(self) -> tuple[Tensor, Tensor]:
        """Room for a state and a sum of dt of each chunk."""
        own = torch.empty(self.n_chunks, self.n_states, self.n_channels, device=self.arguments["u"].device)
        return own, torch.empty(self.n_chunks, self.n_channels, device=self.arguments["u"].device)

    def carry(self, own: Tensor, sums: Tensor, first: Tensor | None, *, backwards: bool) -> None:
        cu_seqlens = self.arguments["cu_seqlens"]
        carry(
            own, sums, self.arguments["A"], _contiguous(first), cu_seqlens, self.length, self.n_seqs, CHUNK,
            backwards=backwards,
        )  # fmt: skip


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    with torch.cuda.device_of(u):
        ready = prepare(A, B, C)
        p = _Problem(_forward_tile, u, delta, *ready, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        final = torch.empty(p.n_seqs, *A.shape, device=u.device)
        saved = torch.empty(saved_shape(u.shape[0], p.n_seqs, *A.shape) if save else (0, *A.shape), device=u.device)
        at_once = p.several and p.n_seqs * p.n_tiles * p.num_warps < _WARPS_A_SM * _multiprocessors(u.device)
        entering = h0 = None
        if at_once:
            entering, sums = p.chunk_states()
            chunk_ends[(p.n_chunks * p.n_tiles,)](**p.of(chunk_ends, own=entering, sums=sums, K=p.steps))
            p.carry(entering, sums, initial_state, backwards=False)
        elif initial_state is not None:
            h0 = initial_state.contiguous()
        scan_forward[((p.n_chunks if at_once else p.n_seqs) * p.n_tiles,)](
            **p.of(
                scan_forward, h0=h0, entering=entering, y=y, final=final, saved=saved if save else None,
                N_STRIDE=p.n_channels, D_STRIDE=1, K=p.steps, TAIL=_TAIL, EVERY=p.every,
                OWN=p.several and not at_once,
            )
        )  # fmt: skip
    return y, final, saved


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse,
    dz=None,
):  # fmt: skip
    """dz: room for z's gradient, which may be some columns of a wider matrix."""
    room = dz
    with torch.cuda.device_of(u):
        p = _Problem(
            _backward_tile, u, delta, *prepare(A, B, C), D, z, delta_bias, cu_seqlens, batch, softplus, reverse
        )
        du, ddelta, dA, dB, dC, dD, dz, dbias, dh0 = (
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
        )
        own, sums = p.chunk_states()
        parts = [p.tiles_of_group if x is not None and x.dim() == 3 else p.n_chunks for x in (B, C, D, delta_bias)]
        shares = [
            None if x is None else torch.empty(n, x.numel(), device=u.device)
            for n, x in zip(parts, (B, C, D, delta_bias), strict=True)
        ]
        dy = with_rows(dy)
        if p.several:
            chunk_gradients[(p.n_chunks * p.n_tiles,)](
                **p.of(chunk_gradients, dy=dy, dy_stride=dy.stride(0), own=own, sums=sums, K=8)
            )
        from_zero = not p.several and dfinal is None
        if not from_zero:
            p.carry(own, sums, dfinal, backwards=True)
        _launch_backward(p, dy, saved, own, from_zero, *shares, du, ddelta, dz, dh0)
        blocks = sum_blocks(dA.numel(), p.n_chunks)
        blocks += sum(sum_blocks(x.shape[1], n) for n, x in zip(parts, shares, strict=True) if x is not None)
        sum_shares[(blocks,)](
            **p.of(
                sum_shares, own=own, share_B=shares[0], share_C=shares[1], share_D=shares[2], share_bias=shares[3],
                dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias, n_chunks=p.n_chunks, n_tokens=p.n_tokens, num_warps=4,
                CHUNK_TERMS=terms_at_once(p.n_chunks), TILE_TERMS=terms_at_once(p.tiles_of_group),
            )
        )  # fmt: skip
        if room is not None:
            room.copy_(dz)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


def _launch_backward(p, dy, saved, own, from_zero, share_B, share_C, share_D, share_bias, du, ddelta, dz, dh0):
    """`scan_backward` on all programs, by as many at a time as _SCRATCH allows."""
    n_programs = p.n_chunks * p.n_tiles
    states = (p.every // p.steps - 1) * p.block_n * p.block_d  # that a program leaves in its scratch
    most = min(n_programs, _SCRATCH // (4 * states))
    scratch = torch.empty(most, states, device=dy.device)
    for first in range(0, n_programs, max(most, 1)):
        scan_backward[(min(n_programs - first, most),)](
            **p.of(
                scan_backward, dy=dy, dy_stride=dy.stride(0), saved=saved, scratch=scratch, own=own,
                du=du, ddelta=ddelta, dB=share_B, dC=share_C, dD=share_D, dz=dz, dbias=share_bias, dh0=dh0,
                n_tokens=p.n_tokens, first_program=first, K=p.steps, EVERY=p.every, FROM_ZERO=from_zero,
            )
        )  # fmt: skip


def step(state, u, delta, A, B, C, D, z, delta_bias, softplus):
    """A batch of sequences of one token each, their final state written over the initial one."""
    h = state.contiguous()
    with torch.cuda.device_of(u):
        A, B, C = (x.contiguous() if x.dim() == 2 else with_rows(x) for x in (A, B, C))
        p = _Problem(_forward_tile, u, delta, A, B, C, D, z, delta_bias, None, u.shape[0], softplus, False)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        scan_forward[(p.n_seqs * p.n_tiles,)](
            **p.of(
                scan_forward, h0=h, entering=None, y=y, final=h, saved=None, N_STRIDE=1, D_STRIDE=p.n_states, K=1,
                TAIL=1, EVERY=p.every, OWN=False,
            )
        )  # fmt: skip
    if h is not state:
        state.copy_(h)
    return y


def saved_shape(n_tokens: int, n_seqs: int, n_channels: int, n_states: int) -> tuple[int, int, int]:
    """Shape of the saved states that `forward` returns."""
    return checkpoint_slots(n_tokens, n_seqs, checkpoint_every(n_states)), n_states, n_channels
