"""Compiled kernels, kept between starts in files whose names tell what they were compiled from.

Numba (0.68, `core.caching`) by itself looks for changes in a kernel's own file, not in those that it calls into, and
writes the index of its cache before what the index tells of. After an update, the one would give an old kernel, and the
other would give it to a process that starts in that moment: one that takes its plan for what plans were before. With a
digest of all sources in their names, files never hold anything else than what was compiled from these.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache
from numba.core.ccallback import CFunc

_PARTS = (
    "atomics",
    "attention_kernel",
    "packing",
    "parallel",
    "simd",
    "simd_int",
    "tile_products",
    "vector_ir",
)
SOURCES = [Path(__file__).with_name(f"{part}.py") for part in _PARTS]
"""What kernels are made of, beside their own files."""

# Small functions go into their callers; large ones stay apart, which compiles three times as fast.
inline = njit(inline="always", error_model="numpy")
apart = njit(error_model="numpy", no_cpython_wrapper=True)

_SIGNATURE = ((types.voidptr,), types.void)


def compile_kernel(function: Callable[[Any], None], sources: Iterable[Path]) -> Any:
    """Compile `function(plan address)`, or load it; `sources` are all files whose code or constants go into it."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]

    class Files(CompileResultCacheImpl):
        def get_filename_base(self, fullname: str, abiflags: str) -> str:
            return f"{super().get_filename_base(fullname, abiflags)}-{digest}"

    class Cache(FunctionCache):
        _impl_class = Files

    kernel: Any = CFunc(function, _SIGNATURE, locals={}, options={"error_model": "numpy"})
    try:
        kernel._cache = Cache(function)
        kernel.compile()
    except Exception:  # no folder that can be written, or files that a crash has cut: whatever pickle makes of those
        kernel._cache = NullCache()
        kernel.compile()
    return kernel


def kernel(function: Any) -> Any:
    """Compile `function(plan address)`, cached on disk where a folder can be written."""
    return compile_kernel(function, (*SOURCES, Path(inspect.getfile(function))))


def int_record(names: str) -> np.dtype[Any]:
    """Return the type of a record of int64 fields, addresses among them, which a kernel takes as its plan."""
    return np.dtype([(name, np.int64) for name in names.split()])
