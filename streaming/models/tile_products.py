"""Products of packed weights with a few rows, a tile of 16 weights' rows at a time, for compiled kernels.

Weights are taken as they are, with their exact scales. Activations are rounded to 16 bits within each group of 32,
so that a multiplication of pairs of 16-bit integers, which every x86 and Arm vector unit has, does the work: twice
as fast as float32 and, at a relative error of about 1e-5, as good.
"""

import numpy as np

from streaming.models import simd, simd_int
from streaming.models.compiling import apart, inline
from streaming.models.packing import BLOCK_BYTES, GROUP_COLUMNS, TILE_ROWS

FLOAT_BYTES = 4
TILE_BYTES = TILE_ROWS * FLOAT_BYTES
GROUP_BYTES = GROUP_COLUMNS * FLOAT_BYTES

# A group of activations: int16[32], float32 scale, float32 sum (for weights with an offset), and int32
# -128 * sum of the int16 (for weights whose steps count from 128).
ROUNDED_BYTES = 76
_SCALE, _SUM, _CORRECTION = 64, 68, 72

ROWS_AT_ONCE = 4

_Q4 = BLOCK_BYTES[4]
_PREFETCH_BYTES = 2048


@apart
def round_activations(x, rounded, groups):
    """Write the float32 values at `x` as `groups` groups of ROUNDED_BYTES to `rounded`."""
    for _ in range(groups):
        low, high = simd.load(x), simd.load(x + TILE_BYTES)
        top = simd.largest(simd.larger(simd.magnitude(low), simd.magnitude(high)))
        factor = simd.splat(np.float32(32767) / top if top > 0 else np.float32(0))
        steps = simd_int.store_words(rounded, simd.multiply(low, factor))
        steps += simd_int.store_words(rounded + 32, simd.multiply(high, factor))
        simd.store_float(rounded + _SCALE, top * np.float32(1 / 32767))
        simd.store_float(rounded + _SUM, simd.total(simd.add(low, high)))
        simd_int.store(rounded + _CORRECTION, -128 * steps)
        x += GROUP_BYTES
        rounded += ROUNDED_BYTES


@inline
def _pairs_4(words, x, even, odd):
    """Add 8 columns of 4 bits times the 8 activations at `x` to two accumulators."""
    even = simd_int.multiply_words(simd_int.word_field(words, 0, 15), simd_int.load_splat(x), even)
    odd = simd_int.multiply_words(simd_int.word_field(words, 4, 15), simd_int.load_splat(x + 4), odd)
    even = simd_int.multiply_words(simd_int.word_field(words, 8, 15), simd_int.load_splat(x + 8), even)
    odd = simd_int.multiply_words(simd_int.word_field(words, 12, 15), simd_int.load_splat(x + 12), odd)
    return even, odd


@inline
def _pairs_8(words, x, even, odd):
    """Add 4 columns of 8 bits times the 4 activations at `x` to two accumulators."""
    even = simd_int.multiply_words(simd_int.word_field(words, 0, 255), simd_int.load_splat(x), even)
    odd = simd_int.multiply_words(simd_int.word_field(words, 8, 255), simd_int.load_splat(x + 4), odd)
    return even, odd


@apart
def tile_dot(weight, block_bytes, tile, x, groups):
    """Return 16 rows of weight @ x, for rounded activations at `x`."""
    acc = simd.splat(np.float32(0))
    block = weight + tile * groups * block_bytes
    if block_bytes == _Q4:
        for _ in range(groups):
            even, odd = simd_int.zero(), simd_int.zero()
            for j in range(5):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(4):
                even, odd = _pairs_4(simd_int.load(block + 64 + 64 * j), x + 16 * j, even, odd)
            scale = simd.multiply(simd.load_halves(block), simd.load_splat(x + _SCALE))
            acc = simd.fma(scale, simd.add(simd_int.to_float(even), simd_int.to_float(odd)), acc)
            acc = simd.fma(simd.load_halves(block + 32), simd.load_splat(x + _SUM), acc)
            block += block_bytes
            x += ROUNDED_BYTES
    else:
        for _ in range(groups):
            even, odd = simd_int.load_splat(x + _CORRECTION), simd_int.zero()
            for j in range(9):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(8):
                even, odd = _pairs_8(simd_int.load(block + 32 + 64 * j), x + 8 * j, even, odd)
            scale = simd.multiply(simd.load_halves(block), simd.load_splat(x + _SCALE))
            acc = simd.fma(scale, simd_int.to_float(simd_int.add(even, odd)), acc)
            block += block_bytes
            x += ROUNDED_BYTES
    return acc


@inline
def _dots(words, shift, mask, x, row_bytes, a, b, c, d):
    """Add 2 columns (of 32-bit lanes) times 2 activations of each of four rows to their accumulators."""
    steps = simd_int.word_field(words, shift, mask)
    a = simd_int.multiply_words(steps, simd_int.load_splat(x), a)
    b = simd_int.multiply_words(steps, simd_int.load_splat(x + row_bytes), b)
    c = simd_int.multiply_words(steps, simd_int.load_splat(x + 2 * row_bytes), c)
    d = simd_int.multiply_words(steps, simd_int.load_splat(x + 3 * row_bytes), d)
    return a, b, c, d


@inline
def _add_group(block, block_bytes, even, odd, x, acc):
    """Add a group's integer products, scaled, and the weights' offset to a row's accumulator."""
    scale = simd.multiply(simd.load_halves(block), simd.load_splat(x + _SCALE))
    acc = simd.fma(scale, simd_int.to_float(simd_int.add(even, odd)), acc)
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
            e0 = simd_int.zero()
            e1, e2, e3, o0, o1, o2, o3 = e0, e0, e0, e0, e0, e0, e0
            f0, f1, f2, f3, p0, p1, p2, p3 = e0, e0, e0, e0, e0, e0, e0, e0
            for j in range(5):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(4):
                words, at = simd_int.load(block + 64 + 64 * j), x + 16 * j
                e0, e1, e2, e3 = _dots(words, 0, 15, at, row_bytes, e0, e1, e2, e3)
                if simd.MANY_REGISTERS:
                    # Each sum grows once a round: of two growths LLVM makes multiplications and additions of their own.
                    o0, o1, o2, o3 = _dots(words, 4, 15, at + 4, row_bytes, o0, o1, o2, o3)
                    f0, f1, f2, f3 = _dots(words, 8, 15, at + 8, row_bytes, f0, f1, f2, f3)
                    p0, p1, p2, p3 = _dots(words, 12, 15, at + 12, row_bytes, p0, p1, p2, p3)
                else:
                    e0, e1, e2, e3 = _dots(words, 4, 15, at + 4, row_bytes, e0, e1, e2, e3)
                    e0, e1, e2, e3 = _dots(words, 8, 15, at + 8, row_bytes, e0, e1, e2, e3)
                    e0, e1, e2, e3 = _dots(words, 12, 15, at + 12, row_bytes, e0, e1, e2, e3)
            e0, o0 = simd_int.add(e0, f0), simd_int.add(o0, p0)
            e1, o1 = simd_int.add(e1, f1), simd_int.add(o1, p1)
            e2, o2 = simd_int.add(e2, f2), simd_int.add(o2, p2)
            e3, o3 = simd_int.add(e3, f3), simd_int.add(o3, p3)
        else:
            e0, e1 = simd_int.load_splat(x + _CORRECTION), simd_int.load_splat(x + row_bytes + _CORRECTION)
            e2 = simd_int.load_splat(x + 2 * row_bytes + _CORRECTION)
            e3 = simd_int.load_splat(x + 3 * row_bytes + _CORRECTION)
            o0 = simd_int.zero()
            o1, o2, o3 = o0, o0, o0
            for j in range(9):
                simd.prefetch(block + _PREFETCH_BYTES + 64 * j)
            for j in range(8):
                words, at = simd_int.load(block + 32 + 64 * j), x + 8 * j
                e0, e1, e2, e3 = _dots(words, 0, 255, at, row_bytes, e0, e1, e2, e3)
                if simd.MANY_REGISTERS:
                    o0, o1, o2, o3 = _dots(words, 8, 255, at + 4, row_bytes, o0, o1, o2, o3)
                else:
                    e0, e1, e2, e3 = _dots(words, 8, 255, at + 4, row_bytes, e0, e1, e2, e3)
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


def by_fours(rows: int) -> int:
    """Return for how many rows `tile_dots` needs room."""
    return -(-rows // ROWS_AT_ONCE) * ROWS_AT_ONCE
