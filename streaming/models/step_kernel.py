"""One token through a whole Llama-like decoder in one compiled call.

Between small operators PyTorch spends longer than in them: a 30-layer model makes some 600 calls a token. Here each
thread of a team runs the whole step, its share of heads and rows of each of five phases a layer. Numbers are
float32; linear weights are packed (streaming.models.packing), keys and values are kept in float16, which halves what
attention reads from memory.
"""

import math

import numpy as np
from numba import carray

from streaming.models import simd
from streaming.models.kernels import (
    ROUNDED_BYTES,
    TILE_BYTES,
    apart,
    inline,
    int_record,
    kernel,
    round_activations,
    tile_dot,
)
from streaming.models.packing import GROUP_COLUMNS, TILE_ROWS
from streaming.models.parallel import finish_unit, take_unit, thread_number, wait_for_phase

# Names of matrices are addresses of packed weights, each with its block size in bytes (`_b`); names of vectors are
# addresses of float32 values, 0 where the model has none.
LAYER = int_record(
    "input_norm q q_b k k_b v v_b q_bias k_bias v_bias q_norm k_norm o o_b o_bias"
    " post_norm gate gate_b up up_b down down_b keys values"
)
STEP = int_record(
    "n_threads n_layers layers hidden heads kv_heads head_dim intermediate position capacity cos sin final_norm head"
    " head_b head_tiles logits x queries attended gated rounded rounded_stride scores scores_stride phases phase_bytes"
)
SETTINGS = np.dtype([("step", STEP), ("norm_eps", np.float32), ("attention_scale", np.float32)])

_FLOAT, _HALF = 4, 2

# Tiles in a unit of work, so that a unit takes a few microseconds.
_OUT_TILES, _GATE_TILES, _DOWN_TILES, _HEAD_TILES = 4, 4, 2, 32
PHASES_A_LAYER = 5

# The columns of a head that attention takes at once.
ATTENTION_COLUMNS = 64


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
def _project_head(weight, block_bytes, bias, index, rounded, out, step):
    """Write one head's rows of weight @ x (+ bias) to `out`."""
    tiles = step.head_dim // TILE_ROWS
    for tile in range(tiles):
        dot = tile_dot(weight, block_bytes, index * tiles + tile, rounded, step.hidden // GROUP_COLUMNS)
        if bias:
            dot = simd.add(dot, simd.load(bias + (index * tiles + tile) * TILE_BYTES))
        simd.store(out + tile * TILE_BYTES, dot)


@apart
def _score(query, keys, length, head_dim, scores):
    """Write keys @ query over `length` positions, and -inf up to a whole vector, to `scores`; return the largest."""
    for column in range(0, head_dim, ATTENTION_COLUMNS):
        q, key = query + column * _FLOAT, keys + column * _HALF
        q0, q1, q2, q3 = simd.load(q), simd.load(q + 64), simd.load(q + 128), simd.load(q + 192)
        for position in range(length):
            low = simd.fma(q1, simd.load_halves(key + 32), simd.multiply(q0, simd.load_halves(key)))
            high = simd.fma(q3, simd.load_halves(key + 96), simd.multiply(q2, simd.load_halves(key + 64)))
            score = simd.total(simd.add(low, high))
            if column:
                score += simd.load_float(scores + position * _FLOAT)
            simd.store_float(scores + position * _FLOAT, score)
            key += head_dim * _HALF
    for position in range(length, -(-length // simd.LANES) * simd.LANES):
        simd.store_float(scores + position * _FLOAT, np.float32(-np.inf))
    top = simd.load(scores)
    for at in range(scores, scores + length * _FLOAT, TILE_BYTES):
        top = simd.larger(top, simd.load(at))
    return simd.largest(top)


@apart
def _attend(query, keys, values, length, scores, out, head_dim):
    """Write softmax(keys @ query) @ values over `length` positions to `out`; `scores` is room for them."""
    top = simd.splat(-_score(query, keys, length, head_dim, scores))
    weights = simd.splat(np.float32(0))
    for at in range(scores, scores + length * _FLOAT, TILE_BYTES):
        weight = simd.exp(simd.add(simd.load(at), top))
        simd.store(at, weight)
        weights = simd.add(weights, weight)
    factor = simd.splat(np.float32(1) / simd.total(weights))
    for column in range(0, head_dim, ATTENTION_COLUMNS):
        value = values + column * _HALF
        a = simd.splat(np.float32(0))
        b, c, d = a, a, a
        for position in range(length):
            weight = simd.load_splat(scores + position * _FLOAT)
            a = simd.fma(weight, simd.load_halves(value), a)
            b = simd.fma(weight, simd.load_halves(value + 32), b)
            c = simd.fma(weight, simd.load_halves(value + 64), c)
            d = simd.fma(weight, simd.load_halves(value + 96), d)
            value += head_dim * _HALF
        at = out + column * _FLOAT
        simd.store(at, simd.multiply(a, factor))
        simd.store(at + 64, simd.multiply(b, factor))
        simd.store(at + 128, simd.multiply(c, factor))
        simd.store(at + 192, simd.multiply(d, factor))


@inline
def _keep(x, cached, head_dim):
    """Write the float32 vector at `x` to its float16 place in the cache."""
    for column in range(0, head_dim, simd.LANES):
        simd.store_halves(cached + column * _HALF, simd.load(x + column * _FLOAT))


@inline
def _norm_and_round(x, weight, step, norm_eps, rounded):
    """Normalize the residual stream and round it to `rounded`, behind which there is room for the float values."""
    groups = step.hidden // GROUP_COLUMNS
    normed = rounded + groups * ROUNDED_BYTES
    _scale_by(x, weight, _norm_factor(x, step.hidden, norm_eps), normed, step.hidden)
    round_activations(normed, rounded, groups)


@inline
def _project_unit(step, layer, unit, rounded, norm_eps, scale, room):
    """One head's query, key or value at the new position; keys and values go into the cache by way of `room`."""
    heads, kv_heads, dim = step.heads, step.kv_heads, step.head_dim
    head = unit if unit < heads else (unit - heads) % kv_heads
    cached = (head * step.capacity + step.position) * dim * _HALF
    if unit >= heads + kv_heads:
        _project_head(layer.v, layer.v_b, layer.v_bias, head, rounded, room, step)
        _keep(room, layer.values + cached, dim)
        return
    if unit >= heads:
        out, norm = room, layer.k_norm
        _project_head(layer.k, layer.k_b, layer.k_bias, head, rounded, out, step)
    else:
        out, norm = step.queries + head * dim * _FLOAT, layer.q_norm
        _project_head(layer.q, layer.q_b, layer.q_bias, head, rounded, out, step)
    if norm:
        _scale_by(out, norm, _norm_factor(out, dim, norm_eps), out, dim)
    _rotate(out, step.cos, step.sin, dim)
    if unit >= heads:
        _keep(out, layer.keys + cached, dim)
    else:
        for at in range(out, out + dim * _FLOAT, TILE_BYTES):
            simd.store(at, simd.multiply(simd.load(at), simd.splat(scale)))


@inline
def _project(step, layer, phase, thread, rounded, norm_eps, scale, room):
    """Queries, keys and values of the normalized residual stream, a head a unit."""
    n_units = step.heads + 2 * step.kv_heads
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        _norm_and_round(step.x, layer.input_norm, step, norm_eps, rounded)
    while unit >= 0:
        _project_unit(step, layer, unit, rounded, norm_eps, scale, room)
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _attend_all(step, layer, phase, thread, scores):
    """Attention of every query head over the positions so far, a head a unit."""
    dim = step.head_dim
    head = take_unit(phase, step.heads, thread, step.n_threads)
    while head >= 0:
        cached = head * step.kv_heads // step.heads * step.capacity * dim * _HALF
        at = head * dim * _FLOAT
        keys, values = layer.keys + cached, layer.values + cached
        _attend(step.queries + at, keys, values, step.position + 1, scores, step.attended + at, dim)
        finish_unit(phase, step.heads)
        head = take_unit(phase, step.heads, thread, step.n_threads)
    wait_for_phase(phase, step.heads)


@inline
def _add_product(step, weight, block_bytes, bias, x, columns, unit_tiles, phase, thread, rounded):
    """Add weight @ x (+ bias) to the residual stream, `unit_tiles` tiles a unit."""
    tiles, groups = step.hidden // TILE_ROWS, columns // GROUP_COLUMNS
    n_units = -(-tiles // unit_tiles)
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        round_activations(x, rounded, groups)
    while unit >= 0:
        for tile in range(unit * unit_tiles, min(tiles, (unit + 1) * unit_tiles)):
            dot = tile_dot(weight, block_bytes, tile, rounded, groups)
            if bias:
                dot = simd.add(dot, simd.load(bias + tile * TILE_BYTES))
            at = step.x + tile * TILE_BYTES
            simd.store(at, simd.add(simd.load(at), dot))
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _gate(step, layer, phase, thread, rounded, norm_eps):
    """silu(gate @ x) * (up @ x) of the normalized residual stream."""
    tiles, groups = step.intermediate // TILE_ROWS, step.hidden // GROUP_COLUMNS
    n_units = -(-tiles // _GATE_TILES)
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        _norm_and_round(step.x, layer.post_norm, step, norm_eps, rounded)
    while unit >= 0:
        for tile in range(unit * _GATE_TILES, min(tiles, (unit + 1) * _GATE_TILES)):
            gate = tile_dot(layer.gate, layer.gate_b, tile, rounded, groups)
            up = tile_dot(layer.up, layer.up_b, tile, rounded, groups)
            one = simd.splat(np.float32(1))
            inverse = simd.add(one, simd.exp(simd.multiply(gate, simd.splat(np.float32(-1)))))
            simd.store(step.gated + tile * TILE_BYTES, simd.multiply(simd.divide(gate, inverse), up))
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@inline
def _predict(step, phase, thread, rounded, norm_eps):
    """The logits: the output head over the normalized residual stream."""
    n_units = -(-step.head_tiles // _HEAD_TILES)
    unit = take_unit(phase, n_units, thread, step.n_threads)
    if unit >= 0:
        _norm_and_round(step.x, step.final_norm, step, norm_eps, rounded)
    while unit >= 0:
        for tile in range(unit * _HEAD_TILES, min(step.head_tiles, (unit + 1) * _HEAD_TILES)):
            dot = tile_dot(step.head, step.head_b, tile, rounded, step.hidden // GROUP_COLUMNS)
            simd.store(step.logits + tile * TILE_BYTES, dot)
        finish_unit(phase, n_units)
        unit = take_unit(phase, n_units, thread, step.n_threads)
    wait_for_phase(phase, n_units)


@kernel
def decode_step(address):
    """Run one token whose embedding is at `x`; leaves its logits, and its keys and values in the cache."""
    settings = carray(address, 1, SETTINGS)[0]
    step, norm_eps, scale = settings.step, settings.norm_eps, settings.attention_scale
    layers = carray(simd.pointer(step.layers), step.n_layers, LAYER)
    thread = thread_number()
    # Each thread rounds all activations for itself, which is cheaper than another phase.
    rounded = step.rounded + thread * step.rounded_stride
    scores = step.scores + thread * step.scores_stride
    attended_columns, phase = step.heads * step.head_dim, step.phases
    for index in range(step.n_layers):
        layer = layers[index]
        _project(step, layer, phase, thread, rounded, norm_eps, scale, scores)
        phase += step.phase_bytes
        _attend_all(step, layer, phase, thread, scores)
        phase += step.phase_bytes
        _add_product(
            step, layer.o, layer.o_b, layer.o_bias, step.attended, attended_columns, _OUT_TILES, phase, thread, rounded
        )
        phase += step.phase_bytes
        _gate(step, layer, phase, thread, rounded, norm_eps)
        phase += step.phase_bytes
        _add_product(
            step, layer.down, layer.down_b, 0, step.gated, step.intermediate, _DOWN_TILES, phase, thread, rounded
        )
        phase += step.phase_bytes
    _predict(step, phase, thread, rounded, norm_eps)
