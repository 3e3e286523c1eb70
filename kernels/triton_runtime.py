"""What the Triton kernels share: elementary functions in float32, rows of a tensor, sums in a fixed order.

All of it runs compiled on a GPU and in Triton's interpreter on the CPU (TRITON_INTERPRET=1), which has no libdevice.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 in two parts (Cody and Waite): few bits, so that k * high is exact,
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)  # and the rest


def _log1p_over_x(x: np.ndarray) -> np.ndarray:
    return np.log1p(x) / np.where(x == 0, 1, x) + (x == 0)


# log1p(e) / e on [0, 1] as a polynomial: relative error 5e-9
_fit = np.polynomial.Chebyshev.interpolate(_log1p_over_x, 9, domain=[0, 1]).convert(kind=np.polynomial.Polynomial)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8, _P9 = (tl.constexpr(float(c)) for c in _fit.coef)
_ROUND = tl.constexpr(1.5 * 2.0**23 + 127)  # k + this has k + 127 in its low bits, which is the exponent of 2^k


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0 to a few units in the last place: 0 below -87, NaN for NaN.

    exp2(x log2 e) would round its argument and so lose about |x| units: 16 where softplus makes 1e-5 of x = -11.5.
    """
    vanishes = x < -87.0
    clamped = tl.where(vanishes, -87.0, x)  # a NaN falls through
    shifted = clamped * LOG2E + _ROUND
    whole = shifted - _ROUND
    fraction = clamped - whole * _LN2_HIGH - whole * _LN2_LOW
    scale = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(vanishes, 0.0, tl.exp2(fraction * LOG2E) * scale)  # the product keeps a NaN


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). Relative error: a few units in the last place for x > 0, and |x| more for x < 0.

    The square of rsqrt is the cheapest quotient: an exact one takes nine instructions more.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with a small relative error at every x: a rounded 1 + e has lost what a small e holds.

    max(x, 0) + log1p(e) with e = exp(-|x|) <= 1.
    """
    return _softplus_of(x, exp_negative(-tl.abs(x)))


@triton.jit
def _softplus_of(x, e):
    high = _P5 + e * (_P6 + e * (_P7 + e * (_P8 + e * _P9)))
    return tl.where(x < 0.0, 0.0, x) + e * (_P0 + e * (_P1 + e * (_P2 + e * (_P3 + e * (_P4 + e * high)))))


@triton.jit
def softplus_and_slope(x):
    """softplus(x) and its derivative 1 / (1 + exp(-x)), which keeps its digits where it is small."""
    e = exp_negative(-tl.abs(x))
    root = tl.rsqrt(1.0 + e)
    return _softplus_of(x, e), tl.where(x < 0.0, e, 1.0) * (root * root)


_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def multiply_add(a, b, total):
    """total + a b for matrices, products of float32 in float32."""
    if _INTERPRETED:  # it would multiply the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_float(x, at, inside):
    """x[at] in float32; zeros where not inside and where x is absent."""
    values = tl.zeros(inside.shape, tl.float32)
    if x is not None:
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def load_rows(
    x, token, stride, at, inside, step, length, K: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr = False
):  # fmt: skip
    """The rows x[token], ... of the K steps from `step` on, as a tuple: all loads in flight at once.

    Zeros beyond the last step, of which there are none if WHOLE. A row's address is a vector of pointers plus a scalar,
    which takes few registers.
    """
    first = x + token * stride + at
    rows = ()
    for i in tl.static_range(K):
        row = first - i * stride if REVERSE else first + i * stride
        if WHOLE:
            rows += (tl.load(row, mask=inside, other=0.0),)
        else:
            rows += (tl.load(row, mask=inside & (step + i < length), other=0.0),)
    return rows


@triton.jit
def token_of(start, length, step, REVERSE: tl.constexpr):
    """Token of a step of the sequence that starts at token `start`."""
    return start + (length - 1 - step if REVERSE else step)


@triton.jit
def piece_of(cu_seqlens, n_seqs, length, number, PIECE: tl.constexpr):
    """Sequence of a piece of time, that sequence's first token and length, the first step of the piece.

    A sequence has one piece at least, though it may be empty. Packed, piece p of sequence s has the number
    start // PIECE + s + p, as in sequences.checkpoint_slots. That leaves gaps: numbers whose piece begins beyond the
    end of its sequence, and not at 0.
    """
    if cu_seqlens is None:
        pieces = tl.maximum(tl.cdiv(length, PIECE), 1)
        s = number // pieces
        start = s.to(tl.int64) * length
        begin = number % pieces * PIECE
    else:
        s, beyond = n_seqs * 0, n_seqs  # bisection for the last sequence whose first piece has no higher number
        while beyond - s > 1:
            middle = (s + beyond) // 2
            if tl.load(cu_seqlens + middle) // PIECE + middle <= number:
                s = middle
            else:
                beyond = middle
        start = tl.load(cu_seqlens + s).to(tl.int64)
        length = (tl.load(cu_seqlens + s + 1) - start).to(tl.int32)
        begin = (number - s - start // PIECE).to(tl.int32) * PIECE
    return s, start, length, begin


_compiled: dict[tuple[Any, ...], Any] = {}
_kernels: dict[int, tuple[Any, list[str], int]] = {}
_INTERPRETING = interpreting()  # asked once: it takes a launch's time


def early_launch(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that may begin before the one before it has ended."""
    early = not interpreting() and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": early, "launch_pdl": early} if early else {"EARLY": False}


def launch(kernel: Any, blocks: int, *given: Any, **named: Any) -> None:
    """kernel[(blocks,)](*given, **named), on the current device, for a third of the host's time.

    Triton asks at each call what of the arguments it is to compile for. Here that is asked in short, and the compiled
    kernel remembered. The kernel's constants stand last among its parameters.
    """
    if _INTERPRETING:
        kernel[(blocks,)](*given, **named)
        return
    number = id(kernel)  # Triton's own hash of a kernel takes a microsecond
    _, names, first_constant = _kernels.get(number) or _met(kernel)
    device, values = torch._C._cuda_getDevice(), [*given, *[named[name] for name in names[len(given) :]]]
    key = [number, device, named.get("num_warps"), named.get("num_stages"), *values[first_constant:]]
    for i, x in enumerate(values[:first_constant]):
        if x is None:
            key.append(None)
        elif isinstance(x, Tensor):
            values[i] = address = x.data_ptr()
            key += x.dtype, address % 16 == 0
        elif isinstance(x, int):
            key.append((x == 1) + 2 * (x % 16 == 0) + 4 * (-(2**31) <= x < 2**31))
        else:
            key.append(type(x))
    compiled = _compiled.get(tuple(key))
    if compiled is None:
        _compiled[tuple(key)] = kernel[(blocks,)](*given, **named)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(blocks, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def _met(kernel: Any) -> tuple[Any, list[str], int]:
    """The kernel, which is kept so that no other has its id, its parameters' names, the place of its first constant."""
    names = kernel.arg_names
    _kernels[id(kernel)] = found = kernel, names, len(names) - len(kernel.constexprs)
    return found


SUM_TILE = tl.constexpr(2048)  # numbers that a program loads at once


def terms_at_once(n_terms: int) -> int:
    """Rows of the tile of `sum_block`: few let a program take wide rows, many let more programs share long columns."""
    return 8 if n_terms <= 64 else 64


def sum_blocks(n: int, n_terms: int) -> int:
    """How many blocks `sum_block` cuts n sums into."""
    return ceil_div(n, SUM_TILE.value // terms_at_once(n_terms))


@triton.jit
def sum_block(shares, total, block, n_terms, n, ROWS: tl.constexpr, TERMS: tl.constexpr):
    """A block of the n sums of shares (n_terms, ROWS, columns): total (columns, ROWS), which may be of another dtype.

    TERMS terms are loaded at once. The order of a sum follows from their number and from the layout of the tile:
    so from nothing that Triton may learn of a call (that n divides by 16, say), unless it is the same in all calls.
    """
    WIDTH: tl.constexpr = SUM_TILE // TERMS
    k = tl.arange(0, TERMS)[:, None]
    at = block.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < n
    sums = tl.zeros((TERMS, WIDTH), tl.float32)
    for first in range(0, n_terms, TERMS):
        row = (first + k).to(tl.int64) * n
        sums += tl.load(shares + (row + at[None, :]), mask=(first + k < n_terms) & inside[None, :], other=0.0)
    if ROWS > 1:
        columns = n // ROWS
        at = at % columns * ROWS + at // columns
    tl.store(total + at, tl.sum(sums, axis=0), mask=inside)


_GROUP = tl.constexpr(512)  # terms of a program: with more, a few programs would walk long columns


@triton.jit(do_not_specialize=["n_terms", "n", "n_blocks"])
def _sum_terms(x, totals, n_terms, n, n_blocks, TERMS: tl.constexpr):
    group = (tl.program_id(0) // n_blocks).to(tl.int64)
    of_group = tl.minimum(n_terms - group * _GROUP, _GROUP).to(tl.int32)
    sum_block(x + group * _GROUP * n, totals + group * n, tl.program_id(0) % n_blocks, of_group, n, 1, TERMS)


def sum_first_axis(x: Tensor) -> Tensor:
    """x.sum(0) in an order that depends on nothing but len(x); torch's own depends on the shape.

    float32, contiguous.
    """
    while len(x) != 1:
        n_groups = max(ceil_div(len(x), _GROUP.value), 1)
        totals = torch.empty(n_groups, *x.shape[1:], device=x.device)
        n = totals[0].numel()
        if n:
            n_blocks = sum_blocks(n, len(x))
            launch(_sum_terms, n_blocks * n_groups, x, totals, len(x), n, n_blocks, TERMS=terms_at_once(len(x)))
        x = totals
    return x[0]


def ceil_div(n: int, d: int) -> int:
    """As triton.cdiv, which takes several microseconds a call on the host."""
    return -(-n // d)


def with_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension: all that the kernels ask of the layout of what depends on tokens."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()
