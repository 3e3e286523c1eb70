"""A step of a whole stack of Mamba blocks in CUDA C++: cuda_kernels/stack.cu, compiled for its sizes by ../nvrtc.py.

Three kernels a block (the one between the projections is cuda_middle.py's), each of which begins before the last one
has ended: for GPUs that can do that (Hopper and later), and for bf16 weights. What does not fit goes block by block to
Triton.

Letters: B sequences, M model width, E inner width.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import nvrtc
from . import cuda_middle
from .cuda_sources import addresses, fits, give_up, source

FEWEST, MOST, WIDEST = 3, 64, 1024  # sequences, and M, that `step` serves: measured, benchmarks/results/gpu_model.md
WARPS = 8  # of a block of threads
TILES, ENTER_CLUSTER, STAGES, EARLY, TURNED = True, 2, (12, 6), 12, 1
_pack = struct.Struct("9qdq").pack  # struct Problem of stack.cu


def serves(x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, centred: bool) -> bool:
    """Whether `step` takes these."""
    w, (n_rows, width) = weights[0], x.shape
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
    x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, eps: float, centred: bool
) -> Tensor | None:
    """The stream (B, M), float32, after all blocks; None where NVRTC fails."""
    if not serves(x, states, weights, centred):
        return None
    w, (n_rows, width), device = weights[0], x.shape, x.get_device()
    n_channels = len(w.A_log)
    octets = -(-n_rows // 8)
    with torch.cuda.device_of(x):
        try:
            begin, enter, leave = _kernels(width, n_channels, octets, device)
            if TILES:
                tiled_enter, tiled_leave = _tiled(width, n_channels, octets, device)
            middle = cuda_middle.kernel_for(n_rows, w, device)
        except nvrtc.Unavailable as error:
            return give_up(device, error)

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        x, stream, scaled = x.contiguous(), room(n_rows, width), room(n_rows, width, dtype=x.dtype)
        uz, y = room(n_rows, 2 * n_channels, dtype=x.dtype), room(n_rows, n_channels, dtype=x.dtype)
        written = stream, scaled, room(width // 16, 8 * octets), uz, y
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            behind = weights[i + 1] if i + 1 < len(weights) else None
            if i == 0:
                begin(_pack(*addresses(one.in_proj, one.out_proj, one.norm, x, *written), eps, n_rows))
            norm = None if behind is None else behind.norm
            argument = _pack(*addresses(one.in_proj, one.out_proj, norm, None, *written), eps, n_rows)
            if TILES & 1:
                maps = nvrtc.tensor_map(scaled, 64 // ENTER_CLUSTER, 64) + nvrtc.tensor_map(one.in_proj, 32, 64)
                tiled_enter(maps + struct.pack("2qdq32x", *addresses(written[2], uz), eps, n_rows))
            else:
                enter(argument)
            middle(uz, *state, one, y, None if behind is None else behind.in_proj)
            if TILES & 2:
                maps = nvrtc.tensor_map(y, 64, 64) + nvrtc.tensor_map(one.out_proj, 32, 64)
                tiled_leave(maps + struct.pack("5q24x", *addresses(norm, stream, scaled, written[2]), n_rows))
            else:
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
    def __init__(self, name: str, device: int, blocks: int, sizes: dict[str, int]):
        self.blocks = blocks
        self.kernel = nvrtc.kernel(source("tiles.cu", f"{name}.cu", **sizes), name, device)

    def __call__(self, argument: bytes) -> None:
        self.kernel(self.blocks, 160, argument, early=True)


@lru_cache(64)
def _tiled(M: int, E: int, octets: int, device: int) -> tuple[_Tiled, _Tiled]:
    sizes = {"M": M, "E": E, "OCTETS": octets, "EARLY": EARLY, "TURNED": TURNED}
    enter = _Tiled("enter", device, 2 * E // 32, {**sizes, "CLUSTER": ENTER_CLUSTER, "STAGES": STAGES[0]})
    return enter, _Tiled("leave", device, M // 32 * 4, {**sizes, "CLUSTER": 4, "STAGES": STAGES[1]})
