"""Sixteen lanes for Numba: vectors of float32 and int32, and the few operations that Brook's kernels need.

Numba (0.68) has no vector types of its own, and LLVM's automatic vectorizer does not see through packed weights.
`f32x16` is LLVM's `<16 x float>`: one register with AVX-512, two with AVX2, four with NEON. Every function here is
a Numba intrinsic, for use inside compiled functions only. Memory is named by its address, an int64, because one
kernel walks through several layouts of one buffer; nothing needs to be aligned beyond its own element.
"""

import math
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

MANY_REGISTERS: bool = binding.get_host_cpu_features().get("avx512f", False)
"""Whether 32 vectors of sixteen lanes fit into registers; elsewhere 8 do, and what is more goes through memory."""

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_WORDS = ir.VectorType(ir.IntType(16), LANES)
_WORD_PAIRS = ir.VectorType(ir.IntType(16), 2 * LANES)


class _Vector(types.Type):
    pass


class _F32x16(_Vector):
    llvm = _FLOATS


class _I32x16(_Vector):
    llvm = _INTS


@register_model(_F32x16)
@register_model(_I32x16)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Any) -> None:
        super().__init__(manager, vector, vector.llvm)


f32x16 = _F32x16(name="f32x16")
i32x16 = _I32x16(name="i32x16")


def _operation(signature: Any, emit: Callable[..., Any]) -> Any:
    """Return what an intrinsic must: its type, and code that builds the LLVM IR of `emit(builder, *values)`."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        result = emit(builder, *values)
        return context.get_dummy_value() if signature.return_type is types.void else result

    return signature, codegen


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _load(builder: Any, address: Any, of: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, of.as_pointer()))
    loaded.align = align
    return loaded


def _store(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def _splat(builder: Any, scalar: Any, count: int = LANES) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, count), [0] * count))


def _call(builder: Any, name: str, result: Any, *values: Any, fastmath: tuple[str, ...] = ()) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, values, fastmath=fastmath)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _FLOATS, a, b, c)


@intrinsic
def splat(_context: Any, _value: Any) -> Any:
    """Return sixteen copies of a float32."""
    return _operation(f32x16(types.float32), _splat)


@intrinsic
def load(_context: Any, _address: Any) -> Any:
    """Read sixteen float32 values."""
    return _operation(f32x16(types.int64), lambda b, at: _load(b, at, _FLOATS, 4))


@intrinsic
def load_splat(_context: Any, _address: Any) -> Any:
    """Read one float32 value into every lane."""
    return _operation(f32x16(types.int64), lambda b, at: _splat(b, _load(b, at, _FLOAT, 4)))


@intrinsic
def load_halves(_context: Any, _address: Any) -> Any:
    """Read sixteen float16 values."""
    return _operation(f32x16(types.int64), lambda b, at: b.fpext(_load(b, at, _HALVES, 2), _FLOATS))


@intrinsic
def store(_context: Any, _address: Any, _vector: Any) -> Any:
    """Write sixteen float32 values."""
    return _operation(types.void(types.int64, f32x16), lambda b, at, vector: _store(b, at, vector, 4))


@intrinsic
def store_halves(_context: Any, _address: Any, _vector: Any) -> Any:
    """Round sixteen float32 values to float16 and write them."""

    def emit(builder: Any, address: Any, vector: Any) -> None:
        _store(builder, address, builder.fptrunc(vector, _HALVES), 2)

    return _operation(types.void(types.int64, f32x16), emit)


@intrinsic
def load_float(_context: Any, _address: Any) -> Any:
    """Read one float32 value."""
    return _operation(types.float32(types.int64), lambda b, at: _load(b, at, _FLOAT, 4))


@intrinsic
def store_float(_context: Any, _address: Any, _scalar: Any) -> Any:
    """Write one float32 value."""
    return _operation(types.void(types.int64, types.float32), lambda b, at, scalar: _store(b, at, scalar, 4))


@intrinsic
def add(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a + b."""
    return _operation(f32x16(f32x16, f32x16), lambda b, x, y: b.fadd(x, y))


@intrinsic
def multiply(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a * b."""
    return _operation(f32x16(f32x16, f32x16), lambda b, x, y: b.fmul(x, y))


@intrinsic
def divide(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a / b."""
    return _operation(f32x16(f32x16, f32x16), lambda b, x, y: b.fdiv(x, y))


@intrinsic
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return _operation(f32x16(f32x16, f32x16, f32x16), _fma)


@intrinsic
def magnitude(_context: Any, _vector: Any) -> Any:
    """Return |vector|."""
    return _operation(f32x16(f32x16), lambda b, vector: _call(b, "llvm.fabs.v16f32", _FLOATS, vector))


@intrinsic
def larger(_context: Any, _a: Any, _b: Any) -> Any:
    """Return max(a, b)."""
    return _operation(f32x16(f32x16, f32x16), lambda b, x, y: _call(b, "llvm.maxnum.v16f32", _FLOATS, x, y))


@intrinsic
def total(_context: Any, _vector: Any) -> Any:
    """Return the sum of the lanes, in any order, as a float32."""

    def emit(builder: Any, vector: Any) -> Any:
        name, zero = "llvm.vector.reduce.fadd.v16f32", ir.Constant(_FLOAT, -0.0)
        return _call(builder, name, _FLOAT, zero, vector, fastmath=("reassoc",))

    return _operation(types.float32(f32x16), emit)


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
            return _load(builder, builder.add(address, ir.Constant(address.type, offset)), _FLOATS, 4)

        others = [at(vector, 64 * part) for part in range(4)]

        def dots(count: int, row: int) -> Any:
            """Return the sums of `count` rows, each still spread over 16 / count lanes."""
            if count == 1:
                product = builder.fmul(at(rows, 256 * row), others[0])
                for part in range(1, 4):
                    product = _fma(builder, at(rows, 256 * row + 64 * part), others[part], product)
                return product
            lanes, distance, row_step = _FOLDS[count]
            low, high = dots(count // 2, row), dots(count // 2, row + row_step)
            near, far = (ir.Constant(_INTS, [lane + shift for lane in lanes]) for shift in (0, distance))
            return builder.fadd(builder.shuffle_vector(low, high, near), builder.shuffle_vector(low, high, far))

        return dots(LANES, 0)

    return _operation(f32x16(types.int64, types.int64), emit)


@intrinsic
def largest(_context: Any, _vector: Any) -> Any:
    """Return the largest lane as a float32."""
    name = "llvm.vector.reduce.fmax.v16f32"
    return _operation(types.float32(f32x16), lambda b, vector: _call(b, name, _FLOAT, vector))


@intrinsic
def exp(_context: Any, _vector: Any) -> Any:
    """Return e to the power of each lane, to about 1e-7 of its value; outside -87 to 88 that of the nearer end.

    The scheme of Cephes' expf: the power of two goes into the exponent's bits, and a polynomial gives the rest.
    """

    def emit(builder: Any, x: Any) -> Any:
        x = _call(builder, "llvm.maxnum.v16f32", _FLOATS, x, _constant(_FLOATS, -87.0))
        x = _call(builder, "llvm.minnum.v16f32", _FLOATS, x, _constant(_FLOATS, 88.0))
        n = _call(builder, "llvm.rint.v16f32", _FLOATS, builder.fmul(x, _constant(_FLOATS, 1 / math.log(2))))
        rest = _fma(builder, n, _constant(_FLOATS, -0.693359375), x)
        rest = _fma(builder, n, _constant(_FLOATS, 2.12194440054690583e-4), rest)
        power = _constant(_FLOATS, 1 / 5040)
        for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            power = _fma(builder, power, rest, _constant(_FLOATS, factor))
        exponent = builder.add(builder.fptosi(n, _INTS), _constant(_INTS, 127))
        return builder.fmul(power, builder.bitcast(builder.shl(exponent, _constant(_INTS, 23)), _FLOATS))

    return _operation(f32x16(f32x16), emit)


@intrinsic
def int_load(_context: Any, _address: Any) -> Any:
    """Read sixteen int32 values."""
    return _operation(i32x16(types.int64), lambda b, at: _load(b, at, _INTS, 4))


@intrinsic
def int_load_splat(_context: Any, _address: Any) -> Any:
    """Read one int32 value into every lane."""
    return _operation(i32x16(types.int64), lambda b, at: _splat(b, _load(b, at, _INT, 4)))


@intrinsic
def int_zero(_context: Any) -> Any:
    """Return sixteen zeros."""
    return _operation(i32x16(), lambda _b: _constant(_INTS, 0))


@intrinsic
def int_add(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a + b."""
    return _operation(i32x16(i32x16, i32x16), lambda b, x, y: b.add(x, y))


@intrinsic
def int_store(_context: Any, _address: Any, _scalar: Any) -> Any:
    """Write one int32 value."""
    signature = types.void(types.int64, types.int64)
    return _operation(signature, lambda b, at, scalar: _store(b, at, b.trunc(scalar, _INT), 4))


@intrinsic
def to_float(_context: Any, _ints: Any) -> Any:
    """Return int32 lanes as float32."""
    return _operation(f32x16(i32x16), lambda b, ints: b.sitofp(ints, _FLOATS))


@intrinsic
def field(_context: Any, _ints: Any, _shift: Any, _mask: Any) -> Any:
    """Return (lane >> shift) & mask of each 32-bit lane."""

    def emit(builder: Any, ints: Any, shift: Any, mask: Any) -> Any:
        shift, mask = (_splat(builder, builder.trunc(each, _INT)) for each in (shift, mask))
        return builder.and_(builder.lshr(ints, shift), mask)

    return _operation(i32x16(i32x16, types.int64, types.int64), emit)


@intrinsic
def word_field(_context: Any, _ints: Any, _shift: Any, _mask: Any) -> Any:
    """Return (word >> shift) & mask of both 16-bit words of each lane."""

    def emit(builder: Any, ints: Any, shift: Any, mask: Any) -> Any:
        shift, mask = (_splat(builder, builder.trunc(each, ir.IntType(16)), 2 * LANES) for each in (shift, mask))
        return builder.bitcast(builder.and_(builder.lshr(builder.bitcast(ints, _WORD_PAIRS), shift), mask), _INTS)

    return _operation(i32x16(i32x16, types.int64, types.int64), emit)


@intrinsic
def multiply_words(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """Return c + a.low * b.low + a.high * b.high, of the signed 16-bit words of each lane (x86's pmaddwd)."""

    def emit(builder: Any, a: Any, b: Any, c: Any) -> Any:
        wide = ir.VectorType(_INT, 2 * LANES)
        a, b = (builder.sext(builder.bitcast(each, _WORD_PAIRS), wide) for each in (a, b))
        product, undefined = builder.mul(a, b), ir.Constant(wide, ir.Undefined)
        low, high = (
            builder.shuffle_vector(product, undefined, ir.Constant(_INTS, list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return builder.add(c, builder.add(low, high))

    return _operation(i32x16(i32x16, i32x16, i32x16), emit)


@intrinsic
def store_words(_context: Any, _address: Any, _vector: Any) -> Any:
    """Round sixteen float32 values to the nearest integers, write them as int16 and return their sum as int64."""

    def emit(builder: Any, address: Any, vector: Any) -> Any:
        ints = builder.fptosi(_call(builder, "llvm.rint.v16f32", _FLOATS, vector), _INTS)
        _store(builder, address, builder.trunc(ints, _WORDS), 2)
        return builder.sext(_call(builder, "llvm.vector.reduce.add.v16i32", _INT, ints), ir.IntType(64))

    return _operation(types.int64(types.int64, f32x16), emit)


@intrinsic
def pointer(_context: Any, _address: Any) -> Any:
    """Return an address as a pointer that `numba.carray` takes."""
    return _operation(types.voidptr(types.int64), lambda b, at: b.inttoptr(at, ir.IntType(8).as_pointer()))


@intrinsic
def atomic_add(_context: Any, _address: Any, _value: Any) -> Any:
    """Add to an int32 that threads share and return what it was before; a full memory barrier."""

    def emit(builder: Any, address: Any, value: Any) -> Any:
        at = builder.inttoptr(address, _INT.as_pointer())
        return builder.sext(builder.atomic_rmw("add", at, builder.trunc(value, _INT), "seq_cst"), ir.IntType(64))

    return _operation(types.int64(types.int64, types.int64), emit)


@intrinsic
def atomic_load(_context: Any, _address: Any) -> Any:
    """Read an int32 that threads share; what its writer wrote before is visible afterwards."""

    def emit(builder: Any, address: Any) -> Any:
        value = builder.load_atomic(builder.inttoptr(address, _INT.as_pointer()), "acquire", align=4)
        return builder.sext(value, ir.IntType(64))

    return _operation(types.int64(types.int64), emit)


@intrinsic
def prefetch(_context: Any, _address: Any) -> Any:
    """Ask for a cache line that is read once, soon."""

    def emit(builder: Any, address: Any) -> None:
        pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
        read, no_reuse, data = (ir.Constant(_INT, value) for value in (0, 3, 1))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, no_reuse, data)

    return _operation(types.void(types.int64), emit)
