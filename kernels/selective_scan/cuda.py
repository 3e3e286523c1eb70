"""The selective scan in CUDA C++: plan and launches. The kernels: cuda_kernels/*.cu, compiled by ../nvrtc.py.

What Triton cannot say and this needs: which lane holds what, and sums by way of shared memory (SCAN_NOTES.md). It takes
real A with up to 64 states in float32, bfloat16 and float16 on Ampere and later; all else, and any machine where NVRTC
is missing or fails, goes to the Triton kernels, which read and write the same saved states.

A sequence is run in chunks of time as in Triton (triton_chunks.py): one after another in one warp, or all at
once. What a sequence's result is depends, to the bit, on nothing but that sequence and the parameters: chunks and
checkpoints have fixed places, the sums over states a fixed order. How many sequences there are decides who runs the
chunks and how many channels a lane takes; neither changes a bit. No atomics: shares, added up in order.
"""

import struct
import warnings
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nvrtc
from ..sequences import checkpoint_slots
from . import triton as fallback
from .triton import checkpoint_every, saved_shape

__all__ = ["backward", "forward", "saved_shape", "usable"]

CHUNK = 2048  # steps, at most
MOST_STATES = 64
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
_FOLDER = Path(__file__).parent / "cuda_kernels"
_POINTERS = (
    *("u", "delta", "z", "dy", "B", "C", "A", "D", "bias", "cu_seqlens", "first", "own", "sums", "share_A", "y"),
    *("final_state", "saved", "du", "ddelta", "dz", "dh0", "share_B", "share_C", "share_D", "share_bias"),
    *("dA", "dB", "dC", "dD", "dbias"),
)
_NUMBERS = (
    *("B_group", "C_group", "length", "n_tokens", "n_seqs", "n_channels", "per_group", "tiles_of_group", "n_chunks"),
    *("reverse", "backwards"),
)
_STRIDES = (
    *("u_stride", "delta_stride", "z_stride", "dy_stride", "B_stride", "C_stride", "U_stride", "DELTA_stride"),
    *("Z_stride", "share_stride"),
)
_FIELDS = (*_POINTERS, *_NUMBERS, *_STRIDES)  # of struct Problem in cuda_kernels/common.cu, in its order
_PACK = struct.Struct(f"{len(_POINTERS) + len(_NUMBERS)}q{len(_STRIDES)}i").pack
_ABSENT = dict.fromkeys(_FIELDS, 0)
_in_order = itemgetter(*_FIELDS)


def _chunk_steps(n_channels: int, n_states: int) -> int:
    """Where channels are few it takes chunks to fill a GPU; but of several the backward has a pass more to make."""
    if n_states == 1 or n_channels > 1024:
        return CHUNK
    return min(CHUNK, 1024 if n_channels > 512 else 512)


class Tile(NamedTuple):
    """How a warp's work is laid out: the macros of cuda_kernels/common.cu."""

    NL: int  # states of a lane
    S: int  # lanes of a channel
    CL: int  # channels of a lane
    T: int  # steps of a tile
    V: int  # channels of a lane where rows are shared out
    WARPS: int  # of a block
    MIN_BLOCKS: int = 1  # that a multiprocessor is to have room for
    AT_ONCE: int = 2  # steps whose states the forward computes together

    @property
    def channels(self) -> int:
        """Of a block."""
        return 32 // self.S * self.CL * self.WARPS


def _lanes(n_states: int) -> tuple[int, int]:
    """(states of a lane, lanes of a channel). It fixes the order of sums over states: by the number of states alone."""
    if n_states == 1:
        return 1, 1
    if n_states <= 32:
        return 4, 1 if n_states <= 4 else 2 if n_states <= 8 else 4 if n_states <= 16 else 8
    return 8, 8


def _forward_tile(n_states: int, rows: int, vector: int, processors: int) -> Tile:
    """rows: sequences (or chunks) times channels; what follows from it changes no bit of a result.

    Two channels to a lane read B and C half as often as one; one makes more warps where rows are few. Registers are
    kept to 128 where there are warps enough to use the room. Measured: benchmarks/SCAN_NOTES.md.
    """
    states, lanes = _lanes(n_states)
    if states == 1:
        return _narrow(vector, 4 if rows >= 1024 * processors else 2)
    if states == 8:
        return _fitting(states, lanes, 4, 8, vector, 4)
    if rows * lanes < 256 * processors:
        return _fitting(states, lanes, 1, 16, vector, 1)
    return _fitting(states, lanes, 2, 16, vector, 4)._replace(MIN_BLOCKS=4)


def _backward_tile(n_states: int, rows: int, vector: int, processors: int, room: int, gate: bool) -> Tile:
    """room: bytes of shared memory that a block may have.

    Channels of a lane and of a block fix the order in which dB and dC are summed: they do not follow from `rows`.
    """
    states, lanes = _lanes(n_states)
    if states == 1:
        return _narrow(vector, 3 if rows >= 1024 * processors and not gate else 2)
    # Of 4 warps the blocks take up to 145 KiB; with fewer than 4 lanes to a channel, too much for two to fit.
    warps = 4 if lanes >= 4 and room >= 160 * 1024 else 2
    return _fitting(states, lanes, 2, 4 if states == 8 else 8, vector, warps)


def _narrow(vector: int, blocks: int) -> Tile:
    """For one state: cuda_kernels/narrow_*.cu, whose warps share out time."""
    return Tile(1, 1, vector, 8, vector, 1, MIN_BLOCKS=blocks)


def _fitting(states: int, lanes: int, channels: int, steps: int, vector: int, warps: int) -> Tile:
    """A tile whose rows a warp can share out: at most 32 lanes to a row, and at most `steps` rows at once."""
    channels = min(channels, vector * lanes)
    while vector > 1 and channels * steps < lanes * vector:
        vector //= 2
    while channels * steps < lanes:
        channels *= 2
    return Tile(states, lanes, channels, steps, vector, warps)


@cache
def _source(kernel: str, macros: tuple[tuple[str, Any], ...]) -> str:
    parts = [f"#define {name} {value}" for name, value in macros]
    files = ("device", "numbers", "common", *(("backward_parts",) if kernel == "backward" else ()), kernel)
    parts += [(_FOLDER / f"{name}.cu").read_text() for name in files]
    return "\n".join(parts) + "\n"


@cache
def _function(kernel: str, name: str, device: int, macros: tuple[tuple[str, Any], ...]):
    return nvrtc.kernel(_source(kernel, macros), name, device)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _room(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


_broken: set[int] = set()  # devices on which NVRTC failed


def usable(device: int) -> bool:
    """Whether these kernels run on a CUDA device, as far as one can tell without compiling any."""
    return device not in _broken and _capable(device)


@cache
def _capable(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and nvrtc.loads()


def _serves(u: Tensor, *others: Tensor | None, n_states: int) -> bool:
    tensors = [x for x in (u, *others) if x is not None]
    return (
        0 < n_states <= MOST_STATES
        and u.numel() > 0
        and all(x.dtype in _TYPES for x in tensors)
        and all(abs(x.stride(0)) * x.element_size() < 2**31 for x in tensors)
        and usable(_device(u))
    )


def _device(x: Tensor) -> int:
    return x.get_device()


def _with_rows(x: Tensor, at_once: int = 1) -> Tensor:
    """x with a contiguous last dimension, of which `at_once` elements can be moved together."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    return x if _widest(at_once, x) == at_once else x.clone(memory_format=torch.contiguous_format)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _plain(x: Tensor | int | None) -> int:
    """As a kernel's argument."""
    return 0 if x is None else x if isinstance(x, int) else x.data_ptr()


def _widest(most: int, *tensors: Tensor) -> int:
    """Elements that may be moved at once: addresses and all strides but the last divide by it."""
    while most > 1 and any(
        x.data_ptr() % (most * x.element_size()) or any(s % most for s in x.stride()[:-1]) for x in tensors
    ):
        most //= 2
    return most


class _Problem:
    """Arguments of the kernels, and the macros that they are compiled with."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, dy=None):
        self.on = u.device
        self.device = _device(u)
        self.n_tokens, self.n_channels = u.shape
        self.n_states = A.shape[1]
        self.n_seqs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.length = self.n_tokens // max(batch, 1)  # of each sequence; of all if packed
        self.chunk = _chunk_steps(self.n_channels, self.n_states)
        self.several = self.length > self.chunk  # whether a sequence may have more than one chunk
        if cu_seqlens is None:
            self.n_chunks = batch * max(-(-self.length // self.chunk), 1)
        else:
            self.n_chunks = checkpoint_slots(self.n_tokens, self.n_seqs, self.chunk)
            cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
        groups = next((x.shape[1] for x in (B, C) if x.dim() == 3), 1)
        self.per_group = self.n_channels // groups
        A, D, delta_bias = _floats(A), _floats(D), _floats(delta_bias)
        # Not by the tensors' addresses: the order of sums would follow from them. They are copied if need be.
        self.vector = 2 if self.per_group % 2 == 0 else 1
        u, delta = _with_rows(u, self.vector), _with_rows(delta, self.vector)
        z, dy = (None if x is None else _with_rows(x, self.vector) for x in (z, dy))
        B, C = (_with_rows(x) if x.dim() == 3 else x.float().contiguous() for x in (B, C))
        self.kept = [u, delta, z, dy, A, B, C, D, delta_bias, cu_seqlens]  # until all is launched

        matrices = [x for x in (B, C) if x.dim() == 3]
        most = 16 // max((x.element_size() for x in matrices), default=4)
        while self.n_states % most:
            most //= 2
        self.every = checkpoint_every(self.n_states)
        self.macros = (
            ("N", self.n_states), ("VB", _widest(most, *matrices)), ("CHUNK", self.chunk), ("EVERY", self.every),
            ("SOFTPLUS", int(softplus)), ("GATE", int(z is not None)), ("STATIC_B", int(B.dim() == 2)),
            ("STATIC_C", int(C.dim() == 2)), ("U", _TYPES[u.dtype]), ("DELTA", _TYPES[delta.dtype]),
            ("Z", _TYPES[(u if z is None else z).dtype]), ("DY", _TYPES[(u if dy is None else dy).dtype]),
            ("MB", _TYPES[B.dtype]), ("MC", _TYPES[C.dtype]),
        )  # fmt: skip

        def step(x: Tensor | None, stride: int | None = None) -> int:
            """Bytes from a step's row to the next step's."""
            if x is None:
                return 0
            return (x.stride(0) if stride is None else stride) * x.element_size() * (-1 if reverse else 1)

        tensors = {
            "u": u, "delta": delta, "z": z, "dy": dy, "B": B, "C": C, "A": A, "D": D, "bias": delta_bias,
            "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        width = self.n_channels
        self.values = _ABSENT | {name: _plain(x) for name, x in tensors.items()} | {
            "B_group": B.stride(1), "C_group": C.stride(1), "length": self.length, "n_tokens": self.n_tokens,
            "n_seqs": self.n_seqs, "n_channels": width, "per_group": self.per_group, "n_chunks": self.n_chunks,
            "reverse": int(reverse), "u_stride": step(u), "delta_stride": step(delta), "z_stride": step(z),
            "dy_stride": step(dy), "B_stride": step(B), "C_stride": step(C), "U_stride": step(u, width),
            "DELTA_stride": step(delta, width), "Z_stride": step(z, width),
            "share_stride": 4 * groups * self.n_states * (-1 if reverse else 1),
        }  # fmt: skip

    def lay_out(self, tile: Tile) -> None:
        """Take this tile from here on."""
        self.tile = tile
        self.tiles_of_group = -(-self.per_group // tile.channels)
        self.n_tiles = self.n_channels // self.per_group * self.tiles_of_group
        self.values["tiles_of_group"] = self.tiles_of_group
        self.laid_out = (*self.macros, *zip(tile._fields, tile, strict=True))

    def launch_scan(self, direction: str, blocks: int, **more) -> None:
        """The forward or the backward: for one state a kernel of its own."""
        narrow = self.n_states == 1
        threads = 32 * (self.every // self.tile.T if narrow else self.tile.WARPS)
        self.launch(f"narrow_{direction}" if narrow else direction, f"scan_{direction}", blocks, threads, **more)

    def launch(self, source: str, name: str, blocks: int, threads: int, *, macros=(), **values) -> None:
        """values: further arguments, tensors or numbers; what is None is absent."""
        function = _function(source, name, self.device, (*self.laid_out, *macros))
        values = {**self.values, **{key: _plain(x) for key, x in values.items()}}
        function(blocks, threads, _PACK(*_in_order(values)))

    def chunk_states(self) -> tuple[Tensor, Tensor]:
        """Room for a state and a sum of dt of each chunk."""
        own = torch.empty(self.n_chunks, self.n_states, self.n_channels, device=self.on)
        return own, torch.empty(self.n_chunks, self.n_channels, device=self.on)

    def carry(self, own: Tensor, sums: Tensor, first: Tensor | None, *, backwards: bool) -> None:
        first = _floats(first)
        self.kept.append(first)
        blocks = -(-self.n_seqs * self.n_states * self.n_channels // 128)
        self.launch("carry", "carry", blocks, 128, own=own, sums=sums, first=first, backwards=int(backwards))


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save)
    if _serves(u, delta, B, C, z, n_states=A.shape[1]):
        with torch.cuda.device_of(u):
            try:
                return _forward(*arguments)
            except nvrtc.Unavailable as error:
                _give_up(_device(u), error)
    return fallback.forward(*arguments)


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse,
    dz=None,
):  # fmt: skip
    """dz: room for z's gradient, which may be some columns of a wider matrix."""
    arguments = (dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved)
    if _serves(u, delta, B, C, z, dy, n_states=A.shape[1]):
        with torch.cuda.device_of(u):
            try:
                return _backward(*arguments, softplus, reverse, dz)
            except nvrtc.Unavailable as error:
                _give_up(_device(u), error)
    return fallback.backward(*arguments, softplus, reverse, dz)


def _give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    warnings.warn(f"selective_scan runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=2)


def _forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save):
    p = _Problem(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = torch.empty(p.n_seqs, *A.shape, device=u.device)
    saved = torch.empty(saved_shape(u.shape[0], p.n_seqs, *A.shape) if save else (0, *A.shape), device=u.device)
    first = _floats(initial_state)
    processors = _processors(p.device)
    at_once = p.several and _at_once(p, processors)
    runs = p.n_chunks if at_once else p.n_seqs
    p.lay_out(_forward_tile(p.n_states, runs * p.n_channels, p.vector, processors))
    own = None
    if at_once:
        own, sums = p.chunk_states()
        macros = (("OWN", 0), ("ENDS", 1))
        p.launch_scan("forward", p.n_chunks * p.n_tiles, macros=macros, own=own, sums=sums)
        p.carry(own, sums, first, backwards=False)
    macros = (("OWN", int(p.several and not at_once)), ("ENDS", 0))
    results = {"y": y, "final_state": final, "saved": saved if save else None}
    p.launch_scan("forward", runs * p.n_tiles, macros=macros, own=own, first=first, **results)
    return y, final, saved


_ROWS_A_PROCESSOR = 40  # below these (sequence, channel) rows, chunks are run all at once: it takes each exp twice


def _at_once(p: _Problem, processors: int) -> bool:
    return p.n_seqs * p.n_channels < _ROWS_A_PROCESSOR * processors


def _backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse, room
):
    p = _Problem(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, dy)
    rows = p.n_chunks * p.n_channels
    chip = _processors(p.device), _room(p.device)
    p.lay_out(_backward_tile(p.n_states, rows, p.vector, *chip, z is not None))

    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    du, ddelta, dh0 = like(u), like(delta), like(initial_state, torch.float32)
    dz = like(z)
    if room is not None and _widest(p.vector, room) == p.vector:
        dz = room
        p.values["Z_stride"] = room.stride(0) * room.element_size() * (-1 if reverse else 1)
    dA, dD, dbias = (like(x, torch.float32) for x in (A, D, delta_bias))
    dB, dC = (like(x, torch.float32 if x.dim() == 2 else None) for x in (B, C))
    own, sums = p.chunk_states()
    parts = [p.tiles_of_group if x is not None and x.dim() == 3 else p.n_chunks for x in (B, C, D, delta_bias)]
    share_B, share_C, share_D, share_bias = (
        None if x is None else torch.empty(n, x.numel(), device=u.device)
        for n, x in zip(parts, (B, C, D, delta_bias), strict=True)
    )
    if p.several:
        tile = p.tile
        p.lay_out(_fitting(tile.NL, tile.S, tile.CL, 16, tile.V, tile.WARPS))
        name = "chunk_gradients"
        p.launch(name, name, p.n_chunks * p.n_tiles, 32 * tile.WARPS, own=own, sums=sums)
        p.lay_out(tile)
    from_zero = not p.several and dfinal is None
    if not from_zero:
        p.carry(own, sums, dfinal, backwards=True)
    shares = {"share_A": own, "share_B": share_B, "share_C": share_C, "share_D": share_D, "share_bias": share_bias}
    gradients = {"du": du, "ddelta": ddelta, "dz": dz, "dh0": dh0}
    entering = None if from_zero else own
    p.launch_scan("backward", p.n_chunks * p.n_tiles, own=entering, saved=saved, **shares, **gradients)
    blocks = sum(-(-x.numel() // 128) for x in (dA, dD, dbias, dB, dC) if x is not None)
    p.launch("sum_shares", "sum_shares", blocks, 128, **shares, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias)
    if room is not None and dz is not room:
        room.copy_(dz)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0
