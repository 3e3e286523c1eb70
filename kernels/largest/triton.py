"""A program a row: a lane keeps the largest of its own columns, and the first place of it.

And one program that hands over what was found."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div

BLOCK = 16384  # columns that a program reads at a time


@triton.jit
def _largest(x, places, bad, stride, width, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(STEPS):
        column = step * BLOCK + d
        value = tl.load(x + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        value = tl.where(value != value, float("inf"), value)
        larger = value > best
        best, at = tl.where(larger, value, best), tl.where(larger, column, at)
    top = tl.max(best, axis=0)
    place = tl.min(tl.where(best == top, at, width), axis=0)
    none = (top == float("inf")) | (top == float("-inf"))
    tl.store(places + row, tl.where(none, 0, place).to(tl.int64))
    tl.store(bad + row, none)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    n_rows, width = x.shape
    places = torch.empty(n_rows, dtype=torch.int64, device=x.device)
    bad = torch.empty(n_rows, dtype=torch.bool, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        _largest[(n_rows,)](
            x, places, bad, x.stride(0), width, ceil_div(width, block), block, num_warps=min(max(block // 512, 1), 32)
        )
    return places, bad


@triton.jit
def _hand_over(tokens, bad, own, ring, turn, n, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        b = first + tl.arange(0, BLOCK)
        token, none = tl.load(tokens + b, mask=b < n, other=0), tl.load(bad + b, mask=b < n, other=0)
        at = tl.load(turn + b, mask=b < n, other=0)
        tl.store(own + b, token, mask=b < n)
        tl.store(ring + at * n + b, tl.where(none != 0, -1, token), mask=b < n)
        tl.store(turn + b, (at + 1) % TURNS, mask=b < n)


def hand_over(tokens: Tensor, bad: Tensor, own: Tensor, ring: Tensor, turn: Tensor) -> None:
    with torch.cuda.device_of(tokens):
        _hand_over[(1,)](tokens, bad, own, ring, turn, len(tokens), len(ring), 128, num_warps=4)
