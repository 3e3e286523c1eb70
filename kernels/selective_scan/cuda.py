"""The selective scan in CUDA C++: plan and launches. The kernels: cuda_kernels/*.cu, compiled by ../nvrtc.py.

What Triton cannot say and this needs: which lane holds what, and sums by way of shared memory (SCAN_NOTES.md). It takes
real A with up to 64 states in float32, bfloat16 and float16 on Ampere and later; all else, and any machine where NVRTC
is missing or fails, goes to the Triton kernels, which read and write the same saved states.

A sequence is run in chunks of time as in Triton (triton_chunks.py): one after another in one warp or pair of warps, or
all at once. What a sequence's result is depends, to the bit, on nothing but that sequence and the parameters: chunks,
their parts and checkpoints have fixed places, the sums over states a fixed order. How many sequences there are decides
who runs the chunks and how many channels a lane takes; neither changes a bit. No atomics: shares, added up in order.
"""

import struct
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nvrtc
from ..sequences import checkpoint_slots
from . import cuda_tiles as tiles
from . import triton as fallback
from .cuda_tiles import Layout, Tile
from .triton import checkpoint_every, saved_shape

__all__ = ["backward", "forward", "saved_shape", "usable"]

MOST_STATES = 64
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
_FOLDER = Path(__file__).parent / "cuda_kernels"
_POINTERS = (
    *("u", "delta", "z", "dy", "B", "C", "A", "D", "bias", "cu_seqlens", "first", "own", "sums", "entering", "share_A"),
    *("y", "final_state", "saved", "du", "ddelta", "dz", "dh0", "share_B", "share_C", "share_D", "share_bias"),
    *("dA", "dB", "dC", "dD", "dbias"),
)
_NUMBERS = (
    *("B_group", "C_group", "length", "n_tokens", "n_seqs", "n_channels", "per_group", "tiles_of_group", "n_tiles"),
    *("n_units", "reverse", "backwards"),
)
_STRIDES = (
    *("u_stride", "delta_stride", "z_stride", "dy_stride", "B_stride", "C_stride", "U_stride", "DELTA_stride"),
    *("Z_stride", "share_stride"),
)
# struct Problem of cuda_kernels/common.cu: pointers, which change from call to call, then what a plan knows.
_pack_pointers = struct.Struct(f"{len(_POINTERS)}q").pack
_pack_numbers = struct.Struct(f"{len(_NUMBERS)}q{len(_STRIDES)}i").pack


def _chunk_and_unit(n_channels: int, n_states: int) -> tuple[int, int]:
    """Steps of a chunk, and of a unit: of a share of dA, dD and dbias, and of what a block of the backward walks where
    blocks are few.

    Where channels are few it takes chunks to fill a GPU; but of several the backward has a pass more to make. Chunks of
    512 steps are units themselves: two units in each made a backward with many of them 9 % slower.
    """
    if n_states == 1:  # a chunk is a unit: the narrow kernels' warps share out time already
        return (4096, 4096) if n_channels > 512 else (2048, 2048)
    if n_channels > 512:
        return 2048 if n_channels > 1024 else 1024, 256
    return 512, 512


@cache
def _source(kernel: str, macros: tuple[tuple[str, Any], ...]) -> str:
    backwards = kernel in ("backward", "chunk_gradients", "sum_shares")
    macros = (*macros, ("BACKWARDS", int(backwards)), ("FORWARD", int(kernel == "forward")))
    parts = [f"#define {name} {value}" for name, value in macros]
    parts_of = {"backward": "backward_parts", "forward": "forward_parts", "forward_pairs": "forward_parts"}
    files = ("device", "numbers", "common", *([parts_of[kernel]] if kernel in parts_of else []), kernel)
    parts += [(_FOLDER / f"{name}.cu").read_text() for name in files]
    return "\n".join(parts) + "\n"


@cache
def _function(kernel: str, name: str, device: int, macros: tuple[tuple[str, Any], ...]):
    return nvrtc.kernel(_source(kernel, macros), name, device)


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
        and u.shape[0] < 2**31
        and all(x.dtype in _TYPES for x in tensors)
        and all(abs(x.stride(0)) * x.element_size() < 2**31 for x in tensors)
        and usable(_device(u))
    )


def _device(x: Tensor) -> int:
    return x.get_device()


def _with_rows(x: Tensor, at_once: int = 1) -> Tensor:
    """x with a contiguous last dimension, of which `at_once` elements can be moved together."""
    in_rows = x.shape[-1] <= 1 or x.stride(-1) == 1
    return x if in_rows and _widest(at_once, x) == at_once else x.clone(memory_format=torch.contiguous_format)


def _floats(x: Tensor | None) -> Tensor | None:
    """As rows of float32, of which 16 bytes can be moved at once."""
    if x is None:
        return None
    x = x.float().contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _widest(most: int, *tensors: Tensor) -> int:
    """Elements, a power of 2 up to `most`, that may be moved at once: addresses and all strides but the last divide."""
    for x in tensors:
        size, bits = x.element_size(), x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= stride * size
        most = min(most, (bits & -bits) // size or most)
    return most


def _pointers(**tensors: Tensor | int | None) -> bytes:
    """The kernels' pointers, tensors or addresses; what is absent or None is null."""
    get = tensors.get
    return _pack_pointers(*[x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in map(get, _POINTERS)])


def _ready(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, dy=None):
    """(The inputs as the kernels take them, by name; their layout)."""
    n_channels, n_states = A.shape
    static = B.dim() == 2, C.dim() == 2
    groups = C.shape[1] if static[0] and not static[1] else 1 if static[0] else B.shape[1]
    # Not by the tensors' addresses: the order of sums would follow from them. They are copied if need be.
    vector = 1 if n_channels // groups % 2 else 2
    u, delta = _with_rows(u, vector), _with_rows(delta, vector)
    z, dy = (None if x is None else _with_rows(x, vector) for x in (z, dy))
    B, C = (_floats(x) if x.dim() == 2 else _with_rows(x) for x in (B, C))
    matrices = [x for x in (B, C) if x.dim() == 3]
    most = 16 // max((x.element_size() for x in matrices), default=4)
    n_seqs = batch
    if cu_seqlens is not None:
        n_seqs = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    rows = u, delta, u if z is None else z, u if dy is None else dy, B, C
    layout = Layout(
        _device(u), u.shape[0], n_channels, n_states, n_seqs, batch, cu_seqlens is not None, groups, vector,
        _widest(min(most, n_states & -n_states), *matrices), static, tuple([x.dtype for x in rows]),
        tuple([x.stride(0) * x.element_size() for x in rows]), n_channels * u.element_size(),
        n_channels * delta.element_size(), n_channels * rows[2].element_size(),
        (B.stride(1), C.stride(1)), softplus, reverse, z is not None,
    )  # fmt: skip
    tensors = {
        "u": u, "delta": delta, "z": z, "dy": dy, "B": B, "C": C, "A": _floats(A), "D": _floats(D),
        "bias": _floats(delta_bias), "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    return tensors, layout


class _Launch(NamedTuple):
    function: Callable[[int, int, bytes], None]
    blocks: int
    threads: int
    numbers: bytes

    def __call__(self, pointers: bytes) -> None:
        self.function(self.blocks, self.threads, pointers + self.numbers)


class _Plan:
    """What is launched for a layout, how often, and with what numbers: all but addresses."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.processors = nvrtc.processors(layout.device)
        self.length = layout.n_tokens // max(layout.batch, 1)  # of each sequence; of all if packed
        self.chunk, self.unit = _chunk_and_unit(layout.n_channels, layout.n_states)
        self.several = self.length > self.chunk  # whether a sequence may have more than one chunk
        self.span = self.chunk  # steps that a block of the backward walks
        self.part = self.chunk  # steps that are run from 0, to find what enters chunks
        self.n_chunks, self.n_units = self.pieces(self.chunk), self.pieces(self.unit)
        self.every = checkpoint_every(layout.n_states)
        self.states = self.n_chunks * layout.n_states * layout.n_channels  # of all chunks
        self.launches: list[_Launch] = []
        self.at_once = False  # whether the forward runs the chunks of a sequence at once
        self.offsets: list[int] = []  # of the parts of the backward's scratch memory, and its size: floats

    def pieces(self, steps: int) -> int:
        """How many numbers pieces of time have, all sequences together."""
        if self.layout.packed:
            return checkpoint_slots(self.layout.n_tokens, self.layout.n_seqs, steps)
        return self.layout.batch * max(-(-self.length // steps), 1)

    def lay_out(self, tile: Tile) -> None:
        """Take this tile from here on."""
        self.tile = tile
        self.tiles_of_group = -(-self.layout.n_channels // self.layout.groups // tile.channels)
        self.n_tiles = self.layout.groups * self.tiles_of_group

    def scan(self, direction: str, blocks: int, *macros: tuple[str, int], pairs: bool = False) -> None:
        """The forward or the backward: for one state a kernel of its own. pairs: the forward in pairs of warps."""
        narrow = self.layout.n_states == 1
        source = f"narrow_{direction}" if narrow else "forward_pairs" if pairs else direction
        warps = self.every // self.tile.T if narrow else self.tile.WARPS * (1 + pairs)
        self.add(source, f"scan_{direction}", blocks, 32 * warps, *macros)

    def carry(self, *, backwards: bool) -> None:
        blocks = -(-self.layout.n_seqs * self.layout.n_states * self.layout.n_channels // 128)
        self.add("carry", "carry", blocks, 128, backwards=backwards)

    def add(
        self, source: str, name: str, blocks: int, threads: int, *macros: tuple[str, int], backwards: bool = False
    ) -> None:
        on = self.layout
        types = zip(("U", "DELTA", "Z", "DY", "MB", "MC"), (_TYPES[t] for t in on.types), strict=True)
        # Rows that are turned into floats: 4 elements at a time meet each bank of shared memory once.
        floats = source.startswith(("forward", "backward")) or (source == "chunk_gradients" and on.n_states <= 32)
        matrix_vector = min(on.matrix_vector, 4) if floats else on.matrix_vector
        all_macros = (
            ("N", on.n_states), ("VB", matrix_vector), ("CHUNK", self.chunk), ("UNIT", self.unit),
            ("PART", self.part), ("SPAN", self.span), ("EVERY", self.every),
            ("ENTERING", self.part if self.span == self.chunk else self.span),
            ("SOFTPLUS", int(on.softplus)), ("GATE", int(on.gate)),
            ("STATIC_B", int(on.static[0])), ("STATIC_C", int(on.static[1])), *types,
            *zip(self.tile._fields, self.tile, strict=True), *macros,
        )  # fmt: skip
        strides = (*on.strides, on.y_stride, on.ddelta_stride, on.dz_stride, 4 * on.groups * on.n_states)
        numbers = _pack_numbers(
            *on.group_strides, self.length, on.n_tokens, on.n_seqs, on.n_channels, on.n_channels // on.groups,
            self.tiles_of_group, self.n_tiles, self.n_units, int(on.reverse), int(backwards),
            *(-x if on.reverse else x for x in strides),
        )  # fmt: skip
        self.launches.append(_Launch(_function(source, name, on.device, all_macros), blocks, threads, numbers))


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save, y=None):
    """y: room for the result, which may be some columns of a wider matrix."""
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save)
    if _serves(u, delta, B, C, z, n_states=A.shape[1]):
        with torch.cuda.device_of(u):
            try:
                return _forward(*arguments, y)
            except nvrtc.Unavailable as error:
                _give_up(_device(u), error)
    found, *others = fallback.forward(*arguments)
    return (found if y is None else y.copy_(found)), *others


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse,
    dz=None, du=None, ddelta=None,
):  # fmt: skip
    """dz: room for z's gradient, which may be some columns of a wider matrix.

    du, ddelta: room that those gradients may take: dy's and delta's own will do. In `scan_backward` one lane alone
    reads an element of these, before it writes the gradient there.
    """
    arguments = (dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved)
    if _serves(u, delta, B, C, z, dy, n_states=A.shape[1]):
        with torch.cuda.device_of(u):
            try:
                return _backward(*arguments, softplus, reverse, dz, du, ddelta)
            except nvrtc.Unavailable as error:
                _give_up(_device(u), error)
    return fallback.backward(*arguments, softplus, reverse, dz)


def _give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    warnings.warn(f"selective_scan runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=2)


_PART = 512  # most steps of a chunk that are run from 0 at once, to find the gradients that enter chunks
_FEW_TERMS = 8  # of a sum of shares: up to these one thread adds up all of them
_BLOCKS_A_PROCESSOR = 1.25  # up to these of the backward, each walks a unit, not a chunk, which takes one pass more
# Below these (sequence, channel) rows, chunks are run all at once, which takes each exp twice; half as many count where
# pairs of warps may walk them (`_at_once`).
_ROWS_A_PROCESSOR = 40


def _at_once(p: _Plan) -> bool:
    """Whether the forward runs the chunks of a sequence at once, where it may have several.

    Pairs that walk take about as long for a step whether a multiprocessor has 8 rows or 24. A step of all chunks takes
    as long as the fullest multiprocessor does: with 20 rows a chunk of a sequence as long as those walk them. With
    fewer than 48 rows it is no faster. Of packed sequences the host does not know how long they are: there it is rows
    alone.
    """
    layout, rows = p.layout, p.layout.n_seqs * p.layout.n_channels
    if not tiles.in_pairs(layout):
        return rows < _ROWS_A_PROCESSOR * p.processors
    if layout.packed:
        return rows < _ROWS_A_PROCESSOR // 2 * p.processors
    p.lay_out(tiles.run_tile(layout, p.n_chunks, False, p.processors)[0])
    fullest = -(-p.n_chunks * p.n_tiles // p.processors) * p.tile.channels
    return max(fullest, 48) * layout.n_seqs <= _ROWS_A_PROCESSOR // 2 * p.n_chunks


@lru_cache(maxsize=1024)
def _forward_plan(layout: Layout, by_four: bool) -> _Plan:
    """by_four: whether four channels of a row may be moved at once."""
    p = _Plan(layout)
    p.at_once = p.several and _at_once(p)
    if p.at_once:
        p.lay_out(tiles.forward_tile(layout.n_states, p.n_chunks * layout.n_channels, layout.vector, p.processors))
        p.scan("forward", p.n_chunks * p.n_tiles, ("OWN", 0), ("ENDS", 1))
        p.carry(backwards=False)
    walked = p.several and not p.at_once
    runs = p.n_chunks if p.at_once else layout.n_seqs
    tile, pairs = tiles.run_tile(layout, runs, walked, p.processors, by_four)
    p.lay_out(tile)
    p.scan("forward", runs * p.n_tiles, ("OWN", int(walked)), ("ENDS", 0), pairs=pairs)
    return p


def _forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save, room):
    tensors, layout = _ready(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
    on = u.device
    y = None if room is None or _widest(layout.vector, room) < layout.vector else room
    if y is None:
        y = torch.empty(u.shape, dtype=u.dtype, device=on)
    else:
        layout = layout._replace(y_stride=y.stride(0) * y.element_size())
    by_four = tiles.moves_by_four(layout)
    if by_four:
        rows = (tensors["u"], tensors["delta"], y, *([] if z is None else [tensors["z"]]))
        by_four = _widest(4, *rows) == 4
    p = _forward_plan(layout, by_four)
    final = torch.empty(layout.n_seqs, *A.shape, device=on)
    saved = torch.empty(saved_shape(u.shape[0], layout.n_seqs, *A.shape) if save else (0, *A.shape), device=on)
    first = _floats(initial_state)
    scratch, own, sums = None, None, None
    if p.at_once:  # a state and a sum of dt of each chunk
        scratch = torch.empty(p.states + p.n_chunks * layout.n_channels, device=on)
        own = scratch.data_ptr()
        sums = own + 4 * p.states
    results = {"y": y, "final_state": final, "saved": saved if save else None}
    pointers = _pointers(**tensors, **results, first=first, own=own, sums=sums)
    for launch in p.launches:
        launch(pointers)
    return (y if room is None or y is room else room.copy_(y)), final, saved


@lru_cache(maxsize=1024)
def _backward_plan(layout: Layout, from_zero: bool, has_D: bool, has_bias: bool) -> _Plan:
    """from_zero: no gradient enters a chunk."""
    p = _Plan(layout)
    states, width = layout.n_states, layout.n_channels
    if states > 1:
        p.part = min(p.chunk, _PART)
    n_parts = p.pieces(p.part)
    rows, room = p.n_chunks * width, _room(layout.device)
    tile = tiles.backward_tile(states, rows, layout.vector, p.processors, room, layout.gate)
    if p.several:
        p.lay_out(tiles.parts_tile(layout, tile))
        p.add("chunk_gradients", "chunk_gradients", n_parts * p.n_tiles, 32 * p.tile.WARPS, ("SPANS", 0))
    p.lay_out(tile)
    if not from_zero:
        p.carry(backwards=True)
    if p.unit < min(p.length, p.chunk) and p.n_chunks * p.n_tiles <= _BLOCKS_A_PROCESSOR * p.processors:
        p.span = p.unit
        p.lay_out(tiles.walking_tile(layout, p.n_chunks, p.processors))
        p.add("chunk_gradients", "chunk_gradients", p.n_chunks * p.n_tiles, 32 * p.tile.WARPS, ("SPANS", 1))
        p.lay_out(tile)
    n_spans = p.pieces(p.span)
    p.scan("backward", n_spans * p.n_tiles)
    of_matrix = [width * states if static else layout.n_tokens * layout.groups * states for static in layout.static]
    # Numbers that a block of sum_shares adds up: of tokens a thread does as many as lie together.
    slices, unit_slices = (8 if terms > _FEW_TERMS else 1 for terms in (p.tiles_of_group, p.n_units))
    of_tokens, of_unit = 256 // slices * min(states & -states, 4), 256 // unit_slices
    sizes = [(n, of_unit if s else of_tokens) for n, s in zip(of_matrix, layout.static, strict=True)]
    sizes += [(width * states, of_unit), *[(width, of_unit)] * (has_D + has_bias)]
    blocks = sum(-(-n // at_once) for n, at_once in sizes)
    p.add("sum_shares", "sum_shares", blocks, 256, ("SLICES", slices), ("UNIT_SLICES", unit_slices))
    # Where things lie in the scratch memory, in floats: what chunks and spans do and meet, then the shares.
    terms = [p.n_units if static else p.tiles_of_group for static in layout.static]
    of_units = p.n_units * width
    of_parts = n_parts * width
    parts = (
        0 if from_zero else of_parts * states, of_parts, n_spans * width * states if p.span < p.chunk else 0,
        of_units * states, of_units, of_units,
        *(n * of for n, of in zip(terms, of_matrix, strict=True)),
    )  # fmt: skip
    p.offsets = [0, *accumulate(-(-n // 4) * 4 for n in parts)]
    return p


def _backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse, room,
    du, ddelta,
):  # fmt: skip
    tensors, layout = _ready(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, dy)
    dz, du, ddelta = (
        None if x is None or x.dtype != of.dtype or _widest(layout.vector, x) < layout.vector else x
        for x, of in ((room, z), (du, u), (ddelta, delta))
    )
    strides = {"dz_stride": dz, "y_stride": du, "ddelta_stride": ddelta}
    layout = layout._replace(**{name: x.stride(0) * x.element_size() for name, x in strides.items() if x is not None})
    several = u.shape[0] // max(batch, 1) > _chunk_and_unit(layout.n_channels, layout.n_states)[0]
    from_zero = dfinal is None and not several
    p = _backward_plan(layout, from_zero, D is not None, delta_bias is not None)

    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    gradients = {
        "du": like(u) if du is None else du, "ddelta": like(delta) if ddelta is None else ddelta,
        "dz": like(z) if dz is None else dz,
        "dh0": like(initial_state, torch.float32),
        "dA": like(A, torch.float32), "dD": like(D, torch.float32), "dbias": like(delta_bias, torch.float32),
        "dB": like(B, torch.float32 if layout.static[0] else None),
        "dC": like(C, torch.float32 if layout.static[1] else None),
    }  # fmt: skip
    scratch = torch.empty(p.offsets[-1], device=u.device)
    base = scratch.data_ptr()
    own, sums, entering, share_A, share_D, share_bias, share_B, share_C = (base + 4 * at for at in p.offsets[:-1])
    if layout.packed:  # the pieces of packed sequences leave numbers out
        scratch[p.offsets[3] : p.offsets[-1 if any(layout.static) else 6]].zero_()
    own = None if from_zero else own
    first = _floats(dfinal)
    pointers = _pointers(
        **tensors, **gradients, saved=saved, first=first, own=own, sums=sums,
        entering=entering if p.span < p.chunk else own, share_A=share_A, share_B=share_B, share_C=share_C,
        share_D=None if D is None else share_D,
        share_bias=None if delta_bias is None else share_bias,
    )  # fmt: skip
    for launch in p.launches:
        launch(pointers)
    if room is not None and dz is None:
        room.copy_(gradients["dz"])
    return tuple(gradients[name] for name in ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dh0"))
