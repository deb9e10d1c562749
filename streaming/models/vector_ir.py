"""What Numba's intrinsics for vectors of sixteen lanes are made of: their types, and the LLVM IR that functions emit.

Numba (0.68) has no vector types of its own, and LLVM's automatic vectorizer does not see through packed weights.
`f32x16` is LLVM's `<16 x float>`: one register with AVX-512, two with AVX2, four with NEON.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

LANES = 16

FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT, LANES)


class _Vector(types.Type):
    pass


class _F32x16(_Vector):
    llvm = FLOATS


class _I32x16(_Vector):
    llvm = INTS


@register_model(_F32x16)
@register_model(_I32x16)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Any) -> None:
        super().__init__(manager, vector, vector.llvm)


f32x16 = _F32x16(name="f32x16")
i32x16 = _I32x16(name="i32x16")


def operation(signature: Any, emit: Callable[..., Any]) -> Any:
    """Return what an intrinsic must: its type, and code that builds the LLVM IR of `emit(builder, *values)`."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        result = emit(builder, *values)
        return context.get_dummy_value() if signature.return_type is types.void else result

    return signature, codegen


def emit_constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def emit_load(builder: Any, address: Any, of: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, of.as_pointer()))
    loaded.align = align
    return loaded


def emit_store(builder: Any, address: Any, value: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def emit_splat(builder: Any, scalar: Any, count: int = LANES) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT, count), [0] * count))


def emit_call(builder: Any, name: str, result: Any, *values: Any, fastmath: tuple[str, ...] = ()) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, values, fastmath=fastmath)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return emit_call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)
