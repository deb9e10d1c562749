"""Packed weights by PyTorch's tensors: multiply a few rows, or unpack for a matrix multiplication.

Compiled by Numba on first import (seconds), afterwards read from its cache on disk.
"""

from typing import Any

import numpy as np
import torch
from numba import carray

from streaming.models import parallel, simd, simd_int
from streaming.models.compiling import inline, int_record, kernel
from streaming.models.packing import BLOCK_BYTES, GROUP_COLUMNS, TILE_ROWS
from streaming.models.parallel import first, thread_count, thread_number
from streaming.models.tile_products import (
    FLOAT_BYTES,
    GROUP_BYTES,
    ROUNDED_BYTES,
    TILE_BYTES,
    by_fours,
    round_activations,
    tile_dots,
)

_Q4 = BLOCK_BYTES[4]

# Unpacked weights of this many bytes stay in the second-level cache between unpacking and multiplying.
_UNPACK_BYTES = 1 << 20

_MULTIPLY = int_record("weight block_bytes tiles groups x rounded y rows rows_room")
_UNPACK = int_record("weight block_bytes tiles groups out")
_TAKE = int_record("weight block_bytes groups rows count lanes out")

# Row i selects lane i of a vector.
_LANES = np.eye(TILE_ROWS, dtype=np.float32)


@kernel
def _multiply(address):
    plan = carray(address, 1, _MULTIPLY)[0]
    thread, groups, y_bytes = thread_number(), plan.groups, plan.tiles * TILE_BYTES
    n_threads = thread_count()
    row_bytes = groups * ROUNDED_BYTES
    x = plan.rounded + thread * plan.rows_room * row_bytes
    round_activations(plan.x, x, plan.rows * groups)
    for tile in range(first(plan.tiles, thread, n_threads), first(plan.tiles, thread + 1, n_threads)):
        y = plan.y + tile * TILE_BYTES
        tile_dots(plan.weight, plan.block_bytes, tile, x, row_bytes, groups, plan.rows, y, y_bytes)


@inline
def _column(block, block_bytes, column):
    """Return one column's steps of a block's 16 rows, less their zero point."""
    if block_bytes == _Q4:
        words = simd_int.load(block + 64 + column // 8 * 64)
        return simd_int.to_float(simd_int.field(words, 16 * (column % 2) + 4 * (column % 8 // 2), 15))
    words = simd_int.load(block + 32 + column // 4 * 64)
    steps = simd_int.to_float(simd_int.field(words, 16 * (column % 2) + 8 * (column % 4 // 2), 255))
    return simd.add(steps, simd.splat(np.float32(-128)))


@kernel
def _unpack_columns(address):
    plan = carray(address, 1, _UNPACK)[0]
    thread, n_threads, groups, block_bytes = thread_number(), thread_count(), plan.groups, plan.block_bytes
    row_bytes = plan.tiles * TILE_BYTES
    for tile in range(first(plan.tiles, thread, n_threads), first(plan.tiles, thread + 1, n_threads)):
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
            out = plan.out + (i * plan.groups + g) * GROUP_BYTES
            scale = simd.total(simd.multiply(lane, simd.load_halves(block)))
            offset = simd.total(simd.multiply(lane, simd.load_halves(block + 32))) if plan.block_bytes == _Q4 else 0.0
            for column in range(GROUP_COLUMNS):
                value = simd.total(simd.multiply(lane, _column(block, plan.block_bytes, column)))
                simd.store_float(out + column * FLOAT_BYTES, np.float32(value * scale + offset))


def multiply(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T for a few rows: float32 `(rows, columns)` to float32 `(rows, 16 * tiles)`."""
    tiles, groups, block_bytes = packed.shape
    n_threads, rows_room = parallel.team_size(), by_fours(len(x))
    y = torch.empty(rows_room, tiles * TILE_ROWS, dtype=torch.float32)
    rounded = torch.empty(n_threads, rows_room, groups * ROUNDED_BYTES, dtype=torch.uint8)
    addresses = (x.data_ptr(), rounded.data_ptr(), y.data_ptr())
    sizes = (block_bytes, tiles, groups)
    _run(_multiply, (packed.data_ptr(), *sizes, *addresses, len(x), rows_room), n_threads)
    return y[: len(x)]


def multiply_unpacked(packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same for many rows: unpack some tiles at a time and leave the arithmetic to `torch.mm`."""
    tiles, groups, block_bytes = packed.shape
    columns, n_threads = groups * GROUP_COLUMNS, parallel.team_size()
    y = torch.empty(len(x), tiles * TILE_ROWS, dtype=torch.float32)
    step = max(1, _UNPACK_BYTES // (columns * TILE_BYTES))
    scratch = torch.empty(columns * min(step, tiles) * TILE_ROWS, dtype=torch.float32)
    for start in range(0, tiles, step):
        n = min(step, tiles - start)
        unpacked = scratch[: columns * n * TILE_ROWS].view(columns, n * TILE_ROWS)
        plan = (packed[start].data_ptr(), block_bytes, n, groups, unpacked.data_ptr())
        _run(_unpack_columns, plan, n_threads)
        torch.mm(x, unpacked, out=y[:, start * TILE_ROWS : (start + n) * TILE_ROWS])
    return y


def take_rows(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the float32 rows `(*rows.shape, columns)` of a packed weight, as an embedding does."""
    _, groups, block_bytes = packed.shape
    indices = rows.to(torch.int64).contiguous()
    out = torch.empty(*rows.shape, groups * GROUP_COLUMNS, dtype=torch.float32)
    addresses = (indices.data_ptr(), indices.numel(), _LANES.ctypes.data, out.data_ptr())
    _run(_take_rows, (packed.data_ptr(), block_bytes, groups, *addresses), 1)
    return out


def _run(compiled: Any, plan: tuple[int, ...], n_threads: int) -> None:
    fields = np.array(plan, dtype=np.int64)
    parallel.run(compiled, fields.ctypes.data, n_threads)
