"""Some tokens through a whole Llama-like decoder in one compiled call.

Between small operators PyTorch spends longer than in them: a 30-layer model makes some 600 calls a token. Here each
thread of a team runs the whole step, its share of heads and rows of each of five phases a layer. Numbers are
float32; linear weights are packed (streaming.models.packing), keys and values are kept in float16, which halves what
attention reads from memory.

A token is a row. Rows may belong to different sequences, each with keys and values of its own, or follow one another
in one: keys and values of all rows are written before any row attends. Weights are unpacked once for four rows.
"""

import math

import numpy as np
from numba import carray

from streaming.models import simd
from streaming.models.attention_kernel import TILE_BYTES_ROOM, attend
from streaming.models.compiling import inline, int_record, kernel
from streaming.models.packing import GROUP_COLUMNS, TILE_ROWS
from streaming.models.parallel import finish_unit, take_unit, thread_number, wait_for_phase
from streaming.models.tile_products import ROUNDED_BYTES, TILE_BYTES, round_activations, tile_dots
from streaming.models.vector_ir import LANES

# Names of matrices are addresses of packed weights, each with its block size in bytes (`_b`); names of vectors are
# addresses of float32 values, 0 where the model has none.
LAYER = int_record(
    "input_norm q q_b k k_b v v_b q_bias k_bias v_bias q_norm k_norm o o_b o_bias"
    " post_norm gate gate_b up up_b down down_b"
)
# A row's token is at `position` of a sequence whose keys and values have room for `capacity`; `rooms` is the address
# of their addresses, a layer's keys and values one after the other. `cos` and `sin` are the position's.
ROW = int_record("position capacity cos sin rooms")
# Rows of `x`, `queries`, `attended` and `gated` are as long as their names say; `wanted` is the address of the numbers
# of the rows whose logits are asked for, `n_wanted` of them.
STEP = int_record(
    "n_threads n_layers layers n_rows rows hidden heads kv_heads head_dim intermediate final_norm head head_b"
    " head_tiles n_wanted wanted logits x queries attended gated rounded rounded_bytes room room_bytes scores"
    " scores_bytes score_bytes tiles n_chunks chunks phases phase_bytes"
)
# Rows that follow one another in a sequence and attend together.
CHUNK = int_record("first n_rows")
SETTINGS = np.dtype([("step", STEP), ("norm_eps", np.float32), ("attention_scale", np.float32)])

_FLOAT, _HALF, _INT = 4, 2, 8

# Tiles in a unit of work, so that a unit takes a few microseconds.
_OUT_TILES, _GATE_TILES, _DOWN_TILES, _HEAD_TILES = 4, 4, 2, 32
PHASES_A_LAYER = 5


@inline
def _int(address):
    """Return the int64 at an address."""
    return carray(simd.pointer(address), 1, np.int64)[0]


@inline
def _norm_factor(x, count, eps):
    """Return 1 / sqrt(mean(x²) + eps)."""
    squares = simd.splat(np.float32(0))
    for at in range(x, x + count * _FLOAT, TILE_BYTES):
        value = simd.load(at)
        squares = simd.fma(value, value, squares)
    return np.float32(1) / np.float32(math.sqrt(simd.total(squares) / np.float32(count) + eps))


@inline
def _scale_by(x, weight, factor, out, count):
    """Write x * weight * factor to `out`."""
    for at in range(0, count * _FLOAT, TILE_BYTES):
        scaled = simd.multiply(simd.load(x + at), simd.splat(factor))
        simd.store(out + at, simd.multiply(scaled, simd.load(weight + at)))


@inline
def _rotate(head, cos, sin, head_dim):
    """Apply rotary position embedding in place: x * cos + rotate_half(x) * sin."""
    half = head_dim // 2 * _FLOAT
    for at in range(0, half, TILE_BYTES):
        a, b = simd.load(head + at), simd.load(head + half + at)
        minus_b = simd.multiply(b, simd.splat(np.float32(-1)))
        simd.store(head + at, simd.fma(minus_b, simd.load(sin + at), simd.multiply(a, simd.load(cos + at))))
        rotated = simd.multiply(b, simd.load(cos + half + at))
        simd.store(head + half + at, simd.fma(a, simd.load(sin + half + at), rotated))


@inline
def _keep(x, cached, head_dim):
    """Write the float32 vector at `x` to its float16 place in the cache."""
    for column in range(0, head_dim, LANES):
        simd.store_halves(cached + column * _HALF, simd.load(x + column * _FLOAT))


@inline
def _norm_and_round(x, weight, count, norm_eps, rounded):
    """Normalize a row and round it to `rounded`, behind which there is room for its float values."""
    groups = count // GROUP_COLUMNS
    normed = rounded + groups * ROUNDED_BYTES
    _scale_by(x, weight, _norm_factor(x, count, norm_eps), normed, count)
    round_activations(normed, rounded, groups)


@inline
def _norm_and_round_all(step, weight, norm_eps, rounded):
    """Normalize and round the residual stream of every row."""
    # A row's float values lie where the next row's rounded ones will.
    for row in range(step.n_rows):
        at = rounded + row * (step.hidden // GROUP_COLUMNS * ROUNDED_BYTES)
        _norm_and_round(step.x + row * step.hidden * _FLOAT, weight, step.hidden, norm_eps, at)


@inline
def _project_head(step, weight, block_bytes, bias, index, rounded, room):
    """Write one head's rows of weight @ x (+ bias), for every row of x, to `room`, a head after the other."""
    tiles, head_bytes, groups = step.head_dim // TILE_ROWS, step.head_dim * _FLOAT, step.hidden // GROUP_COLUMNS
    for tile in range(tiles):
        number, out = index * tiles + tile, room + tile * TILE_BYTES
        tile_dots(weight, block_bytes, number, rounded, groups * ROUNDED_BYTES, groups, step.n_rows, out, head_bytes)
        if bias:
            for at in range(out, out + step.n_rows * head_bytes, head_bytes):
                simd.store(at, simd.add(simd.load(at), simd.load(bias + number * TILE_BYTES)))


@inline
def _project_unit(step, layer, rows, index, unit, rounded, norm_eps, scale, room):
    """One head's queries, keys or values at the rows' positions; keys and values go into the rows' rooms."""
    heads, kv_heads, dim = step.heads, step.kv_heads, step.head_dim
    head = unit if unit < heads else (unit - heads) % kv_heads
    if unit >= heads + kv_heads:
        _project_head(step, layer.v, layer.v_b, layer.v_bias, head, rounded, room)
        for number in range(step.n_rows):
            row = rows[number]
            values = _int(row.rooms + (2 * index + 1) * _INT)
            _keep(room + number * dim * _FLOAT, values + (head * row.capacity + row.position) * dim * _HALF, dim)
        return
    if unit >= heads:
        norm = layer.k_norm
        _project_head(step, layer.k, layer.k_b, layer.k_bias, head, rounded, room)
    else:
        norm = layer.q_norm
        _project_head(step, layer.q, layer.q_b, layer.q_bias, head, rounded, room)
    for number in range(step.n_rows):
        row, out = rows[number], room + number * dim * _FLOAT
        if norm:
            _scale_by(out, norm, _norm_factor(out, dim, norm_eps), out, dim)
        _rotate(out, row.cos, row.sin, dim)
        if unit >= heads:
            keys = _int(row.rooms + 2 * index * _INT)
            _keep(out, keys + (head * row.capacity + row.position) * dim * _HALF, dim)
        else:
            query = step.queries + (number * heads + head) * dim * _FLOAT
            for at in range(0, dim * _FLOAT, TILE_BYTES):
                simd.store(query + at, simd.multiply(simd.load(out + at), simd.splat(scale)))


@inline
def _project(step, layer, rows, index, phase, thread, rounded, norm_eps, scale, room):
    """Queries, keys and values of the normalized residual stream, a head a unit."""
    n_units = step.heads + 2 * step.kv_heads
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        _norm_and_round_all(step, layer.input_norm, norm_eps, rounded)
    while unit >= 0:
        _project_unit(step, layer, rows, index, unit, rounded, norm_eps, scale, room)
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _attend(step, rows, chunks, index, phase, thread, scores, tile):
    """Attention of every row over the positions so far; a unit is a chunk of rows under one head of keys."""
    dim, n_heads, n_units = step.head_dim, step.heads // step.kv_heads, step.kv_heads * step.n_chunks
    row_bytes = step.heads * dim * _FLOAT
    unit = take_unit(phase, n_units, thread, step.n_threads)
    while unit >= 0:
        chunk, head = chunks[unit // step.kv_heads], unit % step.kv_heads
        row = rows[chunk.first]
        keys, values = _int(row.rooms + 2 * index * _INT), _int(row.rooms + (2 * index + 1) * _INT)
        cached = head * row.capacity * dim * _HALF
        at = chunk.first * row_bytes + head * n_heads * dim * _FLOAT
        attend(
            step.queries + at,
            step.attended + at,
            row_bytes,
            chunk.n_rows,
            n_heads,
            row.position,
            keys + cached,
            values + cached,
            dim,
            scores,
            step.score_bytes,
            tile,
        )
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _add_product(step, weight, block_bytes, bias, x, columns, unit_tiles, phase, thread, rounded, room):
    """Add weight @ x (+ bias) to the residual stream, `unit_tiles` tiles a unit."""
    tiles, groups = step.hidden // TILE_ROWS, columns // GROUP_COLUMNS
    n_units = -(-tiles // unit_tiles)
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        round_activations(x, rounded, step.n_rows * groups)
    while unit >= 0:
        for tile in range(unit * unit_tiles, min(tiles, (unit + 1) * unit_tiles)):
            row_bytes = groups * ROUNDED_BYTES
            tile_dots(weight, block_bytes, tile, rounded, row_bytes, groups, step.n_rows, room, TILE_BYTES)
            for row in range(step.n_rows):
                dot = simd.load(room + row * TILE_BYTES)
                if bias:
                    dot = simd.add(dot, simd.load(bias + tile * TILE_BYTES))
                at = step.x + row * step.hidden * _FLOAT + tile * TILE_BYTES
                simd.store(at, simd.add(simd.load(at), dot))
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _gate(step, layer, phase, thread, rounded, norm_eps, room):
    """silu(gate @ x) * (up @ x) of the normalized residual stream."""
    tiles, groups, n_rows = step.intermediate // TILE_ROWS, step.hidden // GROUP_COLUMNS, step.n_rows
    n_units = -(-tiles // _GATE_TILES)
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        _norm_and_round_all(step, layer.post_norm, norm_eps, rounded)
    while unit >= 0:
        for tile in range(unit * _GATE_TILES, min(tiles, (unit + 1) * _GATE_TILES)):
            row_bytes, out = groups * ROUNDED_BYTES, step.gated + tile * TILE_BYTES
            out_bytes = step.intermediate * _FLOAT
            tile_dots(layer.gate, layer.gate_b, tile, rounded, row_bytes, groups, n_rows, room, TILE_BYTES)
            tile_dots(layer.up, layer.up_b, tile, rounded, row_bytes, groups, n_rows, out, out_bytes)
            for row in range(n_rows):
                gate, at = simd.load(room + row * TILE_BYTES), out + row * out_bytes
                one = simd.splat(np.float32(1))
                inverse = simd.add(one, simd.exp(simd.multiply(gate, simd.splat(np.float32(-1)))))
                simd.store(at, simd.multiply(simd.divide(gate, inverse), simd.load(at)))
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _predict(step, phase, thread, rounded, norm_eps):
    """The logits of the wanted rows: the output head over the normalized residual stream."""
    n_units, groups = -(-step.head_tiles // _HEAD_TILES), step.hidden // GROUP_COLUMNS
    row_bytes = groups * ROUNDED_BYTES
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        for number in range(step.n_wanted):
            x = step.x + _int(step.wanted + number * _INT) * step.hidden * _FLOAT
            _norm_and_round(x, step.final_norm, step.hidden, norm_eps, rounded + number * row_bytes)
    while unit >= 0:
        for tile in range(unit * _HEAD_TILES, min(step.head_tiles, (unit + 1) * _HEAD_TILES)):
            out, out_bytes = step.logits + tile * TILE_BYTES, step.head_tiles * TILE_BYTES
            tile_dots(step.head, step.head_b, tile, rounded, row_bytes, groups, step.n_wanted, out, out_bytes)
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@kernel
def decode_step(address):
    """Run the rows whose embeddings are at `x`; leaves their logits, and their keys and values in the caches."""
    settings = carray(address, 1, SETTINGS)[0]
    step, norm_eps, scale = settings.step, settings.norm_eps, settings.attention_scale
    layers = carray(simd.pointer(step.layers), step.n_layers, LAYER)
    rows = carray(simd.pointer(step.rows), step.n_rows, ROW)
    chunks = carray(simd.pointer(step.chunks), step.n_chunks, CHUNK)
    thread = thread_number()
    # Each thread rounds all activations for itself, which is cheaper than another phase.
    rounded = step.rounded + thread * step.rounded_bytes
    scores, room = step.scores + thread * step.scores_bytes, step.room + thread * step.room_bytes
    tile, attended_columns = step.tiles + thread * TILE_BYTES_ROOM, step.heads * step.head_dim
    phase = step.phases
    for index in range(step.n_layers):
        layer = layers[index]
        _project(step, layer, rows, index, phase, thread, rounded, norm_eps, scale, room)
        phase += step.phase_bytes
        _attend(step, rows, chunks, index, phase, thread, scores, tile)
        phase += step.phase_bytes
        x, columns = step.attended, attended_columns
        _add_product(step, layer.o, layer.o_b, layer.o_bias, x, columns, _OUT_TILES, phase, thread, rounded, room)
        phase += step.phase_bytes
        _gate(step, layer, phase, thread, rounded, norm_eps, room)
        phase += step.phase_bytes
        x, columns = step.gated, step.intermediate
        _add_product(step, layer.down, layer.down_b, 0, x, columns, _DOWN_TILES, phase, thread, rounded, room)
        phase += step.phase_bytes
    if step.n_wanted:
        _predict(step, phase, thread, rounded, norm_eps)
