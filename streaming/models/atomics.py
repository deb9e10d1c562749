"""Counters that threads share, for Numba: int32, named by their addresses, as in `simd`."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streaming.models.vector_ir import INT, operation


@intrinsic
def add(_context: Any, _address: Any, _value: Any) -> Any:
    """Add to an int32 that threads share and return what it was before; a full memory barrier."""

    def emit(builder: Any, address: Any, value: Any) -> Any:
        at = builder.inttoptr(address, INT.as_pointer())
        return builder.sext(builder.atomic_rmw("add", at, builder.trunc(value, INT), "seq_cst"), ir.IntType(64))

    return operation(types.int64(types.int64, types.int64), emit)


@intrinsic
def load(_context: Any, _address: Any) -> Any:
    """Read an int32 that threads share; what its writer wrote before is visible afterwards."""

    def emit(builder: Any, address: Any) -> Any:
        value = builder.load_atomic(builder.inttoptr(address, INT.as_pointer()), "acquire", align=4)
        return builder.sext(value, ir.IntType(64))

    return operation(types.int64(types.int64), emit)
