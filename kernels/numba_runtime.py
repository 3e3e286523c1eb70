"""What the CPU kernels share: tiles of channels, vectorisable float32 elementary functions, and a small thread pool.

A kernel works on a tile of up to 64 channels over a piece of time, in small contiguous buffers that stay in the
first-level cache; `load` and `store` move it from and to the tensors. LLVM turns the loops of the kernels into SIMD
code only if what they call is plain arithmetic, and a call of libm's `expf` is not. So exp2, sigmoid and softplus are
polynomials here, inlined by LLVM, each good to a few units in the last place of float32
(tests/kernels/test_numba_runtime.py measures them against float64). The forwards that are worth it say by themselves
what is a vector: numba_lanes.py.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor


def _keep_freed_memory() -> None:
    """Ask glibc not to hand memory of freed tensors back to the system, up to 256 MiB of it.

    By default the next tensor is mapped anew and every page of it faults in again: measured, a third of a small model's
    forward. Other C libraries know no `mallopt`, and keep their ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            mallopt(parameter, 256 << 20)


_keep_freed_memory()

LOG2E = 1.4426950408889634
# "contract" lets LLVM form fused multiply-adds, "nsz" drops the sign of zero. Neither reorders a sum.
EXACT = {"contract", "nsz"}
# "reassoc" lets a reduction over channels run in SIMD lanes: another order than written, but always the same one.
REDUCE = {"contract", "nsz", "reassoc"}


def jit(kernel: Callable) -> Callable:
    """`numba.njit` for a kernel: no GIL, machine code cached on disk.

    The cache looks at the kernel's own file only: after a change of another that it calls, delete `__pycache__`.
    """
    return numba.njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")(kernel)


def inline(fastmath: set[str] = EXACT) -> Callable:
    """`numba.njit` for a helper of a kernel, inlined by LLVM: a real call would cost more than a row of work."""
    return numba.njit(forceinline=True, fastmath=fastmath, error_model="numpy")


@intrinsic
def bits_to_float(typingctx, bits):
    # The float32 of these bits of an int32.
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _float_to_bits(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _wide(typingctx):
    def codegen(context, builder, signature, args):
        # llvmlite's own `add` refuses an attribute that it has no name for.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), codegen


# Called in a kernel, `wide()` asks for vectors as long as the CPU has them. LLVM takes half of AVX-512's, since early
# CPUs lowered their clock for the others; measured, that costs the scan an eighth of its time and the gate a quarter.
wide: Any = _wide


def polynomial(function: Callable, low: float, high: float, degree: int) -> list[np.float32]:
    """Coefficients, lowest first, of an interpolant that is near the best and exact at both ends of [low, high]."""
    points = low + (high - low) * (np.polynomial.chebyshev.chebpts2(degree + 1) + 1) / 2
    fit = np.polynomial.Polynomial.fit(points, function(points), degree)
    return [np.float32(c) for c in fit.convert().coef]


_P0, _P1, _P2, _P3, _P4, _P5, _P6 = polynomial(np.exp2, -0.5, 0.5, 6)  # 2^f: relative error 4e-9 before rounding
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = polynomial(np.exp, -np.log(2) / 2, np.log(2) / 2, 6)
# ln 2 in two parts (Cody and Waite): the high one has few bits, so k * high is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440054690583e-4)
# Added to a small float, this leaves the nearest whole number, plus float32's exponent bias, in the sum's last bits;
# moved to the exponent's place they are the power of two.
_ROUND = np.float32(1.5 * 2**23 + 127)


@inline()
def exp2(x):
    """2**x in float32: 2**-126 below -126 (no subnormals, no zero), at most 2**127 above, NaN for NaN."""
    # Written so that a NaN falls through each comparison.
    clamped = np.float32(-126.0) if x < np.float32(-126.0) else (np.float32(127.0) if x > np.float32(127.0) else x)
    whole = clamped + _ROUND
    f = clamped - (whole - _ROUND)
    p = _P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * (_P5 + f * _P6)))))
    return p * bits_to_float(_float_to_bits(whole) << np.int32(23))  # pyright: ignore[reportCallIssue]


@inline()
def exp_negative(x):
    """exp(x) in float32 for x <= 0: exp(-87) below -87, NaN for NaN."""
    clamped = np.float32(-87.0) if x < np.float32(-87.0) else x
    whole = clamped * np.float32(LOG2E) + _ROUND
    k = whole - _ROUND
    f = clamped - k * LN2_HIGH - k * LN2_LOW
    p = _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
    return p * bits_to_float(_float_to_bits(whole) << np.int32(23))  # pyright: ignore[reportCallIssue]


@inline()
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32, from the exponential that cannot overflow."""
    e = exp_negative(-abs(x))
    one = np.float32(1.0)
    return (e if x < np.float32(0.0) else one) / (one + e)


@inline()
def softplus(x):
    """log(1 + exp(x)) in float32 with a small relative error at every x.

    max(x, 0) + log1p(e) with e = exp(-|x|) <= 1 and log1p(e) = 2 artanh(s), s = e / (2 + e) <= 1/3.
    """
    e = exp_negative(-abs(x))
    s = e / (np.float32(2.0) + e)
    q = s * s
    series = np.float32(0.0)
    for k in (17, 15, 13, 11, 9, 7, 5, 3, 1):
        series = np.float32(1.0 / k) + q * series
    positive_part = np.float32(0.0) if x < np.float32(0.0) else x
    return positive_part + np.float32(2.0) * s * series


TILE = 64  # channels of a tile


@inline()
def aligned(rows, width):
    """A float32 array that begins with a cache line: of a vector that lies in two, both have to be loaded."""
    room = np.empty(rows * width + 16, np.float32)
    first = 16 - room.ctypes.data // 4 % 16
    return room[first : first + rows * width].reshape((rows, width))


@inline()
def buffer(rows):
    return aligned(rows, TILE)


@jit
def load(source, order, c0, c1, out):
    """out[i, :c1 - c0] = source[order[i], c0:c1]; zeros where the source is absent (of size 0)."""
    # Unsigned indices: a signed one is guarded against being negative, which keeps the loop from being vectorised.
    first, width = np.uint64(c0), np.uint64(c1 - c0)
    for i in range(order.size):
        if source.size > 0:
            row = np.uint64(order[i])
            for d in range(width):
                out[i, d] = source[row, first + np.uint64(d)]
        else:
            for d in range(width):
                out[i, d] = np.float32(0.0)


@jit
def store(tile, order, c0, c1, out):
    """The reverse of `load`; nothing where the target is absent."""
    first, width = np.uint64(c0), np.uint64(c1 - c0)
    if out.size > 0:
        for i in range(order.size):
            row = np.uint64(order[i])
            for d in range(width):
                out[row, first + np.uint64(d)] = tile[i, d]


def bounds_of(cu_seqlens: Tensor | None, batch: int, n_tokens: int) -> np.ndarray:
    """`sequence_bounds` (sequences.py) as numpy, which makes it in a twentieth of the time."""
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int64).numpy()
    return np.arange(batch + 1) * (n_tokens // max(batch, 1))


def copied(x: Tensor | None) -> Any:
    """A parameter to be made an array of: `numpy()` fixes a storage's size for good, and FSDP frees and refills it."""
    return None if x is None else x.detach().clone()


def rows(x: Tensor | None) -> tuple[np.ndarray, int]:
    """x (T, D) as a contiguous float32 array and x's first column in it: no copy where x is some columns of a matrix.

    An absent x becomes an array of size 0.
    """
    if x is None:
        return np.empty((0, 0), np.float32), 0
    x = x.detach().to(torch.float32)
    n_tokens, n_channels = x.shape
    width = int(x.stride(0))
    if x.stride(1) == 1 and width > n_channels:
        column = int(x.storage_offset()) % width
        begin = x.storage_offset() - column
        enough = x.untyped_storage().nbytes() // x.element_size() >= begin + n_tokens * width
        if column + n_channels <= width and enough:
            return x.as_strided((n_tokens, width), (width, 1), begin).numpy(), column
    return x.contiguous().numpy(), 0


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    # Keyed by process: a forked child (a data-loader worker) must not wait for its parent's threads.
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="polymamba")


def parallel(kernel: Callable, n_jobs: int, *args: object) -> None:
    """Run `kernel(first, last, *args)` over `range(n_jobs)`, in as many parts as torch has threads.

    Jobs write to places of their own, so neither the number of threads nor their timing can change a result.
    Our own pool instead of numba's `parallel=True`: numba's default threading layer aborts the process when
    two Python threads enter it at once.
    """
    n_parts = max(1, min(torch.get_num_threads(), n_jobs))
    bounds = [n_jobs * i // n_parts for i in range(n_parts + 1)]
    futures = [_pool(os.getpid()).submit(kernel, first, last, *args) for first, last in pairwise(bounds[1:])]
    kernel(bounds[0], bounds[1], *args)
    for future in futures:
        future.result()
