"""Weights of 4 or 8 bits in the order in which a vector unit reads them.

A packed weight is one uint8 tensor `(tiles, groups, block bytes)`: a tile is 16 output rows, a group 32 input
columns, and a block holds what both share, one row a lane:

    4 bits (320 bytes): scale float16[16], offset float16[16], then 4 x 16 little-endian 32-bit words [j][row] of
                        8 columns each; weight = scale * step + offset, steps 0 to 15.
    8 bits (544 bytes): scale float16[16], then 8 x 16 words [j][row] of 4 columns each;
                        weight = scale * (step - 128), steps 0 to 255.

In a word, even columns fill the low 16 bits and odd columns the high ones, so that one shift and one mask leave two
neighbouring columns, ready to be multiplied as a pair: column c starts at bit 16 * (c % 2) + bits * (c // 2).

GGML's Q4_0, Q4_1, Q5_0 and Q8_0 blocks (ggml `ggml-common.h`) hold the same numbers row by row, so they are repacked
without any rounding. Of Q4_K only the scales and offsets are rounded, to float16, which keeps its values ten times
nearer than 8 bits would. Rows are padded with zeros to whole tiles; columns must divide by 32.
"""

import torch
from torch.nn.functional import pad

TILE_ROWS = 16
GROUP_COLUMNS = 32
BLOCK_BYTES = {4: 320, 8: 544}
_HALVES = {4: 2, 8: 1}  # float16 values a row: scale and offset, or scale alone
_ZERO_STEP = 128

# Added to a float32 and taken away again, it leaves the nearest whole number. torch's own rounding meets all threads
# at every 2,048 values, which takes 100 times as long while something else computes.
_ROUNDING = 1.5 * 2**23

GGML_Q4_0, GGML_Q4_1, GGML_Q5_0, GGML_Q8_0, GGML_Q4_K = 2, 3, 6, 8, 12
FOUR_BITS = {GGML_Q4_0, GGML_Q4_1, GGML_Q4_K}
"""GGML types whose blocks are packed in 4 bits. All others take 8."""
EXACT = {GGML_Q4_0, GGML_Q4_1, GGML_Q5_0, GGML_Q8_0}
"""GGML types that are packed without any rounding."""
PACKABLE = EXACT | {GGML_Q4_K}
"""GGML types whose blocks are packed as they are, but for the scales and offsets of Q4_K."""

# In search of the 4-bit grid with the least squared error, the range of a group is narrowed so far, and values are
# rounded to each grid so many times, which is fitted to them in between (error: 92 % after 2, 88 after 3, 85 after 6).
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
_FITS = 3


def packed_shape(n_rows: int, n_columns: int, bits: int) -> tuple[int, int, int]:
    """Return the shape of a packed weight; raise ValueError when the columns are not whole groups."""
    if n_columns % GROUP_COLUMNS:
        raise ValueError(f"A packed weight needs columns that divide by {GROUP_COLUMNS}, not {n_columns}.")
    return -(-n_rows // TILE_ROWS), n_columns // GROUP_COLUMNS, BLOCK_BYTES[bits]


def bits_of(packed: torch.Tensor) -> int:
    """Return 4 or 8."""
    return next(bits for bits, size in BLOCK_BYTES.items() if size == packed.shape[-1])


def pack_ggml(blocks: torch.Tensor, ggml_type: int) -> torch.Tensor:
    """Pack GGML blocks, uint8 `(rows, bytes a row)`, of a PACKABLE type."""
    if ggml_type == GGML_Q4_K:
        return _pack_q4_k(blocks.reshape(len(blocks), -1, 144))
    n_bytes, n_halves = {GGML_Q4_0: (18, 1), GGML_Q4_1: (20, 2), GGML_Q5_0: (22, 1), GGML_Q8_0: (34, 1)}[ggml_type]
    by_group = blocks.reshape(len(blocks), -1, n_bytes)
    halves = by_group[..., : 2 * n_halves].contiguous().view(torch.float16)
    steps = by_group[..., 2 * n_halves :]
    if ggml_type == GGML_Q8_0:
        return _pack(halves, steps ^ _ZERO_STEP)
    if ggml_type == GGML_Q5_0:
        fifths = steps[..., :4, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return _pack(halves, (_nibbles(steps[..., 4:]) | fifths.flatten(-2) << 4) + (_ZERO_STEP - 16))
    if ggml_type == GGML_Q4_0:
        halves = torch.cat([halves, halves * -8], dim=-1)
    return _pack(halves, _nibbles(steps))


def quantize(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a float weight `(rows, columns)` to `bits` bits in groups of 32 columns, and pack it.

    A group whose largest value is under 0.008 (8 bits) or 0.001 (4 bits) is rounded more coarsely than its bits allow,
    by up to 4e-6 or 5e-7, because a scale is float16.
    """
    packed_shape(weight.shape[0], weight.shape[1], bits)
    groups = weight.detach().float().reshape(len(weight), -1, GROUP_COLUMNS)
    if bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        steps = _steps(groups, scale, torch.zeros_like(scale), -127, 127)
        return _pack(scale, (steps + _ZERO_STEP).to(torch.uint8))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = (low, low, groups)
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINKS:
        scale = ((high - low) * (shrink / 15)).half()
        offset = (low + (high - low) * ((1 - shrink) / 2)).half()
        for _ in range(_FITS):
            steps = _steps(groups, scale, offset, 0, 15)
            error = (steps * scale + offset - groups).square_().sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            new = (scale, offset, steps)
            best = tuple(torch.where(better, *pair) for pair in zip(new, best, strict=True))  # type: ignore[assignment]
            scale, offset = _fit_grid(groups, steps, scale)
    scale, offset, steps = best
    return _pack(torch.cat([scale, offset], dim=-1).half(), steps.to(torch.uint8))


def unpack(packed: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return the float32 weight `(n_rows, columns)` that a packed weight stands for."""
    tiles, groups, _ = packed.shape
    split = 2 * _HALVES[bits_of(packed)] * TILE_ROWS
    halves = packed[..., :split].reshape(tiles, groups, -1, TILE_ROWS, 2).permute(0, 3, 1, 2, 4)
    words = packed[..., split:].reshape(tiles, groups, -1, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    return _values(halves.flatten(0, 1), words.flatten(0, 1))[:n_rows]


def _steps(groups: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, low: int, high: int) -> torch.Tensor:
    divisor = torch.where(scale == 0, 1, scale).float()
    return ((groups - offset) / divisor).add_(_ROUNDING).sub_(_ROUNDING).clamp_(low, high)


def _pack_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Pack `(rows, blocks, 144)`: each 8 groups, with 6 bits for a group's scale and 6 for its offset."""
    units = blocks[..., :4].contiguous().view(torch.float16).float()
    low, middle, high = blocks[..., 4:16].split(4, dim=-1)
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], dim=-1) * units[..., :1]
    offsets = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], dim=-1) * -units[..., 1:]
    steps = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32))
    return _pack(torch.stack([scales, offsets], dim=-1).half().flatten(1, 2), steps.flatten(1, 3))


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fit_grid(groups: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float16 scale and offset with which `steps` come nearest to `groups`: the least squared error."""
    mean_step, mean = steps.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    from_mean = steps - mean_step
    spread = from_mean.square().sum(-1, keepdim=True)
    fitted = torch.where(spread > 0, (from_mean * (groups - mean)).sum(-1, keepdim=True) / spread, scale.float())
    return fitted.half(), (mean - fitted * mean_step).half()


def _pack(halves: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Arrange float16 `(rows, groups, 1 or 2)` and uint8 steps `(rows, groups, 32)` in tiles."""
    rows, groups, n_halves = halves.shape
    tiles = -(-rows // TILE_ROWS)
    if n_halves == 2:
        words = _even_then_odd(steps.unflatten(-1, (-1, 8)))
        words = words[..., 0::2] | words[..., 1::2] << 4
    else:
        words = _even_then_odd(steps.unflatten(-1, (-1, 4)))
    packed = []
    for part in (halves.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)), words):
        padded = pad(part, (0, 0, 0, 0, 0, 0, 0, tiles * TILE_ROWS - rows))
        packed.append(padded.unflatten(0, (tiles, TILE_ROWS)).permute(0, 2, 3, 1, 4).reshape(tiles, groups, -1))
    return torch.cat(packed, dim=-1)


def _even_then_odd(columns: torch.Tensor) -> torch.Tensor:
    return torch.cat([columns[..., 0::2], columns[..., 1::2]], dim=-1)


def _values(halves: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return float32 `(rows, columns)` from uint8 `(rows, groups, 1 or 2, 2)` and `(rows, groups, words, 4)`."""
    scale, *offset = halves.contiguous().view(torch.float16).float().unbind(2)
    if offset:
        words = torch.stack([words & 15, words >> 4], dim=-1).flatten(-2)
    steps = torch.stack(words.chunk(2, dim=-1), dim=-1).flatten(2)
    values = steps * scale + offset[0] if offset else (steps.float() - _ZERO_STEP) * scale
    return values.flatten(1)
