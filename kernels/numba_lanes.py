"""Explicit SIMD in the CPU kernels: `LANES` float32 as one value that numba computes with.

A loop over channels that LLVM vectorises by itself has to load and store all that it touches at each pass, and to
check at each entry that no two arrays overlap. With lanes a kernel keeps what it wants in registers and puts its loops
in any order: the scan goes through time with a state held in one. Where vectors are shorter LLVM takes several for one
value, so that kernels know only this width.

`fill(x)`, `load(array, row, column, count)` and `store` make and keep lanes; + - * / work on them; exp2, silu and
softplus are polynomials, good to a few units in the last place of float32 (tests/kernels/test_numba_lanes.py). AVX-512
has instructions for splitting and scaling by powers of two, which spare exp2 a third of its work.
"""

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import extending
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.extending import overload, register_model

from .numba_runtime import LN2_HIGH, LN2_LOW, LOG2E, inline, polynomial

LANES = 16
intrinsic: Any = extending.intrinsic  # a kernel calls one without its first argument, which no type checker knows

_FLOAT, _INT, _MASK = ir.FloatType(), ir.IntType(32), ir.IntType(16)
FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
FLAGS = ("contract", "nsz")  # as numba_runtime's EXACT: fused multiply-adds, no sums reordered
_asked: str | None = config.CPU_FEATURES  # pyright: ignore[reportAttributeAccessIssue] - set by numba's environment
AVX512 = "+avx512dq" in (get_host_cpu_features() if _asked is None else _asked).split(",")
_POWERS = (-126.0, 127.0)  # of two, that are normal numbers


class _LanesType(types.Type):
    def __init__(self):
        super().__init__(name=f"lanes({LANES} x float32)")


_lanes = _LanesType()


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, FLOATS)


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * LANES)


def filled(builder: ir.IRBuilder, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), _constant(_INTS, 0))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [x.type for x in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _avx512(builder: ir.IRBuilder, name: str, vector: Any, other: Any) -> Any:
    """AVX-512's operation of that name, on all lanes, with the rounding of the moment."""
    unused, every, rounding = ir.Constant(FLOATS, ir.Undefined), ir.Constant(_MASK, -1), ir.Constant(_INT, 4)
    return _call(builder, f"llvm.x86.avx512.mask.{name}.ps.512", FLOATS, vector, other, unused, every, rounding)


@intrinsic
def fill(typingctx, x):
    """`x` in every lane."""

    def codegen(context, builder, signature, args):
        return filled(builder, args[0])

    return _lanes(types.float32), codegen


def _arithmetic(symbol: Callable, instruction: str) -> None:
    @intrinsic
    def compute(typingctx, a, b):
        def codegen(context, builder, signature, args):
            vectors = (x if t is _lanes else filled(builder, x) for x, t in zip(args, signature.args, strict=True))
            return getattr(builder, instruction)(*vectors, flags=FLAGS)

        return _lanes(*(x if x is _lanes else types.float32 for x in (a, b))), codegen

    @overload(symbol, jit_options={"forceinline": True})
    def of_lanes(a, b):
        if _lanes in (a, b):
            return lambda a, b: compute(a, b)
        return None


for _symbol, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _arithmetic(_symbol, _instruction)


def _address(context, builder, array_type, array, row, column) -> Any:
    # Not by numba's own indexing, which guards against negative indices.
    struct = context.make_array(array_type)(context, builder, array)
    steps = cgutils.unpack_tuple(builder, struct.strides)
    offset = builder.add(builder.mul(row, steps[0]), builder.mul(column, steps[1]))
    first = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(first, [offset], source_etype=ir.IntType(8)), FLOATS.as_pointer())


def _whole(builder: ir.IRBuilder, count: Any) -> Any:
    """`with _whole(..) as (then, otherwise)`: whether `count` means all lanes."""
    return builder.if_else(builder.icmp_signed(">=", count, ir.Constant(ir.IntType(64), LANES)), likely=True)


@intrinsic
def load(typingctx, array, row, column, count):
    """array[row, column : column + count] of a float32 array, contiguous in its rows; at most `LANES`, then zeros."""

    def codegen(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args[:3])
        with _whole(builder, args[3]) as (then, otherwise):
            with then:
                whole, whole_block = builder.load(address, align=4, typ=FLOATS), builder.basic_block
            with otherwise:
                room = cgutils.alloca_once(builder, FLOATS)
                builder.store(_constant(FLOATS, 0.0), room)
                cgutils.raw_memcpy(builder, room, address, args[3], 4)
                part, part_block = builder.load(room, typ=FLOATS), builder.basic_block
        out = builder.phi(FLOATS)
        out.add_incoming(whole, whole_block)
        out.add_incoming(part, part_block)
        return out

    return _lanes(array, types.int64, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, x, array, row, column, count):
    """The reverse of `load`: array[row, column : column + count] = the first `count` lanes of x."""

    def codegen(context, builder, signature, args):
        address = _address(context, builder, signature.args[1], *args[1:4])
        with _whole(builder, args[4]) as (then, otherwise):
            with then:
                builder.store(args[0], address, align=4)
            with otherwise:
                room = cgutils.alloca_once(builder, FLOATS)
                builder.store(args[0], room)
                cgutils.raw_memcpy(builder, address, room, args[4], 4)
        return context.get_dummy_value()

    return types.none(x, array, types.int64, types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx, array, row, column):
    """Ask for the cache line of array[row, column], of which nothing need exist."""

    def codegen(context, builder, signature, args):
        address = builder.bitcast(_address(context, builder, signature.args[0], *args), ir.IntType(8).as_pointer())
        to_read, to_second_level, data = (ir.Constant(_INT, i) for i in (0, 2, 1))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), address, to_read, to_second_level, data)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), codegen


def _of_one(codegen: Callable) -> Any:
    """An intrinsic from lanes to lanes."""

    @intrinsic
    def function(typingctx, x):
        return _lanes(_lanes), lambda context, builder, signature, args: codegen(builder, args[0])

    return function


def _of_two(codegen: Callable) -> Any:
    @intrinsic
    def function(typingctx, x, y):
        return _lanes(_lanes, _lanes), lambda context, builder, signature, args: codegen(builder, *args)

    return function


def _floor(builder, x):
    return _call(builder, f"llvm.floor.v{LANES}f32", FLOATS, x)


def _bounded(builder, x, lowest, highest):
    for predicate, limit in (("<", lowest), (">", highest)):
        bound = _constant(FLOATS, limit)
        x = builder.select(builder.fcmp_ordered(predicate, x, bound), bound, x)  # a NaN falls through
    return x


def _fraction(builder, x):
    if AVX512:
        return _avx512(builder, "reduce", x, ir.Constant(_INT, 0b1001))  # what floor takes off
    x = _bounded(builder, x, *_POWERS)
    return builder.fsub(x, _floor(builder, x), flags=FLAGS)


def _scale(builder, x, power):
    if AVX512:
        return _avx512(builder, "scalef", x, power)
    whole = builder.fptosi(_floor(builder, _bounded(builder, power, *_POWERS)), _INTS)
    exponent = builder.shl(builder.add(whole, _constant(_INTS, 127)), _constant(_INTS, 23))
    return builder.fmul(x, builder.bitcast(exponent, FLOATS), flags=FLAGS)


def _near_reciprocal(builder, x):
    if AVX512:
        unused, every = ir.Constant(FLOATS, ir.Undefined), ir.Constant(_MASK, -1)
        return _call(builder, "llvm.x86.avx512.rcp14.ps.512", FLOATS, x, unused, every)
    return builder.fdiv(_constant(FLOATS, 1.0), x, flags=FLAGS)


_absolute = _of_one(lambda builder, x: _call(builder, f"llvm.fabs.v{LANES}f32", FLOATS, x))
_whole_part = _of_one(_floor)
_fraction_of = _of_one(_fraction)
_about_one_over = _of_one(_near_reciprocal)  # to 14 bits at least
_scaled = _of_two(_scale)  # x 2^floor(power)
_positive_part = _of_one(lambda builder, x: _bounded(builder, x, 0.0, float("inf")))
_without_overflow = _of_one(lambda builder, x: _bounded(builder, x, -87.0, 87.0))  # of exp(x)

# 2^f: relative error 1.5e-7 before rounding, and none near 0 and 1: a decay near 1 acts for many steps.
_P0, _P1, _P2, _P3, _P4, _P5 = polynomial(np.exp2, 0.0, 1.0, 5)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = polynomial(np.exp, 0.0, np.log(2), 6)
_L = polynomial(lambda e: np.log1p(e) / e, 1e-9, 1.0, 9)  # log1p(e) / e
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9 = _L
_LOG2E = np.float32(LOG2E)


@inline()
def exp2(x):
    """2**x; out of float32's range 0 and infinity, or without AVX-512 the least and the greatest power of two."""
    f = _fraction_of(x)
    return _scaled(f * (f * (f * (f * (f * _P5 + _P4) + _P3) + _P2) + _P1) + _P0, x)


@inline()
def exp(x):
    """exp(x), from exp(-87) to exp(87)."""
    x = _without_overflow(x)
    k = _whole_part(x * _LOG2E)
    f = x - k * LN2_HIGH - k * LN2_LOW
    return _scaled(f * (f * (f * (f * (f * (f * _E6 + _E5) + _E4) + _E3) + _E2) + _E1) + _E0, k)


@inline()
def silu(x):
    """x / (1 + exp(-x))."""
    d = exp(x * np.float32(-1.0)) + np.float32(1.0)
    r = _about_one_over(d)
    return x * (r * (np.float32(2.0) - d * r))  # a step of Newton's in place of a division, which takes 16 cycles


@inline()
def softplus(x):
    """log(1 + exp(x)) with a small relative error at every x: max(x, 0) + log1p(e), e = exp(-|x|) <= 1."""
    e = exp(_absolute(x) * np.float32(-1.0))
    high = e * (e * (e * (e * _L9 + _L8) + _L7) + _L6) + _L5
    return _positive_part(x) + e * (e * (e * (e * (e * (e * high + _L4) + _L3) + _L2) + _L1) + _L0)
