"""Compiled kernels on the threads that PyTorch already has.

A kernel runs once on every thread of an OpenMP team. The team is libgomp's, the one inside PyTorch's wheels for
Linux: a second pool would fight with PyTorch's, whose idle threads spin for milliseconds. Where libgomp is not
loaded (macOS, Windows) a kernel runs on the calling thread alone.

Work that depends on other work is cut into phases and these into units. A thread takes the units of its own share one
by one, the same ones each time, so that its core's caches know them; then those that others have not come to. A thread
that the system has stopped thus holds up the others for no more than the unit in its hands, and whoever waits sleeps
after some microseconds. (libgomp's barrier spins for some 15 ms: beside another busy process, it made a step of 150
phases fifty times slower.)
"""

import ctypes
import math
import os
import platform
import time
import timeit
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from llvmlite import binding
from numba import njit, types

from streaming.models import atomics

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
_system_call = types.ExternalFunction("syscall", types.int64(*[types.int64] * 5))

_TUNING_S = 0.1

# Linux: <asm/unistd.h>, <linux/futex.h>.
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129
_EVERY_WAITER = 2**31 - 1

# Longer than a unit of work usually takes, far shorter than a time slice.
_SPINS = 2000

# A phase's counters, int32: units done, whether a thread sleeps until all are, and units taken of each thread's share.
_SLEEPERS, _TAKEN = 4, 8


def _find_gomp() -> ctypes.CDLL | None:
    """Return PyTorch's libgomp: other packages bring their own, and a second pool's threads get in the way."""
    path = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    library = ctypes.CDLL(str(path)) if path.exists() else None  # symbols of what it depends on come with it
    return library if hasattr(library, "GOMP_parallel") else None


_gomp = _find_gomp()
# What a thread without a team finds: it is number 0 of 1.
_alone = {
    symbol: ctypes.CFUNCTYPE(ctypes.c_int)(lambda value=value: value)
    for symbol, value in (("omp_get_thread_num", 0), ("omp_get_num_threads", 1))
}
for _symbol, _answer in _alone.items():
    binding.add_symbol(_symbol, ctypes.cast(getattr(_gomp, _symbol, _answer), ctypes.c_void_p).value)

_Run = Callable[[int, int, int], Any]


@cache
def _gomp_parallel() -> _Run:
    function = _gomp.GOMP_parallel  # type: ignore[union-attr]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return lambda kernel, plan, n_threads: function(kernel, plan, n_threads, 0)


def run(kernel: Any, plan: int, n_threads: int) -> None:
    """Call `kernel`, a Numba cfunc of one pointer, with the address `plan` on up to `n_threads` threads; wait for all.

    OpenMP may give fewer threads (OMP_DYNAMIC, OMP_THREAD_LIMIT): the kernel asks `thread_count`, or has whoever is
    there take all the units. The caller's GIL is released meanwhile.
    """
    if n_threads == 1:
        kernel.ctypes(plan)
    else:
        _gomp_parallel()(kernel.address, plan, n_threads)


def team_size() -> int:
    """Return how many threads a kernel should get: as many as PyTorch's own operators."""
    return torch.get_num_threads() if _gomp is not None else 1


def tune_threads(work: Callable[[], Any]) -> None:
    """Set this thread's thread count for PyTorch to the most that does `work`, within 10 %, as fast as any.

    Takes a tenth of a second, or twice the work for each count. OMP_NUM_THREADS, where set, is left as the last word.
    """
    if _gomp is None or "OMP_NUM_THREADS" in os.environ:
        return
    counts = sorted({*(2**power for power in range(10)), usable_cores()})
    times_s = {n_threads: math.inf for n_threads in counts if n_threads <= usable_cores()}
    until = time.monotonic() + _TUNING_S
    while math.inf in times_s.values() or time.monotonic() < until:
        for n_threads in times_s:  # in turn, so that a busy moment hits all
            torch.set_num_threads(n_threads)
            work()  # starts the threads
            times_s[n_threads] = min(times_s[n_threads], timeit.timeit(work, number=1))
    torch.set_num_threads(max(n for n, time_s in times_s.items() if time_s <= 1.1 * min(times_s.values())))


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


def phase_bytes(n_threads: int) -> int:
    """Return the size of a phase's counters, which begin as zeros."""
    return _TAKEN + 4 * n_threads


@njit(inline="always")
def first(count, thread, n_threads):
    """Return where a thread's share of `count` units begins; the next thread's begin is its end."""
    return count * thread // n_threads


@njit(error_model="numpy")
def take_unit(phase, n_units, thread, n_threads):
    """Return a unit that no thread has taken, of the thread's own share while there is one, or -1."""
    for step in range(n_threads):
        owner = (thread + step) % n_threads
        start = first(n_units, owner, n_threads)
        share = first(n_units, owner + 1, n_threads) - start
        taken = phase + _TAKEN + 4 * owner
        if atomics.load(taken) < share:
            unit = atomics.add(taken, 1)
            if unit < share:
                return start + unit
    return -1


@njit(inline="always")
def finish_unit(phase, n_units):
    """Say that a taken unit is done; the last one wakes whoever sleeps."""
    done = atomics.add(phase, 1) + 1
    if done == n_units and atomics.load(phase + _SLEEPERS) != 0:
        _system_call(_FUTEX, phase, _WAKE_PRIVATE, _EVERY_WAITER, 0)


@njit(error_model="numpy")
def wait_for_phase(phase, n_units):
    """Return when every unit of a phase is done; what they wrote is then visible."""
    spins = 0
    done = atomics.load(phase)
    while done != n_units:
        spins += 1
        if spins > _SPINS:
            atomics.add(phase + _SLEEPERS, 1)
            done = atomics.load(phase)
            if done != n_units:
                _system_call(_FUTEX, phase, _WAIT_PRIVATE, done, 0)
        done = atomics.load(phase)
