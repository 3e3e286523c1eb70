"""A step of a whole stack of wide Mamba blocks in CUDA C++, for up to 256 sequences: products of ours by tensor maps.

For what cuda.py does not serve: up to 40 sequences or more than 64, a LayerNorm, a narrow M with a wide E. Five kernels
a block: gather.cu (residual add and norm), product.cu (in_proj), project.cu and scan.cu (cuda_halves.py), product.cu
(out_proj). Each begins before the last one has ended and asks for its weights before it waits for that. Of more than 64
sequences in_proj is by pairs.cu, and out_proj by cuBLAS. For bf16 weights on Hopper GPUs, whose matrix units (wgmma)
these are.

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
FEWEST, FEW, MOST = 3, 64, 256  # sequences: at least; up to which out_proj is ours; and at most
LEFT_ALONE = 16  # of them, up to which weights are not to be the first to leave the L2 cache: measured
WIDEST = 8 * 1024  # M, of which gather.cu has 8 a thread
STAGES, EARLY = (12, 8), 8  # tiles on their way, of in_proj and of out_proj; and those that are asked for at once
ROWS_OF_PAIR, TILES_OF_PAIR, EARLY_OF_PAIR = 128, 196 * 1024, 4  # of pairs.cu; bytes of tiles on their way: measured


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
            if n_rows <= FEW:
                gather, enter, leave = _few(width, n_channels, centred, n_rows > LEFT_ALONE, device)
            else:
                gather, enter, leave = _many(width, n_channels, centred, -(-n_rows // 64) * 64, device)
            between = cuda_halves.kernel_for(n_rows, weights[0], device)
        except nvrtc.Unavailable as error:
            return give_up(device, error)
        x, normed = x.contiguous(), x.new_empty(n_rows, width)
        stream = torch.empty(n_rows, width, dtype=torch.float32, device=x.device)
        left = leave.room(n_rows, x)
        uz, y = x.new_empty(n_rows, 2 * n_channels), x.new_empty(n_rows, n_channels)
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            gather(None if i else x, rows, left, one.norm, one.norm_bias, stream, normed, eps)
            enter(normed, one.in_proj, uz)
            between(uz, *state, one, y)
            leave(y, one.out_proj, left)
        gather(None, None, left, None, None, stream, normed, eps)
    return stream


class _Gather:
    def __init__(self, M: int, splits: int, centred: bool, device: int):
        self.threads = M // 8
        self.kernel = nvrtc.kernel(source("gather.cu", M=M, SPLITS=splits, CENTRED=int(centred)), "gather", device)

    def __call__(self, x, rows, left, weight, shift, stream: Tensor, normed: Tensor, eps: float) -> None:
        tensors = addresses(x, rows, left, weight, shift, stream, normed)
        self.kernel(len(stream), self.threads, struct.pack("7qdq", *tensors, eps, len(stream)), early=True)


class _Product:
    def __init__(self, width: int, out: int, splits: int, stages: int, passing: bool, device: int):
        self.blocks, self.splits, self.out = out // TILE * splits, splits, out
        sizes = {"WIDTH": width, "OUT": out, "SPLITS": splits, "STAGES": stages}
        text = source("tiles.cu", "product.cu", **sizes, EARLY=EARLY, PASSING=int(passing))
        self.kernel = nvrtc.kernel(text, "product", device)

    def room(self, n_rows: int, like: Tensor) -> Tensor:
        return torch.empty(self.splits, n_rows, self.out, dtype=torch.float32, device=like.device)

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """x (B, WIDTH), out (B, OUT) or the sums of each piece of the width (SPLITS, B, OUT)."""
        places = (out, None) if self.splits == 1 else (None, out)
        maps = nvrtc.tensor_map(x, TILE, TILE) + nvrtc.tensor_map(weight, TILE, TILE)
        rest = struct.pack("3q40x", *addresses(*places), len(x))
        self.kernel(self.blocks, 160, maps + rest, early=True)


class _Pairs:
    def __init__(self, width: int, out: int, sequences: int, device: int):
        self.blocks, self.sequences = out // ROWS_OF_PAIR * 2, sequences
        stages = TILES_OF_PAIR // (2 * TILE * (ROWS_OF_PAIR + sequences))
        sizes = {"WIDTH": width, "OUT": out, "ROWS": ROWS_OF_PAIR, "SEQUENCES": sequences, "CLUSTER": 2}
        text = source("tiles.cu", "pairs.cu", **sizes, STAGES=stages, EARLY=EARLY_OF_PAIR, PASSING=1)
        self.kernel = nvrtc.kernel(text, "product", device)

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """x (B, WIDTH), out (B, OUT)."""
        maps = nvrtc.tensor_map(x, self.sequences, TILE) + nvrtc.tensor_map(weight, ROWS_OF_PAIR, TILE)
        self.kernel(
            self.blocks, 2 * ROWS_OF_PAIR + 32, maps + struct.pack("2q48x", *addresses(out), len(x)), early=True
        )


class _PyTorch:
    def __init__(self, out: int):
        self.out = out

    def room(self, n_rows: int, like: Tensor) -> Tensor:
        return like.new_empty(n_rows, self.out)

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.mm(x, weight.t(), out=out)


@lru_cache(64)
def _few(M: int, E: int, centred: bool, passing: bool, device: int) -> tuple[_Gather, _Product, _Product]:
    """gather, in_proj and out_proj; passing: the weights are the first to leave the L2 cache."""
    enter = _Product(M, 2 * E, 1, STAGES[0], passing, device)
    leave = _Product(E, M, SPLITS, STAGES[1], passing, device)
    return _Gather(M, SPLITS, centred, device), enter, leave


@lru_cache(64)
def _many(M: int, E: int, centred: bool, sequences: int, device: int) -> tuple[_Gather, _Pairs, _PyTorch]:
    """The same where there is room for so many sequences."""
    return _Gather(M, 0, centred, device), _Pairs(M, 2 * E, sequences, device), _PyTorch(M)
