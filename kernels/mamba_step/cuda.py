"""A step of a whole stack of Mamba blocks in CUDA C++: cuda_kernels/stack.cu, compiled for its sizes by ../nvrtc.py.

Three kernels a block (the one between the projections is cuda_middle.py's), each of which begins before the last one
has ended: for GPUs that can do that (Hopper and later), and for bf16 weights. For many sequences in_proj is enter.cu on
Hopper GPUs. What does not fit goes to cuda_wide.py, or block by block to Triton.

Letters: B sequences, M model width, E inner width.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import nvrtc
from . import cuda_middle
from .cuda_sources import addresses, fits, give_up, source, tiles_serve

FEWEST, MOST, WIDEST = 3, 64, 1024  # sequences, and M, that `step` serves: measured, benchmarks/results/gpu_model.md
WARPS = 8  # of a block of threads
TILED = 41  # sequences from which in_proj is by tiles, where that serves: measured
STAGES, EARLY = 12, 6  # of tiles
_pack = struct.Struct("10qdq").pack  # struct Problem of stack.cu


def serves(x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, centred: bool) -> bool:
    """Whether `step` takes these."""
    w, n_rows, width = weights[0], len(states[0][0]), x.shape[1]
    shapes = w.in_proj.shape, w.x_proj.shape, w.conv.shape
    return (
        FEWEST <= n_rows <= MOST
        and width <= WIDEST
        and not centred
        and width % 256 == len(w.A_log) % 256 == 0
        and all(cuda_middle.serves(x, *state, one) for state, one in zip(states, weights, strict=True))
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
    n_channels = len(w.A_log)
    octets = -(-n_rows // 8)
    with torch.cuda.device_of(x):
        try:
            begin, enter, leave = _kernels(width, n_channels, octets, device)
            tiled = _tiled(width, n_channels, octets, device) if n_rows >= TILED and tiles_serve(x) else None
            middle = cuda_middle.kernel_for(n_rows, w, device)
        except nvrtc.Unavailable as error:
            return give_up(device, error)

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        x, stream, scaled = x.contiguous(), room(n_rows, width), room(n_rows, width, dtype=x.dtype)
        uz, y = room(n_rows, 2 * n_channels, dtype=x.dtype), room(n_rows, n_channels, dtype=x.dtype)
        squares = room(width // 16, 8 * octets)
        written = stream, scaled, squares, uz, y
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            behind = weights[i + 1].norm if i + 1 < len(weights) else None
            if i == 0:
                begin(_pack(*addresses(one.in_proj, one.out_proj, one.norm, x, rows, *written), eps, n_rows))
            argument = _pack(*addresses(one.in_proj, one.out_proj, behind, None, None, *written), eps, n_rows)
            if tiled is None:
                enter(argument)
            else:
                tiled(scaled, one.in_proj, squares, uz, eps)
            middle(uz, *state, one, y)
            leave(argument)
    return stream


class _Kernel:
    """One kernel, with as many blocks of threads as there is work for."""

    def __init__(self, name: str, device: int, units: int, sizes: dict[str, int]):
        processors = nvrtc.processors(device)
        self.blocks = min(units, processors)
        self.kernel = nvrtc.kernel(source("stack.cu", **sizes, BLOCKS=processors, WARPS=WARPS), name, device)

    def __call__(self, argument: bytes) -> None:
        self.kernel(self.blocks, 32 * WARPS, argument, early=True)


@lru_cache(64)
def _kernels(M: int, E: int, octets: int, device: int) -> list[_Kernel]:
    """begin, enter, leave."""
    units = {"begin": 8 * octets, "enter": E // 16, "leave": M // 16 * -(-octets // 4)}
    return [_Kernel(name, device, n, {"M": M, "E": E, "OCTETS": octets}) for name, n in units.items()]


class _Tiled:
    """`enter`, by tiles."""

    ROWS = 32  # of in_proj, that a block has

    def __init__(self, M: int, E: int, octets: int, device: int):
        self.blocks = 2 * E // self.ROWS
        sizes = {"M": M, "E": E, "OCTETS": octets, "STAGES": STAGES, "EARLY": EARLY}
        self.kernel = nvrtc.kernel(source("tiles.cu", "enter.cu", **sizes), "enter", device)

    def __call__(self, x: Tensor, in_proj: Tensor, squares: Tensor, uz: Tensor, eps: float) -> None:
        maps = nvrtc.tensor_map(x, 64, 64) + nvrtc.tensor_map(in_proj, self.ROWS, 64)
        rest = struct.pack("2qdq32x", *addresses(squares, uz), eps, len(x))
        self.kernel(self.blocks, 160, maps + rest, early=True)


@lru_cache(64)
def _tiled(M: int, E: int, octets: int, device: int) -> _Tiled:
    return _Tiled(M, E, octets, device)
