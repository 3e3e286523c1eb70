"""The head's product and the choice of the likeliest in CUDA C++: likeliest.cu and settle.cu, compiled by ../nvrtc.py.

Letters: B sequences, M width, V vocabulary.
"""

import struct
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..largest import WayOut
from ..mamba_step.cuda_sources import addresses, capable, fits, give_up, has_room, source, tiles_serve

TILE = 64
# By 64s of sequences (three are as four): rows of a tile of the weight, the best one first, and threads of a block.
HEIGHTS = {1: (128, 192, 64), 2: (128, 192, 64), 4: (192, 128, 64)}  # measured, benchmarks/results/gpu_model.md
THREADS = {1: 160, 2: 288, 4: 384}
WARPS = 16  # of settle.cu
MOST = 256  # sequences of a launch: more are taken in turns
ROOM, EARLY = 227 * 1024 - 2048, 32 * 1024  # bytes of tiles in shared memory; of the weight's, asked for at once
_FOLDER = Path(__file__).parent / "cuda_kernels"


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `likeliest` takes these."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and len(x) > 0
        and x.shape[1] % 8 == 0
        and TILE <= len(weight) < 2**30
        and x.data_ptr() % 16 == 0
        and capable(x)
        and tiles_serve(x)
        and has_room(x)
        and fits(weight, x)
    )


def likeliest(x: Tensor, weight: Tensor, out: WayOut | None) -> tuple[Tensor, Tensor] | None:
    """None where NVRTC fails."""
    device, x = x.get_device(), x.contiguous()
    places = torch.empty(len(x), dtype=torch.int64, device=x.device)
    bad = torch.empty(len(x), dtype=torch.bool, device=x.device)
    with torch.cuda.device_of(x):
        try:
            kernels = [_kernel(-(-len(part) // TILE), *weight.shape, device) for part in x.split(MOST)]
        except nvrtc.Unavailable as error:
            return give_up(device, error)
        for i, kernel in enumerate(kernels):
            rows = slice(i * MOST, (i + 1) * MOST)
            way = None if out is None else WayOut(out.own[rows], out.ring[:, rows], out.turn[rows])
            kernel(x[rows], weight, places[rows], bad[rows], way)
    return places, bad


class _Kernel:
    def __init__(self, groups: int, V: int, M: int, device: int):
        processors, self.groups = nvrtc.processors(device), groups if groups < 3 else 4
        heights = [n for n in HEIGHTS[self.groups] if n <= V]
        self.height = min(heights, key=lambda n: -(-V // n // processors) * n)  # all are done at once
        self.blocks, self.threads = min(-(-V // self.height), processors), THREADS[self.groups]
        of_x, of_weight = self.groups * TILE * TILE * 2, self.height * TILE * 2
        sizes = {"WIDTH": M, "PROCESSORS": processors, "GROUPS": self.groups, "ROWS": self.height}
        sizes |= {"STAGES": ROOM // (of_x + of_weight), "EARLY": EARLY // of_weight}
        self.find = nvrtc.kernel(source(str(_FOLDER / "likeliest.cu"), **sizes), "likeliest", device)
        self.settle = nvrtc.kernel(source(str(_FOLDER / "settle.cu"), FOUND=self.blocks, WARPS=WARPS), "settle", device)

    def __call__(self, x: Tensor, weight: Tensor, places: Tensor, bad: Tensor, out: WayOut | None = None) -> None:
        keys = torch.empty(self.blocks, len(x), dtype=torch.int64, device=x.device)
        maps = nvrtc.tensor_map(x, TILE * self.groups, TILE) + nvrtc.tensor_map(weight, self.height, TILE)
        sizes = struct.pack("3q40x", *addresses(keys), len(x), len(weight))
        self.find(self.blocks, self.threads, maps + sizes, early=True)
        ring = (0, 0) if out is None else (len(out.ring), out.ring.stride(0))
        tensors = addresses(keys, places, bad, *(out or (None, None, None)))
        self.settle(-(-len(x) // 32), 32 * WARPS, struct.pack("9q", *tensors, len(x), *ring), early=True)


@lru_cache(64)
def _kernel(groups: int, V: int, M: int, device: int) -> _Kernel:
    return _Kernel(groups, V, M, device)
