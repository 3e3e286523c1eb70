"""Products of matrices within the CPU kernels: of a few rows, which are in a cache, by weights laid out for it.

A tile of the result is held in registers while its sums run: `HEIGHT[v]` rows of v vectors of lanes, so that what is
loaded (v vectors of the weight and a number of each row) is little beside the multiply-adds that read it. An element is
summed in order, by itself: it depends neither on the other rows nor on their number.
"""

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils, types
from torch import Tensor

from .numba_lanes import FLAGS, FLOATS, LANES, filled, intrinsic
from .numba_runtime import inline, jit, wide

HEIGHT = {3: 8, 4: 6}  # 24 sums, of the 32 registers that AVX-512 has: without it these products are slow


def _tile_of(height: int, vectors: int) -> Any:
    """The function that makes a tile of so many rows and vectors."""

    @intrinsic
    def tile(typingctx, a, row, panel, out, out_row, out_column):
        def codegen(context, builder, signature, args):
            byte, index = ir.IntType(8), ir.IntType(64)

            def at(pointer: Any, offset: Any, kind: ir.Type) -> Any:
                offset = ir.Constant(index, offset) if isinstance(offset, int) else offset
                return builder.bitcast(builder.gep(pointer, [offset], source_etype=byte), kind.as_pointer())

            def rows_of(argument: int, row: Any, column: Any) -> list[Any]:
                array = context.make_array(signature.args[argument])(context, builder, args[argument])
                step, _ = cgutils.unpack_tuple(builder, array.strides)
                first = builder.bitcast(array.data, byte.as_pointer())
                offsets = (builder.mul(builder.add(row, ir.Constant(index, i)), step) for i in range(height))
                return [at(first, builder.add(o, builder.mul(column, ir.Constant(index, 4))), byte) for o in offsets]

            zero, one = ir.Constant(index, 0), ir.Constant(index, 1)
            from_rows, to_rows = rows_of(0, args[1], zero), rows_of(3, args[4], args[5])
            weights = rows_of(2, zero, zero)[0]
            depth = cgutils.unpack_tuple(
                builder, context.make_array(signature.args[2])(context, builder, args[2]).shape
            )[0]
            sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(vectors)] for _ in range(height)]
            for row_of_sums in sums:
                for room in row_of_sums:
                    builder.store(ir.Constant(FLOATS, [0.0] * LANES), room)
            with cgutils.for_range_slice(builder, zero, depth, one, intp=index) as (k, _):
                start = builder.mul(k, ir.Constant(index, 4 * LANES * vectors))
                loaded = [
                    builder.load(at(at(weights, start, byte), 4 * LANES * v, FLOATS), align=4, typ=FLOATS)
                    for v in range(vectors)
                ]
                offset = builder.mul(k, ir.Constant(index, 4))
                for pointer, row_of_sums in zip(from_rows, sums, strict=True):
                    x = filled(builder, builder.load(at(pointer, offset, FLOATS.element), typ=FLOATS.element))
                    for weight, room in zip(loaded, row_of_sums, strict=True):
                        product = builder.fmul(x, weight, flags=FLAGS)
                        builder.store(builder.fadd(builder.load(room, typ=FLOATS), product, flags=FLAGS), room)
            for pointer, row_of_sums in zip(to_rows, sums, strict=True):
                for v, room in enumerate(row_of_sums):
                    builder.store(builder.load(room, typ=FLOATS), at(pointer, 4 * LANES * v, FLOATS), align=4)
            return context.get_dummy_value()

        return types.none(a, types.int64, panel, out, types.int64, types.int64), codegen

    return tile


def _panel_of(vectors: int) -> Any:
    """The function that makes a panel's columns of the result: tiles, and the rows that are left one by one."""
    height = HEIGHT[vectors]
    tile, row = _tile_of(height, vectors), _tile_of(1, vectors)

    @inline()
    def multiply_panel(a, rows, panel, out, out_row, column):
        i = 0
        while i + height <= rows:
            tile(a, i, panel, out, out_row + i, column)
            i += height
        while i < rows:
            row(a, i, panel, out, out_row + i, column)
            i += 1

    return multiply_panel


_panel_3, _panel_4 = _panel_of(3), _panel_of(4)


@jit
def multiply(a, rows, panels, out, out_row):
    """out[out_row + i] = a[i] weight^T for i < rows, with panels = packed(weight). Nothing is checked.

    a is as wide as the weight at least, and out as all panels.
    """
    wide()
    width = panels.shape[2]
    for p in range(panels.shape[0]):
        if width == 3 * LANES:
            _panel_3(a, rows, panels[p], out, out_row, p * width)
        else:
            _panel_4(a, rows, panels[p], out, out_row, p * width)


def packed(weight: Tensor, width: int = 0) -> np.ndarray:
    """weight (O, K), float32, as panels (P, K, W) for `multiply`, which begin with a cache line.

    Rows that it lacks are zeros. width: W, else the one with the fewest of these.
    """
    n_rows, depth = weight.shape
    width = width or LANES * min(HEIGHT, key=lambda v: (-(-n_rows // (LANES * v)) * v, -v))
    n_panels = -(-n_rows // width)
    out = (weight.new_zeros if n_rows % width else weight.new_empty)(n_panels, depth, width)
    whole = n_rows // width
    out[:whole].copy_(weight.detach()[: whole * width].unflatten(0, (whole, width)).mT)
    if n_rows % width:
        out[whole, :, : n_rows - whole * width] = weight.detach()[whole * width :].mT
    return out.numpy()
