"""Sixteen lanes of float32 for Numba: the few operations that Brook's kernels need.

Every function here is a Numba intrinsic, for use inside compiled functions only; `simd_int` has those of int32. Memory
is named by its address, an int64, because one kernel walks through several layouts of one buffer; nothing needs to be
aligned beyond its own element.
"""

import math
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from streaming.models.vector_ir import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    emit_call,
    emit_constant,
    emit_fma,
    emit_load,
    emit_splat,
    emit_store,
    f32x16,
    operation,
)

MANY_REGISTERS: bool = binding.get_host_cpu_features().get("avx512f", False)
"""Whether 32 vectors of sixteen lanes fit into registers; elsewhere 8 do, and what is more goes through memory."""


_HALVES = ir.VectorType(ir.HalfType(), LANES)


@intrinsic
def splat(_context: Any, _value: Any) -> Any:
    """Return sixteen copies of a float32."""
    return operation(f32x16(types.float32), emit_splat)


@intrinsic
def load(_context: Any, _address: Any) -> Any:
    """Read sixteen float32 values."""
    return operation(f32x16(types.int64), lambda b, at: emit_load(b, at, FLOATS, 4))


@intrinsic
def load_splat(_context: Any, _address: Any) -> Any:
    """Read one float32 value into every lane."""
    return operation(f32x16(types.int64), lambda b, at: emit_splat(b, emit_load(b, at, FLOAT, 4)))


@intrinsic
def load_halves(_context: Any, _address: Any) -> Any:
    """Read sixteen float16 values."""
    return operation(f32x16(types.int64), lambda b, at: b.fpext(emit_load(b, at, _HALVES, 2), FLOATS))


@intrinsic
def store(_context: Any, _address: Any, _vector: Any) -> Any:
    """Write sixteen float32 values."""
    return operation(types.void(types.int64, f32x16), lambda b, at, vector: emit_store(b, at, vector, 4))


@intrinsic
def store_halves(_context: Any, _address: Any, _vector: Any) -> Any:
    """Round sixteen float32 values to float16 and write them."""

    def emit(builder: Any, address: Any, vector: Any) -> None:
        emit_store(builder, address, builder.fptrunc(vector, _HALVES), 2)

    return operation(types.void(types.int64, f32x16), emit)


@intrinsic
def store_float(_context: Any, _address: Any, _scalar: Any) -> Any:
    """Write one float32 value."""
    return operation(types.void(types.int64, types.float32), lambda b, at, scalar: emit_store(b, at, scalar, 4))


@intrinsic
def add(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a + b."""
    return operation(f32x16(f32x16, f32x16), lambda b, x, y: b.fadd(x, y))


@intrinsic
def multiply(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a * b."""
    return operation(f32x16(f32x16, f32x16), lambda b, x, y: b.fmul(x, y))


@intrinsic
def divide(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a / b."""
    return operation(f32x16(f32x16, f32x16), lambda b, x, y: b.fdiv(x, y))


@intrinsic
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return operation(f32x16(f32x16, f32x16, f32x16), emit_fma)


@intrinsic
def magnitude(_context: Any, _vector: Any) -> Any:
    """Return |vector|."""
    return operation(f32x16(f32x16), lambda b, vector: emit_call(b, "llvm.fabs.v16f32", FLOATS, vector))


@intrinsic
def larger(_context: Any, _a: Any, _b: Any) -> Any:
    """Return max(a, b)."""
    return operation(f32x16(f32x16, f32x16), lambda b, x, y: emit_call(b, "llvm.maxnum.v16f32", FLOATS, x, y))


@intrinsic
def total(_context: Any, _vector: Any) -> Any:
    """Return the sum of the lanes, in any order, as a float32."""

    def emit(builder: Any, vector: Any) -> Any:
        name, zero = "llvm.vector.reduce.fadd.v16f32", ir.Constant(FLOAT, -0.0)
        return emit_call(builder, name, FLOAT, zero, vector, fastmath=("reassoc",))

    return operation(types.float32(f32x16), emit)


# How two vectors, of 1, 2, 4 and 8 rows each, become one: which lanes of both are kept, at what distance those are
# that are added to them, and how far apart the rows are so that all come out in order. Far lanes go first, when there
# are most vectors: where a vector is two registers, that is an addition of registers.
_FOLDS = {
    2: ([*range(8), *range(16, 24)], 8, 8),
    4: ([lane + i for lane in (0, 16, 8, 24) for i in range(4)], 4, 4),
    8: ([lane + i for lane in (0, 16, 4, 20, 8, 24, 12, 28) for i in range(2)], 2, 1),
    16: ([lane + i for lane in (0, 16, 4, 20, 8, 24, 12, 28) for i in (0, 2)], 1, 2),
}


@intrinsic
def dots_64(_context: Any, _rows: Any, _vector: Any) -> Any:
    """Return the dot products of sixteen rows of 64 float32 values, one after the other, with 64 others."""

    def emit(builder: Any, rows: Any, vector: Any) -> Any:
        def at(address: Any, offset: int) -> Any:
            return emit_load(builder, builder.add(address, ir.Constant(address.type, offset)), FLOATS, 4)

        others = [at(vector, 64 * part) for part in range(4)]

        def dots(count: int, row: int) -> Any:
            """Return the sums of `count` rows, each still spread over 16 / count lanes."""
            if count == 1:
                product = builder.fmul(at(rows, 256 * row), others[0])
                for part in range(1, 4):
                    product = emit_fma(builder, at(rows, 256 * row + 64 * part), others[part], product)
                return product
            lanes, distance, row_step = _FOLDS[count]
            low, high = dots(count // 2, row), dots(count // 2, row + row_step)
            near, far = (ir.Constant(INTS, [lane + shift for lane in lanes]) for shift in (0, distance))
            return builder.fadd(builder.shuffle_vector(low, high, near), builder.shuffle_vector(low, high, far))

        return dots(LANES, 0)

    return operation(f32x16(types.int64, types.int64), emit)


@intrinsic
def largest(_context: Any, _vector: Any) -> Any:
    """Return the largest lane as a float32."""
    name = "llvm.vector.reduce.fmax.v16f32"
    return operation(types.float32(f32x16), lambda b, vector: emit_call(b, name, FLOAT, vector))


@intrinsic
def exp(_context: Any, _vector: Any) -> Any:
    """Return e to the power of each lane, to about 1e-7 of its value; outside -87 to 88 that of the nearer end.

    The scheme of Cephes' expf: the power of two goes into the exponent's bits, and a polynomial gives the rest.
    """

    def emit(builder: Any, x: Any) -> Any:
        x = emit_call(builder, "llvm.maxnum.v16f32", FLOATS, x, emit_constant(FLOATS, -87.0))
        x = emit_call(builder, "llvm.minnum.v16f32", FLOATS, x, emit_constant(FLOATS, 88.0))
        n = emit_call(builder, "llvm.rint.v16f32", FLOATS, builder.fmul(x, emit_constant(FLOATS, 1 / math.log(2))))
        rest = emit_fma(builder, n, emit_constant(FLOATS, -0.693359375), x)
        rest = emit_fma(builder, n, emit_constant(FLOATS, 2.12194440054690583e-4), rest)
        power = emit_constant(FLOATS, 1 / 5040)
        for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            power = emit_fma(builder, power, rest, emit_constant(FLOATS, factor))
        exponent = builder.add(builder.fptosi(n, INTS), emit_constant(INTS, 127))
        return builder.fmul(power, builder.bitcast(builder.shl(exponent, emit_constant(INTS, 23)), FLOATS))

    return operation(f32x16(f32x16), emit)


@intrinsic
def pointer(_context: Any, _address: Any) -> Any:
    """Return an address as a pointer that `numba.carray` takes."""
    return operation(types.voidptr(types.int64), lambda b, at: b.inttoptr(at, ir.IntType(8).as_pointer()))


@intrinsic
def prefetch(_context: Any, _address: Any) -> Any:
    """Ask for a cache line that is read once, soon."""

    def emit(builder: Any, address: Any) -> None:
        pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
        read, no_reuse, data = (ir.Constant(INT, value) for value in (0, 3, 1))
        emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, no_reuse, data)

    return operation(types.void(types.int64), emit)
