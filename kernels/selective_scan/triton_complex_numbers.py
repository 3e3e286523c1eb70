"""Complex numbers in Triton: decays whose angles keep their digits, products, and how they lie in memory.

Those that others see are pairs side by side; those that only triton_complex_kernels.py sees, two planes.
"""

import numpy as np
import triton
import triton.language as tl

from ..triton_runtime import load_float, load_rows


def _fit(function, degree: int) -> list[tl.constexpr]:
    """A polynomial in x^2 on |x| <= pi / 4, the constant first; to 1e-9."""
    nodes = np.polynomial.Chebyshev.interpolate(lambda t: function(np.sqrt(t)), degree, domain=[0, (np.pi / 4) ** 2])
    return [tl.constexpr(float(c)) for c in nodes.convert(kind=np.polynomial.Polynomial).coef]


_S0, _S1, _S2, _S3, _S4 = _fit(lambda x: np.sinc(x / np.pi), 4)
_C0, _C1, _C2, _C3, _C4 = _fit(np.cos, 4)
_TURNS = tl.constexpr(2 / np.pi)  # quarter turns of one radian
# A float this large has no fraction: added, it rounds, and its last bits count, fewer than 2^22 quarter turns.
_WHOLE = tl.constexpr(1.5 * 2.0**23)
# Pi / 2 in three parts (Cody and Waite): few bits, so that whole numbers times the first two are exact, and the rest.
_QUARTER_HIGH, _QUARTER_MIDDLE = tl.constexpr(1.5703125), tl.constexpr(4.837512969970703125e-4)
_QUARTER_LOW = tl.constexpr(np.pi / 2 - 1.5703125 - 4.837512969970703125e-4)


@triton.jit
def _turned(angle, rest):
    """(cos, sin) of angle + rest, of which `rest` is small."""
    counted = angle * _TURNS + _WHOLE
    whole = counted - _WHOLE
    x = angle - whole * _QUARTER_HIGH - whole * _QUARTER_MIDDLE - whole * _QUARTER_LOW + rest
    square = x * x
    cos = _C0 + square * (_C1 + square * (_C2 + square * (_C3 + square * _C4)))
    sin = x * (_S0 + square * (_S1 + square * (_S2 + square * (_S3 + square * _S4))))
    turn = counted.to(tl.int32, bitcast=True)
    swap, sign = (turn & 1) != 0, tl.where((turn & 2) != 0, -1.0, 1.0)
    return sign * tl.where(swap, -sin, cos), sign * tl.where(swap, cos, sin)


@triton.jit
def _sized(dt, A2, angle, rest):
    cos, sin = _turned(angle, rest)
    size = tl.exp2(dt * A2)
    return size * cos, size * sin


@triton.jit
def decay_of(dt, A2, A_im):
    """exp(dt A), of A2 = Re A log2(e). The angle keeps what its product loses, which may be the same at all steps."""
    angle = dt * A_im
    return _sized(dt, A2, angle, tl.fma(dt, A_im, -angle))


@triton.jit
def _lost(a, b, product):
    """a b - product, exactly, by halves of the digits of a and b (Veltkamp and Dekker)."""
    a_high, b_high = a * 4097.0, b * 4097.0
    a_high, b_high = a_high - (a_high - a), b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def decay_over(total, lost, A2, A_im):
    """exp((total + lost) A) over a chunk: its angle may be of many turns, and needs more than a float's digits."""
    angle = total * A_im
    return _sized(total, A2, angle, _lost(total, A_im, angle) + lost * A_im)


@triton.jit
def add_step(total, lost, dt):
    """(total + dt, what all these sums have lost): Knuth's two-sum."""
    new = total + dt
    back = new - total
    return new, lost + ((total - (new - back)) + (dt - back))


@triton.jit
def times(a_re, a_im, b_re, b_im):
    return tl.fma(a_re, b_re, -(a_im * b_im)), tl.fma(a_re, b_im, a_im * b_re)


@triton.jit
def load_pairs(x, at, inside):
    """x[at] of pairs side by side; zeros where not inside and where x is absent."""
    return load_float(x, 2 * at, inside), load_float(x, 2 * at + 1, inside)


@triton.jit
def store_pairs(x, at, re, im, inside):
    tl.store(x + 2 * at, re, mask=inside)
    tl.store(x + 2 * at + 1, im, mask=inside)


@triton.jit
def load_planes(x, at, plane, inside, COMPLEX: tl.constexpr = True):
    """x[at] of two planes, or (not COMPLEX) of real parts alone; zeros where not inside and where x is absent."""
    im = load_float(x, at + plane, inside) if COMPLEX else tl.zeros(inside.shape, tl.float32)
    return load_float(x, at, inside), im


@triton.jit
def store_planes(x, at, plane, re, im, inside, COMPLEX: tl.constexpr = True):
    tl.store(x + at, re, mask=inside)
    if COMPLEX:
        tl.store(x + at + plane, im, mask=inside)


@triton.jit
def rows_of(x, token, stride, n, in_n, step, end, K: tl.constexpr, REVERSE: tl.constexpr, COMPLEX: tl.constexpr):
    """The K rows (N, 1) of B or C from `step` on: (real parts, imaginary parts)."""
    if COMPLEX:
        re = load_rows(x, token, stride, 2 * n, in_n, step, end, K, REVERSE)
        im = load_rows(x, token, stride, 2 * n + 1, in_n, step, end, K, REVERSE)
    else:
        re = load_rows(x, token, stride, n, in_n, step, end, K, REVERSE)
        im = re
    res, ims = (), ()
    for i in tl.static_range(K):
        res += (re[i].to(tl.float32)[:, None],)
        ims += (im[i].to(tl.float32)[:, None] if COMPLEX else tl.zeros((1, 1), tl.float32),)
    return res, ims
