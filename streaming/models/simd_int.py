"""Sixteen lanes of int32 for Numba, and the packed fields in them: what multiplying packed weights needs.

As in `simd`, every function is an intrinsic, and memory is named by its address.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streaming.models.vector_ir import (
    FLOATS,
    INT,
    INTS,
    LANES,
    emit_call,
    emit_constant,
    emit_load,
    emit_splat,
    emit_store,
    f32x16,
    i32x16,
    operation,
)

_WORDS = ir.VectorType(ir.IntType(16), LANES)
_WORD_PAIRS = ir.VectorType(ir.IntType(16), 2 * LANES)


@intrinsic
def load(_context: Any, _address: Any) -> Any:
    """Read sixteen int32 values."""
    return operation(i32x16(types.int64), lambda b, at: emit_load(b, at, INTS, 4))


@intrinsic
def load_splat(_context: Any, _address: Any) -> Any:
    """Read one int32 value into every lane."""
    return operation(i32x16(types.int64), lambda b, at: emit_splat(b, emit_load(b, at, INT, 4)))


@intrinsic
def zero(_context: Any) -> Any:
    """Return sixteen zeros."""
    return operation(i32x16(), lambda _b: emit_constant(INTS, 0))


@intrinsic
def add(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a + b."""
    return operation(i32x16(i32x16, i32x16), lambda b, x, y: b.add(x, y))


@intrinsic
def store(_context: Any, _address: Any, _scalar: Any) -> Any:
    """Write one int32 value."""
    signature = types.void(types.int64, types.int64)
    return operation(signature, lambda b, at, scalar: emit_store(b, at, b.trunc(scalar, INT), 4))


@intrinsic
def to_float(_context: Any, _ints: Any) -> Any:
    """Return int32 lanes as float32."""
    return operation(f32x16(i32x16), lambda b, ints: b.sitofp(ints, FLOATS))


@intrinsic
def field(_context: Any, _ints: Any, _shift: Any, _mask: Any) -> Any:
    """Return (lane >> shift) & mask of each 32-bit lane."""

    def emit(builder: Any, ints: Any, shift: Any, mask: Any) -> Any:
        shift, mask = (emit_splat(builder, builder.trunc(each, INT)) for each in (shift, mask))
        return builder.and_(builder.lshr(ints, shift), mask)

    return operation(i32x16(i32x16, types.int64, types.int64), emit)


@intrinsic
def word_field(_context: Any, _ints: Any, _shift: Any, _mask: Any) -> Any:
    """Return (word >> shift) & mask of both 16-bit words of each lane."""

    def emit(builder: Any, ints: Any, shift: Any, mask: Any) -> Any:
        shift, mask = (emit_splat(builder, builder.trunc(each, ir.IntType(16)), 2 * LANES) for each in (shift, mask))
        return builder.bitcast(builder.and_(builder.lshr(builder.bitcast(ints, _WORD_PAIRS), shift), mask), INTS)

    return operation(i32x16(i32x16, types.int64, types.int64), emit)


@intrinsic
def multiply_words(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return c + a.low * b.low + a.high * b.high, of the signed 16-bit words of each lane (x86's pmaddwd)."""

    def emit(builder: Any, a: Any, b: Any, c: Any) -> Any:
        wide = ir.VectorType(INT, 2 * LANES)
        a, b = (builder.sext(builder.bitcast(each, _WORD_PAIRS), wide) for each in (a, b))
        product, undefined = builder.mul(a, b), ir.Constant(wide, ir.Undefined)
        low, high = (
            builder.shuffle_vector(product, undefined, ir.Constant(INTS, list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return builder.add(c, builder.add(low, high))

    return operation(i32x16(i32x16, i32x16, i32x16), emit)


@intrinsic
def store_words(_context: Any, _address: Any, _vector: Any) -> Any:
    """Round sixteen float32 values to the nearest integers, write them as int16 and return their sum as int64."""

    def emit(builder: Any, address: Any, vector: Any) -> Any:
        ints = builder.fptosi(emit_call(builder, "llvm.rint.v16f32", FLOATS, vector), INTS)
        emit_store(builder, address, builder.trunc(ints, _WORDS), 2)
        return builder.sext(emit_call(builder, "llvm.vector.reduce.add.v16i32", INT, ints), ir.IntType(64))

    return operation(types.int64(types.int64, f32x16), emit)
