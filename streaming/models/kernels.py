"""Compiled kernels over packed weights: multiply a few rows, or unpack for a matrix multiplication.

Weights are taken as they are, with their exact scales. Activations are rounded to 16 bits within each group of 32,
so that a multiplication of pairs of 16-bit integers, which every x86 and Arm vector unit has, does the work: twice
as fast as float32 and, at a relative error of about 1e-5, as good. Compiled by Numba on first import (seconds),
afterwards read from its cache on disk.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from streaming.models import parallel, simd
from streaming.models.kernel_cache import compile_kernel
from streaming.models.packing import BLOCK_BYTES, GROUP_COLUMNS, TILE_ROWS
from streaming.models.parallel import first, thread_number

_PARTS = ("attention_kernel", "kernels", "packing", "parallel", "simd")
SOURCES = [Path(__file__).with_name(f"{part}.py") for part in _PARTS]
"""What kernels are made of, beside their own files."""

_Q4 = BLOCK_BYTES[4]
_FLOAT = 4
_GROUP_BYTES = GROUP_COLUMNS * _FLOAT
TILE_BYTES = TILE_ROWS * _FLOAT

# A group of activations: int16[32], float32 scale, float32 sum (for weights with an offset), and int32
# -128 * sum of the int16 (for weights whose steps count from 128).
ROUNDED_BYTES = 76
_SCALE, _SUM, _CORRECTION = 64, 68, 72

# Unpacked weights of this many bytes stay in the second-level cache between unpacking and multiplying.
_UNPACK_BYTES = 1 << 20

ROWS_AT_ONCE = 4

# Small functions go into their callers; large ones stay apart, which compiles three times as fast.
_PREFETCH_BYTES = 2048

inline = njit(inline="always", error_model="numpy")
apart = njit(error_model="numpy", no_cpython_wrapper=True)


def kernel(function: Any) -> Any:
    """Compile `function(plan address)`, cached on disk where a folder can be written."""
    return compile_kernel(function, (*SOURCES, Path(inspect.getfile(function))))


@apart
def round_activations(x, rounded, groups):
    """Write the float32 values at `x` as `groups` groups of ROUNDED_BYTES to `rounded`."""
    for _ in range(groups):
        low, high = simd.load(x), simd.load(x + TILE_BYTES)
        top = simd.largest(simd.larger(simd.magnitude(low), simd.magnitude(high)))
        factor = simd.splat(np.float32(32767) / top if top > 0 else np.float32(0))
        steps = simd.store_words(rounded, simd.multiply(low, factor))
        steps += simd.store_words(rounded + 32, simd.multiply(high, factor))
        simd.store_float(rounded + _SCALE, top * np.float32(1 / 32767))
        simd.store_float(rounded + _SUM, simd.total(simd.add(low, high)))
        simd.int_store(rounded + _CORRECTION, -128 * steps)
        x += _GROUP_BYTES
        rounded += ROUNDED_BYTES


@inline
def _pairs_4(words, x, even, odd):
    """Add 8 columns of 4 bits times the 8 activations at `x` to two accumulators."""
    even = simd.multiply_words(simd.word_field(words, 0, 15), simd.int_load_splat(x), even)
    odd = simd.multiply_words(simd.word_field(words, 4, 15), simd.int_load_splat(x + 4), odd)
    even = simd.multiply_words(simd.word_field(words, 8, 15), simd.int_load_splat(x + 8), even)
    odd = simd.multiply_words(simd.word_field(words, 12, 15), simd.int_load_splat(x + 12), odd)
    return even, odd


@inline
def _pairs_8(words, x, even, odd):
    """Add 4 columns of 8 bits times the 4 activations at `x` to two accumulators."""
    even = simd.multiply_words(simd.word_field(words, 0, 255), simd.int_load_splat(x), even)
    odd = simd.multiply_words(simd.word_field(words, 8, 255), simd.int_load_splat(x + 4), odd)
    return even, odd


@apart
def tile_dot(weight, block_bytes, tile, x, groups):
    """Return 16 rows of weight @ x, for rounded activations at `x`."""
    acc = simd.splat(np.float32(0))
    block = weight + tile * groups * block_bytes
    if block_bytes == _Q4:
        for _ in range(groups):
            even, odd = simd.int_zero(), simd.int_zero()
            for j in range(5):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(4):
                even, odd = _pairs_4(simd.int_load(block + 64 + 64 * j), x + 16 * j, even, odd)
            scale = simd.multiply(simd.load_halves(block), simd.load_splat(x + _SCALE))
            acc = simd.fma(scale, simd.add(simd.to_float(even), simd.to_float(odd)), acc)
            acc = simd.fma(simd.load_halves(block + 32), simd.load_splat(x + _SUM), acc)
            block += block_bytes
            x += ROUNDED_BYTES
    else:
        for _ in range(groups):
            even, odd = simd.int_load_splat(x + _CORRECTION), simd.int_zero()
            for j in range(9):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(8):
                even, odd = _pairs_8(simd.int_load(block + 32 + 64 * j), x + 8 * j, even, odd)
            scale = simd.multiply(simd.load_halves(block), simd.load_splat(x + _SCALE))
            acc = simd.fma(scale, simd.to_float(simd.int_add(even, odd)), acc)
            block += block_bytes
            x += ROUNDED_BYTES
    return acc


@inline
def _dots_4(words, shift, x, row_bytes, a, b, c, d):
    """Add 2 columns of 4 bits (of 32-bit lanes) times 2 activations of each of four rows to their accumulators."""
    steps = simd.word_field(words, shift, 15)
    a = simd.multiply_words(steps, simd.int_load_splat(x), a)
    b = simd.multiply_words(steps, simd.int_load_splat(x + row_bytes), b)
    c = simd.multiply_words(steps, simd.int_load_splat(x + 2 * row_bytes), c)
    d = simd.multiply_words(steps, simd.int_load_splat(x + 3 * row_bytes), d)
    return a, b, c, d


@inline
def _dots_8(words, shift, x, row_bytes, a, b, c, d):
    """The same of 8 bits."""
    steps = simd.word_field(words, shift, 255)
    a = simd.multiply_words(steps, simd.int_load_splat(x), a)
    b = simd.multiply_words(steps, simd.int_load_splat(x + row_bytes), b)
    c = simd.multiply_words(steps, simd.int_load_splat(x + 2 * row_bytes), c)
    d = simd.multiply_words(steps, simd.int_load_splat(x + 3 * row_bytes), d)
    return a, b, c, d


@inline
def _add_group(block, block_bytes, even, odd, x, acc):
    """Add a group's integer products, scaled, and the weights' offset to a row's accumulator."""
    scale = simd.multiply(simd.load_halves(block), simd.load_splat(x + _SCALE))
    acc = simd.fma(scale, simd.to_float(simd.int_add(even, odd)), acc)
    if block_bytes == _Q4:
        acc = simd.fma(simd.load_halves(block + 32), simd.load_splat(x + _SUM), acc)
    return acc


@apart
def _four_tile_dots(weight, block_bytes, tile, x, row_bytes, groups, out, out_bytes):
    """Write 16 rows of weight @ x for four rows of rounded activations, `row_bytes` apart, to `out_bytes` apart."""
    a = simd.splat(np.float32(0))
    b, c, d = a, a, a
    block = weight + tile * groups * block_bytes
    for _ in range(groups):
        if block_bytes == _Q4:
            e0 = simd.int_zero()
            e1, e2, e3, o0, o1, o2, o3 = e0, e0, e0, e0, e0, e0, e0
            f0, f1, f2, f3, p0, p1, p2, p3 = e0, e0, e0, e0, e0, e0, e0, e0
            for j in range(5):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(4):
                words, at = simd.int_load(block + 64 + 64 * j), x + 16 * j
                e0, e1, e2, e3 = _dots_4(words, 0, at, row_bytes, e0, e1, e2, e3)
                if simd.MANY_REGISTERS:
                    # Each sum grows once a round: of two growths LLVM makes multiplications and additions of their own.
                    o0, o1, o2, o3 = _dots_4(words, 4, at + 4, row_bytes, o0, o1, o2, o3)
                    f0, f1, f2, f3 = _dots_4(words, 8, at + 8, row_bytes, f0, f1, f2, f3)
                    p0, p1, p2, p3 = _dots_4(words, 12, at + 12, row_bytes, p0, p1, p2, p3)
                else:
                    e0, e1, e2, e3 = _dots_4(words, 4, at + 4, row_bytes, e0, e1, e2, e3)
                    e0, e1, e2, e3 = _dots_4(words, 8, at + 8, row_bytes, e0, e1, e2, e3)
                    e0, e1, e2, e3 = _dots_4(words, 12, at + 12, row_bytes, e0, e1, e2, e3)
            e0, o0 = simd.int_add(e0, f0), simd.int_add(o0, p0)
            e1, o1 = simd.int_add(e1, f1), simd.int_add(o1, p1)
            e2, o2 = simd.int_add(e2, f2), simd.int_add(o2, p2)
            e3, o3 = simd.int_add(e3, f3), simd.int_add(o3, p3)
        else:
            e0, e1 = simd.int_load_splat(x + _CORRECTION), simd.int_load_splat(x + row_bytes + _CORRECTION)
            e2 = simd.int_load_splat(x + 2 * row_bytes + _CORRECTION)
            e3 = simd.int_load_splat(x + 3 * row_bytes + _CORRECTION)
            o0 = simd.int_zero()
            o1, o2, o3 = o0, o0, o0
            for j in range(9):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(8):
                words, at = simd.int_load(block + 32 + 64 * j), x + 8 * j
                e0, e1, e2, e3 = _dots_8(words, 0, at, row_bytes, e0, e1, e2, e3)
                if simd.MANY_REGISTERS:
                    o0, o1, o2, o3 = _dots_8(words, 8, at + 4, row_bytes, o0, o1, o2, o3)
                else:
                    e0, e1, e2, e3 = _dots_8(words, 8, at + 4, row_bytes, e0, e1, e2, e3)
        a = _add_group(block, block_bytes, e0, o0, x, a)
        b = _add_group(block, block_bytes, e1, o1, x + row_bytes, b)
        c = _add_group(block, block_bytes, e2, o2, x + 2 * row_bytes, c)
        d = _add_group(block, block_bytes, e3, o3, x + 3 * row_bytes, d)
        block += block_bytes
        x += ROUNDED_BYTES
    simd.store(out, a)
    simd.store(out + out_bytes, b)
    simd.store(out + 2 * out_bytes, c)
    simd.store(out + 3 * out_bytes, d)


@apart
def tile_dots(weight, block_bytes, tile, x, row_bytes, groups, rows, out, out_bytes):
    """Write 16 rows of weight @ x for `rows` rows of rounded activations, `row_bytes` apart, to `out_bytes` apart.

    Four rows at a time share the unpacking of the weights: both buffers must have room for rows by fours.
    """
    row = 0
    while row < rows:
        at, to = x + row * row_bytes, out + row * out_bytes
        if row == rows - 1:
            simd.store(to, tile_dot(weight, block_bytes, tile, at, groups))
        else:
            _four_tile_dots(weight, block_bytes, tile, at, row_bytes, groups, to, out_bytes)
        row += ROWS_AT_ONCE


def int_record(names: str) -> np.dtype[Any]:
    """Return the type of a record of int64 fields, addresses among them, which a kernel takes as its plan."""
    return np.dtype([(name, np.int64) for name in names.split()])


_MULTIPLY = int_record("weight block_bytes tiles groups x rounded y rows rows_room n_threads")
_UNPACK = int_record("weight block_bytes tiles groups out n_threads")
_TAKE = int_record("weight block_bytes groups rows count lanes out")

# Row i selects lane i of a vector.
_LANES = np.eye(TILE_ROWS, dtype=np.float32)


@kernel
def _multiply(address):
    plan = carray(address, 1, _MULTIPLY)[0]
    thread, groups, y_bytes = thread_number(), plan.groups, plan.tiles * TILE_BYTES
    row_bytes = groups * ROUNDED_BYTES
    x = plan.rounded + thread * plan.rows_room * row_bytes
    round_activations(plan.x, x, plan.rows * groups)
    for tile in range(first(plan.tiles, thread, plan.n_threads), first(plan.tiles, thread + 1, plan.n_threads)):
        y = plan.y + tile * TILE_BYTES
        tile_dots(plan.weight, plan.block_bytes, tile, x, row_bytes, groups, plan.rows, y, y_bytes)


@inline
def _column(block, block_bytes, column):
    """Return one column's steps of a block's 16 rows, less their zero point."""
    if block_bytes == _Q4:
        words = simd.int_load(block + 64 + column // 8 * 64)
        return simd.to_float(simd.field(words, 16 * (column % 2) + 4 * (column % 8 // 2), 15))
    words = simd.int_load(block + 32 + column // 4 * 64)
    steps = simd.to_float(simd.field(words, 16 * (column % 2) + 8 * (column % 4 // 2), 255))
    return simd.add(steps, simd.splat(np.float32(-128)))


@kernel
def _unpack_columns(address):
    plan = carray(address, 1, _UNPACK)[0]
    thread, groups, block_bytes = thread_number(), plan.groups, plan.block_bytes
    row_bytes = plan.tiles * TILE_BYTES
    for tile in range(first(plan.tiles, thread, plan.n_threads), first(plan.tiles, thread + 1, plan.n_threads)):
        for g in range(groups):
            block = plan.weight + (tile * groups + g) * block_bytes
            out = plan.out + g * GROUP_COLUMNS * row_bytes + tile * TILE_BYTES
            scale = simd.load_halves(block)
            offset = simd.load_halves(block + 32) if block_bytes == _Q4 else simd.splat(np.float32(0))
            for column in range(GROUP_COLUMNS):
                simd.store(out + column * row_bytes, simd.fma(scale, _column(block, block_bytes, column), offset))


@kernel
def _take_rows(address):
    plan = carray(address, 1, _TAKE)[0]
    rows = carray(simd.pointer(plan.rows), plan.count, np.int64)
    for i in range(plan.count):
        lane = simd.load(plan.lanes + rows[i] % TILE_ROWS * TILE_BYTES)
        for g in range(plan.groups):
            block = plan.weight + (rows[i] // TILE_ROWS * plan.groups + g) * plan.block_bytes
            out = plan.out + (i * plan.groups + g) * _GROUP_BYTES
            scale = simd.total(simd.multiply(lane, simd.load_halves(block)))
            offset = simd.total(simd.multiply(lane, simd.load_halves(block + 32))) if plan.block_bytes == _Q4 else 0.0
            for column in range(GROUP_COLUMNS):
                value = simd.total(simd.multiply(lane, _column(block, plan.block_bytes, column)))
                simd.store_float(out + column * _FLOAT, np.float32(value * scale + offset))


def multiply(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T for a few rows: float32 `(rows, columns)` to float32 `(rows, 16 * tiles)`."""
    tiles, groups, block_bytes = packed.shape
    n_threads, rows_room = parallel.team_size(), by_fours(len(x))
    y = torch.empty(rows_room, tiles * TILE_ROWS)
    rounded = torch.empty(n_threads, rows_room, groups * ROUNDED_BYTES, dtype=torch.uint8)
    addresses = (x.data_ptr(), rounded.data_ptr(), y.data_ptr())
    sizes = (block_bytes, tiles, groups)
    _run(_multiply, (packed.data_ptr(), *sizes, *addresses, len(x), rows_room, n_threads), n_threads)
    return y[: len(x)]


def multiply_unpacked(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same for many rows: unpack some tiles at a time and leave the arithmetic to `torch.mm`."""
    tiles, groups, block_bytes = packed.shape
    columns, n_threads = groups * GROUP_COLUMNS, parallel.team_size()
    y = torch.empty(len(x), tiles * TILE_ROWS)
    step = max(1, _UNPACK_BYTES // (columns * TILE_BYTES))
    scratch = torch.empty(columns * min(step, tiles) * TILE_ROWS)
    for start in range(0, tiles, step):
        n = min(step, tiles - start)
        unpacked = scratch[: columns * n * TILE_ROWS].view(columns, n * TILE_ROWS)
        plan = (packed[start].data_ptr(), block_bytes, n, groups, unpacked.data_ptr(), n_threads)
        _run(_unpack_columns, plan, n_threads)
        torch.mm(x, unpacked, out=y[:, start * TILE_ROWS : (start + n) * TILE_ROWS])
    return y


def take_rows(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the float32 rows `(*rows.shape, columns)` of a packed weight, as an embedding does."""
    _, groups, block_bytes = packed.shape
    indices = rows.to(torch.int64).contiguous()
    out = torch.empty(*rows.shape, groups * GROUP_COLUMNS)
    addresses = (indices.data_ptr(), indices.numel(), _LANES.ctypes.data, out.data_ptr())
    _run(_take_rows, (packed.data_ptr(), block_bytes, groups, *addresses), 1)
    return out


def by_fours(rows: int) -> int:
    """Return for how many rows `tile_dots` needs room."""
    return -(-rows // ROWS_AT_ONCE) * ROWS_AT_ONCE


def _run(compiled: Any, plan: tuple[int, ...], n_threads: int) -> None:
    fields = np.array(plan, dtype=np.int64)
    parallel.run(compiled, fields.ctypes.data, n_threads)
