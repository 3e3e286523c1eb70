"""What the Triton kernels share: elementary functions in float32, rows of a tensor, sums in a fixed order.

All of it runs compiled on a GPU and in Triton's interpreter on the CPU (TRITON_INTERPRET=1), which has no libdevice.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 in two parts (Cody and Waite): few bits, so that k * high is exact,
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)  # and the rest


def _artanh_over_s(q: np.ndarray) -> np.ndarray:
    return sum(q**k / (2 * k + 1) for k in range(20))


# artanh(s) / s as a polynomial in q = s^2 <= 1/9: relative error 1e-8
_fit = np.polynomial.Chebyshev.interpolate(_artanh_over_s, 4, domain=[0, 1 / 9]).convert(kind=np.polynomial.Polynomial)
_P0, _P1, _P2, _P3, _P4 = (tl.constexpr(float(c)) for c in _fit.coef)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0 to a few units in the last place: 0 below -87, NaN for NaN.

    exp2(x log2 e) would round its argument and so lose about |x| units: 16 where softplus makes 1e-5 of x = -11.5.
    """
    clamped = tl.where(x < -87.0, -87.0, x)  # a NaN falls through
    whole = tl.floor(clamped * LOG2E + 0.5)
    fraction = clamped - whole * _LN2_HIGH - whole * _LN2_LOW
    return tl.where(x < -87.0, 0.0, tl.exp2(fraction * LOG2E) * tl.exp2(whole))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), from the exponential that cannot overflow."""
    e = exp_negative(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with a small relative error at every x: a rounded 1 + e has lost what a small e holds.

    max(x, 0) + log1p(e) with e = exp(-|x|) <= 1 and log1p(e) = 2 artanh(s), s = e / (2 + e) <= 1/3.
    """
    e = exp_negative(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = _P0 + q * (_P1 + q * (_P2 + q * (_P3 + q * _P4)))
    return tl.where(x < 0.0, 0.0, x) + 2.0 * s * series


@triton.jit
def load_float(x, at, inside):
    """x[at] in float32; zeros where not inside and where x is absent."""
    values = tl.zeros(inside.shape, tl.float32)
    if x is not None:
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def load_rows(x, token, stride, at, inside, step, length, K: tl.constexpr, REVERSE: tl.constexpr):
    """The rows x[token], ... of the K steps from `step` on, as a tuple: all loads in flight at once.

    Zeros beyond the last step. A row's address is a vector of pointers plus a scalar, which takes few registers.
    """
    first = x + token * stride + at
    rows = ()
    for i in tl.static_range(K):
        row = first - i * stride if REVERSE else first + i * stride
        rows += (tl.load(row, mask=inside & (step + i < length), other=0.0),)
    return rows


@triton.jit
def token_of(start, length, step, REVERSE: tl.constexpr):
    """Token of a step of the sequence that starts at token `start`."""
    return start + (length - 1 - step if REVERSE else step)


_SUM_TERMS = tl.constexpr(64)
_SUM_BLOCK = tl.constexpr(256)


@triton.jit(do_not_specialize=["n_terms", "n"])
def _sum_terms(x, out, n_terms, n):
    first = tl.program_id(1) * _SUM_TERMS
    at = tl.program_id(0).to(tl.int64) * _SUM_BLOCK + tl.arange(0, _SUM_BLOCK)
    total = tl.zeros((_SUM_BLOCK,), tl.float32)
    for k in range(first, tl.minimum(first + _SUM_TERMS, n_terms)):
        total += tl.load(x + n.to(tl.int64) * k + at, mask=at < n, other=0.0)
    tl.store(out + n.to(tl.int64) * tl.program_id(1) + at, total, mask=at < n)


def sum_first_axis(x: Tensor) -> Tensor:
    """x.sum(0) in an order that depends on nothing but len(x); torch's own depends on the shape.

    float32, contiguous. Runs of 64 terms each, then the sums of these.
    """
    while len(x) != 1:
        sums = torch.empty(max(triton.cdiv(len(x), _SUM_TERMS.value), 1), *x.shape[1:], device=x.device)
        n = sums[0].numel()
        _sum_terms[(triton.cdiv(n, _SUM_BLOCK.value), len(sums))](x, sums, len(x), n)
        x = sums
    return x[0]


def with_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension: all that the kernels ask of the layout of what depends on tokens."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()
