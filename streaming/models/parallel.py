"""Compiled kernels on the threads that PyTorch already has.

A kernel runs once on every thread of an OpenMP team and shares out its work by its own thread number. The team is
libgomp's, the one inside PyTorch's wheels for Linux: a second pool would fight with PyTorch's, whose idle threads
spin for milliseconds. Where libgomp is not loaded (macOS, Windows) a kernel runs on the calling thread alone.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from llvmlite import binding
from numba import types

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())


def _find_gomp() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    return ctypes.CDLL(min(paths)) if paths else None


# Imported before this module, PyTorch has loaded its libgomp.
_gomp = _find_gomp()
_alone = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
for _symbol in ("omp_get_thread_num", "GOMP_barrier"):
    binding.add_symbol(_symbol, ctypes.cast(getattr(_gomp, _symbol, _alone), ctypes.c_void_p).value)

_Run = Callable[[int, int, int], Any]


@cache
def _gomp_parallel() -> _Run:
    function = _gomp.GOMP_parallel  # type: ignore[union-attr]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return lambda kernel, plan, n_threads: function(kernel, plan, n_threads, 0)


def run(kernel: Any, plan: int, n_threads: int) -> None:
    """Call `kernel`, a Numba cfunc of one pointer, with the address `plan` on `n_threads` threads; wait for all.

    The kernel must be told the same `n_threads` through its plan. The caller's GIL is released meanwhile.
    """
    if n_threads == 1:
        kernel.ctypes(plan)
    else:
        _gomp_parallel()(kernel.address, plan, n_threads)


def team_size() -> int:
    """Return how many threads a kernel should get: as many as PyTorch's own operators."""
    return torch.get_num_threads() if _gomp is not None else 1


def usable_cores() -> int:
    """Return how many physical cores this process may use: what the machine, its affinity and its cgroup leave."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(cores, int(_cgroup_limit())))


def _cgroup_limit() -> float:
    """Return the CPUs that the container may use, infinite where there is no limit (cgroup v2, then v1)."""
    v2, v1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    if v2.exists():
        quota, period = v2.read_text().split()
    elif v1.exists():
        quota, period = v1.read_text(), v1.with_name("cpu.cfs_period_us").read_text()
    else:
        return 1e9
    return 1e9 if quota.strip() in {"max", "-1"} else int(quota) / int(period)

