"""What the selective scan in CUDA C++ launches: kernels, blocks and numbers, by the layout of its inputs alone.

A sequence is run in chunks of time as in Triton (triton_chunks.py): one after another in one warp or pair of warps, or
all at once. What a sequence's result is depends, to the bit, on nothing but that sequence and the parameters: chunks,
their parts and checkpoints have fixed places, the sums over states a fixed order. How many sequences there are decides
who runs the chunks and how many channels a lane takes (cuda_tiles.py); neither changes a bit. (Of a state that u or B
has made infinite, it may change that to NaN.) No atomics: shares, added up in order.
"""

import struct
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nvrtc
from ..sequences import piece_numbers
from . import cuda_tiles as tiles
from .cuda_tiles import Layout, Tile
from .triton import checkpoint_every

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
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
_pack_addresses = struct.Struct(f"{len(_POINTERS)}q").pack
_pack_numbers = struct.Struct(f"{len(_NUMBERS)}q{len(_STRIDES)}i").pack


def pack_pointers(**tensors: Tensor | int | None) -> bytes:
    """The kernels' pointers, tensors or addresses; what is absent or None is null."""
    get = tensors.get
    return _pack_addresses(*[x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in map(get, _POINTERS)])


def chunk_and_unit(n_channels: int, n_states: int) -> tuple[int, int]:
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


class _Launch(NamedTuple):
    function: Callable[[int, int, bytes], None]
    blocks: int
    threads: int
    numbers: bytes

    def __call__(self, pointers: bytes) -> None:
        self.function(self.blocks, self.threads, pointers + self.numbers)


class Plan:
    """What is launched for a layout, how often, and with what numbers: all but addresses."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.processors = nvrtc.processors(layout.device)
        self.length = layout.n_tokens // max(layout.batch, 1)  # of each sequence; of all if packed
        self.chunk, self.unit = chunk_and_unit(layout.n_channels, layout.n_states)
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
        return piece_numbers(self.layout.n_tokens, self.layout.n_seqs, steps, packed=self.layout.packed)

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
        types = zip(("U", "DELTA", "Z", "DY", "MB", "MC"), (TYPES[t] for t in on.types), strict=True)
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


_PART = 512  # most steps of a chunk that are run from 0 at once, to find the gradients that enter chunks
_FEW_TERMS = 8  # of a sum of shares: up to these one thread adds up all of them
_BLOCKS_A_PROCESSOR = 1.25  # up to these of the backward, each walks a unit, not a chunk, which takes one pass more
# Below these (sequence, channel) rows, chunks are run all at once, which takes each exp twice; half as many count where
# pairs of warps may walk them (`_at_once`).
_ROWS_A_PROCESSOR = 40


def _at_once(p: Plan) -> bool:
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
def forward_plan(layout: Layout, by_four: bool) -> Plan:
    """by_four: whether four channels of a row may be moved at once."""
    p = Plan(layout)
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


@lru_cache(maxsize=1024)
def backward_plan(layout: Layout, from_zero: bool, has_D: bool, has_bias: bool) -> Plan:
    """from_zero: no gradient enters a chunk."""
    p = Plan(layout)
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
