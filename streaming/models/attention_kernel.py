"""Attention of some rows' query heads that share keys and values, in one compiled function.

Keys and values are kept in float16. A tile of them, sixteen positions, is made float32 once for all the queries that
look at it: the heads of a group (grouped-query attention) times the rows that follow one another in a sequence.
"""

import numpy as np

from streaming.models import simd
from streaming.models.compiling import apart, inline
from streaming.models.tile_products import TILE_BYTES
from streaming.models.vector_ir import LANES

COLUMNS = 64
"""The columns of a head that are taken at once."""
ROWS_AT_ONCE = 8
"""How many rows share a tile: more need more room for scores than a core's own cache has."""
TILE_BYTES_ROOM = LANES * COLUMNS * 4
"""The room that `attend` needs for a tile."""

_FLOAT, _HALF = 4, 2
_ROW_BYTES = COLUMNS * _FLOAT


@inline
def _unpack(cached, count, head_dim, tile):
    """Write 64 columns of `count` positions as float32."""
    for position in range(count):
        at, to = cached + position * head_dim * _HALF, tile + position * _ROW_BYTES
        simd.store(to, simd.load_halves(at))
        simd.store(to + 64, simd.load_halves(at + 32))
        simd.store(to + 128, simd.load_halves(at + 64))
        simd.store(to + 192, simd.load_halves(at + 96))


@apart
def _score(queries, row_bytes, n_rows, n_heads, length, keys, head_dim, scores, score_bytes, tile):
    """Write keys @ query of every query over `length` positions; what fills the last vector is left undefined."""
    for column in range(0, head_dim, COLUMNS):
        for start in range(0, length, LANES):
            cached = keys + (start * head_dim + column) * _HALF
            _unpack(cached, min(LANES, length - start), head_dim, tile)
            at = scores + start * _FLOAT
            for row in range(n_rows):
                query = queries + row * row_bytes + column * _FLOAT
                for _ in range(n_heads):
                    dots = simd.dots_64(tile, query)
                    simd.store(at, simd.add(dots, simd.load(at)) if column else dots)
                    query += head_dim * _FLOAT
                    at += score_bytes


@apart
def _softmax(scores, length, room):
    """Turn scores into weights over `length` positions, nearly 0 up to `room`, which is a whole number of vectors."""
    for position in range(length, room):
        simd.store_float(scores + position * _FLOAT, np.float32(-np.inf))
    end = scores + room * _FLOAT
    top = simd.load(scores)
    for at in range(scores, end, TILE_BYTES):
        top = simd.larger(top, simd.load(at))
    shift, total = simd.splat(-simd.largest(top)), simd.splat(np.float32(0))
    for at in range(scores, end, TILE_BYTES):
        weight = simd.exp(simd.add(simd.load(at), shift))
        simd.store(at, weight)
        total = simd.add(total, weight)
    factor = simd.splat(np.float32(1) / simd.total(total))
    for at in range(scores, end, TILE_BYTES):
        simd.store(at, simd.multiply(simd.load(at), factor))


@inline
def _add_values(tile, weights, count, out, is_first):
    """Add `count` positions of 64 columns, times their weights, to `out`, or begin with them."""
    a = simd.splat(np.float32(0))
    b, c, d = a, a, a
    if not is_first:
        a, b, c, d = simd.load(out), simd.load(out + 64), simd.load(out + 128), simd.load(out + 192)
    for position in range(count):
        weight, value = simd.load_splat(weights + position * _FLOAT), tile + position * _ROW_BYTES
        a = simd.fma(weight, simd.load(value), a)
        b = simd.fma(weight, simd.load(value + 64), b)
        c = simd.fma(weight, simd.load(value + 128), c)
        d = simd.fma(weight, simd.load(value + 192), d)
    simd.store(out, a)
    simd.store(out + 64, b)
    simd.store(out + 128, c)
    simd.store(out + 192, d)


@apart
def _sum_values(out, row_bytes, n_rows, n_heads, length, values, head_dim, weights, weight_bytes, tile):
    """Write weights @ values of every query."""
    for column in range(0, head_dim, COLUMNS):
        for start in range(0, length, LANES):
            count = min(LANES, length - start)
            _unpack(values + (start * head_dim + column) * _HALF, count, head_dim, tile)
            at = weights + start * _FLOAT
            for row in range(n_rows):
                to = out + row * row_bytes + column * _FLOAT
                for _ in range(n_heads):
                    _add_values(tile, at, count, to, start == 0)
                    to += head_dim * _FLOAT
                    at += weight_bytes


@apart
def attend(queries, out, row_bytes, n_rows, n_heads, position, keys, values, head_dim, scores, score_bytes, tile):
    """Write softmax(keys @ query) @ values of `n_heads` heads of `n_rows` rows to `out`.

    Rows lie `row_bytes` apart in `queries` and `out`, their heads one after the other. The first row is at `position`,
    the others follow it, and each sees the positions up to its own. `scores` is room for `score_bytes` a query, `tile`
    for TILE_BYTES_ROOM.
    """
    length = position + n_rows
    room = -(-length // LANES) * LANES
    _score(queries, row_bytes, n_rows, n_heads, length, keys, head_dim, scores, score_bytes, tile)
    for number in range(n_rows * n_heads):
        _softmax(scores + number * score_bytes, position + number // n_heads + 1, room)
    _sum_values(out, row_bytes, n_rows, n_heads, length, values, head_dim, scores, score_bytes, tile)
