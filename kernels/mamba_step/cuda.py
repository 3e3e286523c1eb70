"""A step of a whole stack of Mamba blocks in CUDA C++, compiled for its sizes by ../nvrtc.py.

Three kernels a block, four of a wide one: enter (norm and in_proj), what lies between (cuda_middle.py or
cuda_halves.py), leave (out_proj and residual add). Each begins before the last one has ended: for GPUs that can do that
(Hopper and later), and for bf16 weights. The first and the last are in cuda_kernels/stack.cu; with more sequences they
are enter.cu and leave.cu, whose matrix units Hopper GPUs have. What does not fit goes to cuda_wide.py, or block by
block to Triton.

Letters: B sequences, M model width, E inner width.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import nvrtc
from . import cuda_halves, cuda_middle
from .cuda_sources import PASS_UP_TO, addresses, fits, give_up, source, tiles_serve

# Sequences from which narrow blocks are served, and M of the widest of these; sequences from which in_proj is by tiles,
# where they serve, and wide blocks, which are all by tiles, are served. Measured, benchmarks/results/gpu_model.md.
FEWEST, WIDEST, TILED = 3, 1024, 41
BANDS, TILES = 64, 256  # sequences up to which out_proj is by bands (stack.cu) or blocks are wide; and the most
STAGES_OF_WIDE = 12  # tiles on their way of each product of wide blocks: measured
WARPS = 8  # of a block of threads of stack.cu


def serves(x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, centred: bool) -> bool:
    """Whether `step` takes these."""
    w, n_rows, width = weights[0], len(states[0][0]), x.shape[1]
    shapes = w.in_proj.shape, w.x_proj.shape, w.conv.shape
    wide = width > WIDEST
    between, fewest, most = (cuda_halves, TILED, BANDS) if wide else (cuda_middle, FEWEST, TILES)
    return (
        fewest <= n_rows <= most
        and not centred
        and width % 256 == len(w.A_log) % 256 == 0
        and all(between.serves(x, *state, one) for state, one in zip(states, weights, strict=True))
        and (tiles_serve(x) or (not wide and n_rows <= BANDS))
        and all(fits(t, x) for one in weights for t in (one.norm, one.in_proj, one.out_proj))
        and all((one.in_proj.shape, one.x_proj.shape, one.conv.shape) == shapes for one in weights)
    )


def step(
    x: Tensor,
    states: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence,
    eps: float,
    centred: bool,
    rows: Tensor | None = None,
) -> Tensor | None:
    """The stream (B, M), float32, after all blocks; None where NVRTC fails."""
    if not serves(x, states, weights, centred):
        return None
    w, n_rows, width, device = weights[0], len(states[0][0]), x.shape[1], x.get_device()
    wide = width > WIDEST
    n_channels = len(w.A_log)
    with torch.cuda.device_of(x):
        try:
            if wide:
                begin, enter, leave = _wide(width, n_channels, device)
            elif n_rows <= BANDS:
                begin, enter, leave = _few(width, n_channels, -(-n_rows // 8), tiles_serve(x), device)
            else:
                begin, enter, leave = _many(width, n_channels, -(-n_rows // 64), device)
            between = (cuda_halves if wide else cuda_middle).kernel_for(n_rows, w, device)
        except nvrtc.Unavailable as error:
            return give_up(device, error)

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        x, stream, scaled = x.contiguous(), room(n_rows, width), room(n_rows, width, dtype=x.dtype)
        uz, y = room(n_rows, 2 * n_channels, dtype=x.dtype), room(n_rows, n_channels, dtype=x.dtype)
        squares = room(begin.parts, begin.most)
        begin(x, rows, w.norm, stream, scaled, squares)
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            behind = weights[i + 1].norm if i + 1 < len(weights) else None
            enter(scaled, one.in_proj, squares, uz, eps)
            between(uz, *state, one, y)
            leave(y, one.out_proj, behind, stream, scaled, squares)
    return stream


class _Begin:
    def __init__(self, M: int, parts: int, most: int, device: int, **sizes: int):
        self.parts, self.most = parts, most  # of the sums of squares
        self.kernel = nvrtc.kernel(source("begin.cu", M=M, PARTS=parts, MOST=most, **sizes), "begin", device)

    def __call__(self, x, rows, norm, stream: Tensor, scaled: Tensor, squares: Tensor) -> None:
        argument = struct.pack("6q", *addresses(x, rows, norm, stream, scaled, squares))
        self.kernel(len(stream), 256, argument, early=True)


class _Bands:
    """`enter` or `leave` of stack.cu, with as many blocks of threads as there are units of work at most."""

    name: str
    FIELDS = "in_proj", "out_proj", "norm", "stream", "scaled", "squares", "uz", "y"  # of struct Problem of stack.cu

    def __init__(self, M: int, E: int, octets: int, units: int, device: int):
        processors = nvrtc.processors(device)
        self.blocks = min(units, processors)
        sizes = {"M": M, "E": E, "OCTETS": octets, "BLOCKS": processors, "WARPS": WARPS}
        self.kernel = nvrtc.kernel(source("stack.cu", **sizes), self.name, device)

    def launch(self, n_rows: int, eps: float = 0.0, **tensors: Tensor | None) -> None:
        places = addresses(*map(tensors.get, self.FIELDS))
        self.kernel(self.blocks, 32 * WARPS, struct.pack("8qdq", *places, eps, n_rows), early=True)


class _EnterBands(_Bands):
    name = "enter"

    def __call__(self, x: Tensor, in_proj: Tensor, squares: Tensor, uz: Tensor, eps: float) -> None:
        self.launch(len(x), eps, in_proj=in_proj, scaled=x, squares=squares, uz=uz)


class _LeaveBands(_Bands):
    name = "leave"

    def __call__(self, y: Tensor, out_proj: Tensor, norm, stream: Tensor, scaled: Tensor, squares: Tensor) -> None:
        self.launch(len(y), out_proj=out_proj, norm=norm, stream=stream, scaled=scaled, squares=squares, y=y)


class _Tiles:
    """`enter` or `leave` by tiles: so many rows of the weight and sequences a block of threads."""

    name: str

    def __init__(self, rows: int, sequences: int, out: int, device: int, **sizes: int):
        self.rows, self.sequences, self.row_blocks = rows, sequences, out // rows * sizes.get("CLUSTER", 1)
        sizes |= {"ROWS": rows, "SEQUENCES": sequences}
        self.kernel = nvrtc.kernel(source("tiles.cu", f"{self.name}.cu", **sizes), self.name, device)

    def launch(self, x: Tensor, weight: Tensor, rest: bytes) -> None:
        maps = nvrtc.tensor_map(x, self.sequences, 64) + nvrtc.tensor_map(weight, self.rows, 64)
        blocks = self.row_blocks * -(-len(x) // self.sequences)
        self.kernel(blocks, 2 * self.sequences + 32, maps + rest, early=True)


class _EnterTiles(_Tiles):
    name = "enter"

    def __call__(self, x: Tensor, in_proj: Tensor, squares: Tensor, uz: Tensor, eps: float) -> None:
        self.launch(x, in_proj, struct.pack("2qdq32x", *addresses(squares, uz), eps, len(x)))


class _LeaveTiles(_Tiles):
    name = "leave"

    def __call__(self, y: Tensor, out_proj: Tensor, norm, stream: Tensor, scaled: Tensor, squares: Tensor) -> None:
        self.launch(y, out_proj, struct.pack("5q24x", *addresses(norm, stream, scaled, squares), len(y)))


@lru_cache(64)
def _few(
    M: int, E: int, octets: int, tiles: bool, device: int
) -> tuple[_Begin, _EnterBands | _EnterTiles, _LeaveBands]:
    """begin, enter and leave for up to BANDS sequences, octets of them. Numbers of tiles: measured."""
    most, parts = 8 * octets, M // 16
    enter: _EnterBands | _EnterTiles
    if tiles and most >= TILED:
        sizes = {"M": M, "E": E, "PARTS": parts, "MOST": most, "STAGES": 12, "EARLY": 6, "PASSING": 1}
        enter = _EnterTiles(32, 64, 2 * E, device, **sizes)
    else:
        enter = _EnterBands(M, E, octets, E // 16, device)
    leave = _LeaveBands(M, E, octets, M // 16 * -(-octets // 4), device)
    return _Begin(M, parts, most, device), enter, leave


@lru_cache(64)
def _many(M: int, E: int, groups: int, device: int) -> tuple[_Begin, _EnterTiles, _LeaveTiles]:
    """begin, enter and leave for more, groups of 64. Numbers of tiles, and what a block has: measured."""
    rows, rows_of_leave = 64, 32
    sequences, stages = (64, 12) if groups <= 3 else (128, 9)
    sizes, parts = {"M": M, "E": E, "MOST": TILES, "PASSING": int(64 * groups <= PASS_UP_TO)}, M // rows_of_leave
    of_enter = {"PARTS": parts, "STAGES": stages, "EARLY": stages}
    enter = _EnterTiles(rows, sequences, 2 * E, device, **sizes, **of_enter)
    leave = _LeaveTiles(rows_of_leave, 64, M, device, **sizes, STAGES=8, EARLY=8, CLUSTER=1)
    return _Begin(M, parts, TILES, device), enter, leave


@lru_cache(64)
def _wide(M: int, E: int, device: int) -> tuple[_Begin, _EnterTiles, _LeaveTiles]:
    """begin, enter and leave of wide blocks for TILED to BANDS sequences. All numbers: measured."""
    rows, rows_of_leave = 64, 32
    alike, parts = {"SHARED_PERCENT": 75}, M // rows_of_leave
    sizes = {"M": M, "E": E, "MOST": BANDS, "STAGES": STAGES_OF_WIDE, "PASSING": 1, **alike}
    enter = _EnterTiles(rows, 64, 2 * E, device, **sizes, PARTS=parts, EARLY=4)
    leave = _LeaveTiles(rows_of_leave, 64, M, device, **sizes, EARLY=6, CLUSTER=2)
    return _Begin(M, parts, BANDS, device, **alike), enter, leave
