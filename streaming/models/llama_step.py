"""The compiled decoding step, prepared for one model: which models it fits, and what it needs to know of them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from streaming.models import attention_kernel, parallel
from streaming.models.int4 import PackedLinear
from streaming.models.kv_cache import BLOCK_TOKENS, GrowingLayer, make_growing
from streaming.models.packing import GROUP_COLUMNS, TILE_ROWS
from streaming.models.step_kernel import CHUNK, LAYER, PHASES_A_LAYER, ROW, SETTINGS, decode_step
from streaming.models.tile_products import ROUNDED_BYTES, by_fours

_KNOWN = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

# Rotary tables of these depend on the length of the sequence.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

_steps: WeakKeyDictionary[Any, "LlamaStep | None"] = WeakKeyDictionary()


def step_of(model: Any) -> "LlamaStep | None":
    """Return the compiled step of a model, prepared once, or None when the model is not of a kind that it fits."""
    if model not in _steps:
        _steps[model] = LlamaStep(model) if _fits(model) else None
    return _steps[model]


class OpenCache:
    """A cache of one sequence that the compiled step reads and appends to; `cache` stays usable as it was.

    Made by `LlamaStep.open`.
    """

    def __init__(self, layers: list[GrowingLayer]) -> None:
        self._layers = layers
        self._rooms = np.empty((len(self._layers), 2), np.int64)
        self._capacity = 0

    @property
    def length(self) -> int:
        """How many positions are read."""
        return self._layers[0].length

    def make_room(self, n_tokens: int) -> tuple[int, int]:
        """Have room for `n_tokens` more; return how many positions fit, and the address of the rooms' addresses."""
        if self.length + n_tokens > self._capacity:
            for addresses, layer in zip(self._rooms, self._layers, strict=True):
                layer.reserve(self.length + n_tokens)
                assert layer.key_room is not None
                assert layer.value_room is not None
                addresses[:] = layer.key_room.data_ptr(), layer.value_room.data_ptr()
            self._capacity = min(layer.capacity for layer in self._layers)
        return self._capacity, self._rooms.ctypes.data

    def append(self, n_tokens: int) -> None:
        """Take note that `n_tokens` more are read."""
        for layer in self._layers:
            layer.length += n_tokens


class LlamaStep:
    """The decoding step of one model.

    Any thread may read with it, one at a time: the buffers between its phases belong to the model, and two readers at
    once would write past each other's. A cache belongs to one reader.
    """

    guess_sizes = (0, 3, 7)
    """How many guessed tokens to read with a newest one: the kernel unpacks weights once for four."""
    reads_prompts = True
    """Whether it has `read_on`."""

    def __init__(self, model: Any) -> None:
        # The model owns this object through a weak dictionary: only its parts may be kept.
        self._embed, self._rotary, self._head = model.model.embed_tokens, model.model.rotary_emb, model.lm_head
        config, attention = model.config, model.model.layers[0].self_attn
        self._hidden, self._intermediate = config.hidden_size, config.intermediate_size
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = attention.head_dim
        self._layers = np.zeros(config.num_hidden_layers, LAYER)
        for record, layer in zip(self._layers, model.model.layers, strict=True):
            _describe_layer(record, layer)
        self._settings = np.zeros(1, SETTINGS)
        self._step = self._settings["step"][0]
        self._settings["norm_eps"], self._settings["attention_scale"] = config.rms_norm_eps, attention.scaling
        self._set(
            n_layers=config.num_hidden_layers,
            layers=self._layers.ctypes.data,
            hidden=config.hidden_size,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            intermediate=config.intermediate_size,
            final_norm=model.model.norm.weight.data_ptr(),
            head=self._head.weight.data_ptr(),
            head_b=self._head.weight.shape[-1],
            head_tiles=self._head.weight.shape[0],
        )
        # The kernel knows weights by their addresses: what lies there stays, whatever the model's parameters become.
        self._weights = [parameter.detach() for parameter in model.parameters()]
        self._room_for = (0, 0, 0)  # rows, positions, threads
        self._reading = threading.Lock()

    def open(self, cache: DynamicCache) -> OpenCache:
        """Make a cache of one sequence ready, empty or not; its layers become GrowingLayers of float16.

        `is_continuable(cache)` must hold.
        """
        layers = make_growing(cache, torch.float16)
        for layer in layers:
            if not layer.is_initialized:
                nothing = _floats(1, self._kv_heads, 0, self._head_dim)
                layer.lazy_initialization(nothing, nothing)
        return OpenCache(layers)

    @contextmanager
    def continuing(self, cache: DynamicCache) -> Iterator[Callable[..., torch.Tensor]]:
        """Give a function that appends tokens to a cache and returns the logits after each, float32 `(n, vocab)`."""
        opened = self.open(cache)
        yield lambda *token_ids: self.read([(opened, token_ids)], range(len(token_ids)))

    def read_on(self, cache: DynamicCache, token_ids: Sequence[int]) -> torch.Tensor:
        """Append tokens to a cache and return the logits after the last, float32 `(1, vocab)`."""
        return self.read([(self.open(cache), token_ids)], [len(token_ids) - 1])

    def read(self, pieces: Sequence[tuple[OpenCache, Sequence[int]]], wanted: Sequence[int] = (0,)) -> torch.Tensor:
        """Append tokens to several caches at once.

        `wanted` are the rows, numbered through all pieces, after which the logits are returned: float32
        `(len(wanted), vocab)`.
        """
        with self._reading:
            return self._read(pieces, wanted)

    def _read(self, pieces: Sequence[tuple[OpenCache, Sequence[int]]], wanted: Sequence[int]) -> torch.Tensor:
        token_ids = [token_id for _, ids in pieces for token_id in ids]
        places = [(cache, cache.length, *cache.make_room(len(ids)), len(ids)) for cache, ids in pieces]
        self._make_room(len(token_ids), max(capacity for _, _, capacity, _, _ in places), parallel.team_size())
        row = 0
        for _, start, capacity, rooms, n_tokens in places:
            table = self._rows[row : row + n_tokens]
            table["position"] = positions = np.arange(start, start + n_tokens)
            table["capacity"], table["rooms"] = capacity, rooms
            table["cos"] = self._cos.data_ptr() + positions * self._cos.stride(0) * 4
            table["sin"] = self._sin.data_ptr() + positions * self._sin.stride(0) * 4
            row += n_tokens
        chunks = _chunks(len(ids) for _, ids in pieces)
        self._x[: len(token_ids)] = self._embed(torch.tensor(token_ids))
        numbers = np.array(wanted, np.int64)
        logits = _floats(by_fours(len(wanted)), self._head.weight.shape[0] * TILE_ROWS)
        self._set(n_rows=len(token_ids), n_wanted=len(wanted), wanted=numbers.ctypes.data, logits=logits.data_ptr())
        self._set(n_chunks=len(chunks), chunks=chunks.ctypes.data)
        self._phases.zero_()
        parallel.run(decode_step, self._settings.ctypes.data, self._room_for[-1])
        for cache, ids in pieces:
            cache.append(len(ids))
        return logits[: len(wanted), : self._head.out_features]

    def _make_room(self, n_rows: int, n_positions: int, n_threads: int) -> None:
        rows, positions, threads = self._room_for
        if n_rows <= rows and n_positions <= positions and n_threads == threads:
            return
        rows, positions = by_fours(max(rows, n_rows)), max(positions, n_positions)
        self._room_for = (0, 0, 0)  # until all of it is there: memory may run out half-way
        cos, sin = self._rotary(_floats(1), torch.arange(positions)[None])
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self._rows = np.zeros(rows, ROW)
        attended = self._heads * self._head_dim
        self._x, self._gated = _floats(rows, self._hidden), _floats(rows, self._intermediate)
        self._queries, self._attended = _floats(rows, attended), _floats(rows, attended)
        widest = max(self._intermediate, attended, self._hidden)
        rounded_bytes = rows * widest // GROUP_COLUMNS * ROUNDED_BYTES + self._hidden * 4
        self._rounded = torch.empty(n_threads, rounded_bytes, dtype=torch.uint8)
        self._room = _floats(n_threads, rows * self._head_dim)
        n_queries = min(rows, attention_kernel.ROWS_AT_ONCE) * (self._heads // self._kv_heads)
        self._scores = _floats(n_threads, n_queries, positions + BLOCK_TOKENS)
        self._tiles = torch.empty(n_threads, attention_kernel.TILE_BYTES_ROOM, dtype=torch.uint8)
        phase_bytes, n_phases = parallel.phase_bytes(n_threads), PHASES_A_LAYER * len(self._layers) + 1
        self._phases = torch.empty(n_phases * phase_bytes, dtype=torch.uint8)
        self._set(
            n_threads=n_threads,
            phases=self._phases.data_ptr(),
            phase_bytes=phase_bytes,
            rows=self._rows.ctypes.data,
            x=self._x.data_ptr(),
            gated=self._gated.data_ptr(),
            queries=self._queries.data_ptr(),
            attended=self._attended.data_ptr(),
            rounded=self._rounded.data_ptr(),
            rounded_bytes=rounded_bytes,
            room=self._room.data_ptr(),
            room_bytes=self._room.stride(0) * 4,
            scores=self._scores.data_ptr(),
            scores_bytes=self._scores.stride(0) * 4,
            score_bytes=self._scores.stride(1) * 4,
            tiles=self._tiles.data_ptr(),
        )
        self._room_for = (rows, positions, n_threads)

    def _set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._step[name] = value


def _floats(*shape: int) -> torch.Tensor:
    # Not torch's default dtype: whoever loads a model in another thread changes it for the whole process meanwhile.
    return torch.empty(*shape, dtype=torch.float32)


def _chunks(lengths: Iterable[int]) -> Any:
    """Cut each sequence's rows into those that attend together: the first one's number and how many, CHUNK records."""
    chunks: list[tuple[int, int]] = []
    row, most = 0, attention_kernel.ROWS_AT_ONCE
    for length in lengths:
        chunks += [(row + start, min(most, length - start)) for start in range(0, length, most)]
        row += length
    return np.array(chunks, CHUNK)


def _describe_layer(record: Any, layer: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    matrices = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    for name, linear in matrices.items():
        record[name], record[f"{name}_b"] = linear.weight.data_ptr(), linear.weight.shape[-1]
        if linear.bias is not None:
            record[f"{name}_bias"] = linear.bias.data_ptr()
    norms = {
        "input_norm": layer.input_layernorm,
        "post_norm": layer.post_attention_layernorm,
        "q_norm": getattr(attention, "q_norm", None),
        "k_norm": getattr(attention, "k_norm", None),
    }
    for name, norm in norms.items():
        if norm is not None:
            record[name] = norm.weight.data_ptr()


def _fits(model: Any) -> bool:
    if type(model) not in _KNOWN:
        return False
    config, layers = model.config, model.model.layers
    linears = [module for module in model.modules() if isinstance(module, PackedLinear | torch.nn.Linear)]
    mlp_biases = [getattr(layer.mlp, name).bias for layer in layers for name in ("gate_proj", "up_proj", "down_proj")]
    vectors = [parameter for name, parameter in model.named_parameters() if "norm" in name or "bias" in name]
    return (
        all(isinstance(linear, PackedLinear) for linear in linears)
        and all(linear.out_features % TILE_ROWS == 0 for linear in linears if linear is not model.lm_head)
        and all(bias is None for bias in (*mlp_biases, model.lm_head.bias))
        and all(vector.dtype == torch.float32 and vector.is_contiguous() for vector in vectors)
        and config.hidden_act == "silu"
        and layers[0].self_attn.head_dim % attention_kernel.COLUMNS == 0
        and config.rope_parameters["rope_type"] not in _LENGTH_DEPENDENT_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
    )
