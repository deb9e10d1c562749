"""Compiled kernels, kept between starts in files whose names tell what they were compiled from.

Numba (0.68, `core.caching`) by itself looks for changes in a kernel's own file, not in those that it calls into, and
writes the index of its cache before what the index tells of. After an update, the one would give an old kernel, and the
other would give it to a process that starts in that moment: one that takes its plan for what plans were before. With a
digest of all sources in their names, files never hold anything else than what was compiled from these.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache
from numba.core.ccallback import CFunc

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
