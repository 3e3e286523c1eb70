"""A step of a whole stack of wide Mamba blocks in CUDA C++, for up to 64 sequences: products of ours by tensor maps.

For what cuda.py does not serve: up to 40 sequences, a LayerNorm, a narrow M with a wide E. Five kernels a block:
gather.cu (residual add and norm), product.cu (in_proj), project.cu and scan.cu (cuda_halves.py), product.cu (out_proj).
Each begins before the last one has ended and asks for its weights before it waits for that. For bf16 weights on Hopper
GPUs, whose matrix units (wgmma) these are.

Letters: B sequences, M model width, E inner width.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import nvrtc
from . import cuda_halves
from .cuda_sources import addresses, capable, fits, give_up, source, tiles_serve

TILE = 64  # rows and columns of a tile
SPLITS = 4  # pieces of out_proj's width
FEWEST, MOST = 3, 64  # sequences
LEFT_ALONE = 16  # of them, up to which weights are not to be the first to leave the L2 cache: measured
WIDEST = 8 * 1024  # M, of which gather.cu has 8 a thread
STAGES, EARLY = (12, 8), 8  # tiles on their way, of in_proj and of out_proj; and those that are asked for at once


def serves(x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence) -> bool:
    """Whether `step` takes these."""
    w, n_rows, width = weights[0], len(states[0][0]), x.shape[1]
    shapes = w.in_proj.shape, w.x_proj.shape, w.conv.shape
    return (
        FEWEST <= n_rows <= MOST
        and width <= WIDEST
        and width % 256 == len(w.A_log) % (TILE * SPLITS) == 0
        and capable(x)
        and tiles_serve(x)
        and all(cuda_halves.serves(x, *state, one) for state, one in zip(states, weights, strict=True))
        and all(fits(t, x) for one in weights for t in (one.norm, one.norm_bias, one.in_proj, one.out_proj))
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
    if not serves(x, states, weights):
        return None
    n_rows, width, device, n_channels = len(states[0][0]), x.shape[1], x.get_device(), len(weights[0].A_log)
    with torch.cuda.device_of(x):
        try:
            gather, enter, leave = _kernels(width, n_channels, centred, n_rows > LEFT_ALONE, device)
            between = cuda_halves.kernel_for(n_rows, weights[0], device)
        except nvrtc.Unavailable as error:
            return give_up(device, error)
        x, normed = x.contiguous(), x.new_empty(n_rows, width)
        stream = torch.empty(n_rows, width, dtype=torch.float32, device=x.device)
        sums = torch.empty(SPLITS, n_rows, width, dtype=torch.float32, device=x.device)
        uz, y = x.new_empty(n_rows, 2 * n_channels), x.new_empty(n_rows, n_channels)
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            gather(None if i else x, rows, sums, one.norm, one.norm_bias, stream, normed, eps)
            enter(normed, one.in_proj, uz)
            between(uz, *state, one, y)
            leave(y, one.out_proj, sums)
        gather(None, None, sums, None, None, stream, normed, eps)
    return stream


class _Gather:
    def __init__(self, M: int, centred: bool, device: int):
        self.threads = M // 8
        self.kernel = nvrtc.kernel(source("gather.cu", M=M, SPLITS=SPLITS, CENTRED=int(centred)), "gather", device)

    def __call__(self, x, rows, sums, weight, shift, stream: Tensor, normed: Tensor, eps: float) -> None:
        tensors = addresses(x, rows, sums, weight, shift, stream, normed)
        self.kernel(len(stream), self.threads, struct.pack("7qdq", *tensors, eps, len(stream)), early=True)


class _Product:
    def __init__(self, width: int, out: int, splits: int, stages: int, passing: bool, device: int):
        self.blocks, self.splits = out // TILE * splits, splits
        sizes = {"WIDTH": width, "OUT": out, "SPLITS": splits, "STAGES": stages}
        text = source("tiles.cu", "product.cu", **sizes, EARLY=EARLY, PASSING=int(passing))
        self.kernel = nvrtc.kernel(text, "product", device)

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """x (B, WIDTH), out (B, OUT) or the sums of each piece of the width (SPLITS, B, OUT)."""
        places = (out, None) if self.splits == 1 else (None, out)
        maps = nvrtc.tensor_map(x, TILE, TILE) + nvrtc.tensor_map(weight, TILE, TILE)
        rest = struct.pack("3q40x", *addresses(*places), len(x))
        self.kernel(self.blocks, 160, maps + rest, early=True)


@lru_cache(64)
def _kernels(M: int, E: int, centred: bool, passing: bool, device: int) -> tuple[_Gather, _Product, _Product]:
    """gather, and the products of in_proj and out_proj; passing: their weights are the first to leave the L2 cache."""
    enter = _Product(M, 2 * E, 1, STAGES[0], passing, device)
    leave = _Product(E, M, SPLITS, STAGES[1], passing, device)
    return _Gather(M, centred, device), enter, leave
