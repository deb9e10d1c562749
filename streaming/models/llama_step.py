"""The compiled decoding step, prepared for one model: which models it fits, and what it needs to know of them."""

import functools
from collections.abc import Callable, Iterator
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

from streaming.models import parallel
from streaming.models.int4 import PackedLinear
from streaming.models.kernels import ROUNDED_BYTES
from streaming.models.kv_cache import BLOCK_TOKENS, GrowingLayer, make_growing
from streaming.models.packing import GROUP_COLUMNS, TILE_ROWS
from streaming.models.step_kernel import ATTENTION_COLUMNS, LAYER, PHASES_A_LAYER, SETTINGS, decode_step

_KNOWN = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

# Rotary tables of these depend on the length of the sequence.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

_steps: WeakKeyDictionary[Any, "LlamaStep | None"] = WeakKeyDictionary()


def step_of(model: Any) -> "LlamaStep | None":
    """Return the compiled step of a model, prepared once, or None when the model is not of a kind that it fits."""
    if model not in _steps:
        _steps[model] = LlamaStep(model) if _fits(model) else None
    return _steps[model]


class LlamaStep:
    """The decoding step of one model. Not thread-safe."""

    def __init__(self, model: Any) -> None:
        # The model owns this object through a weak dictionary: only its parts may be kept.
        self._embed, self._rotary, self._head = model.model.embed_tokens, model.model.rotary_emb, model.lm_head
        config, attention = model.config, model.model.layers[0].self_attn
        heads, head_dim = config.num_attention_heads, attention.head_dim
        widest = max(config.intermediate_size, heads * head_dim, config.hidden_size)
        self._rounded_bytes = widest // GROUP_COLUMNS * ROUNDED_BYTES + config.hidden_size * 4
        self._hidden, self._gated = torch.empty(config.hidden_size), torch.empty(config.intermediate_size)
        self._queries, self._attended = torch.empty(heads * head_dim), torch.empty(heads * head_dim)
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
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate=config.intermediate_size,
            final_norm=model.model.norm.weight.data_ptr(),
            head=self._head.weight.data_ptr(),
            head_b=self._head.weight.shape[-1],
            head_tiles=self._head.weight.shape[0],
            rounded_stride=self._rounded_bytes,
            x=self._hidden.data_ptr(),
            queries=self._queries.data_ptr(),
            attended=self._attended.data_ptr(),
            gated=self._gated.data_ptr(),
        )
        self._capacity, self._n_threads = 0, 0

    @contextmanager
    def continuing(self, cache: DynamicCache) -> Iterator[Callable[[int], torch.Tensor]]:
        """Give a function that appends a token to a cache of one sequence and returns the logits after it.

        `is_continuable(cache)` must hold; its layers become GrowingLayers of float16. Logits are float32 `(1, vocab)`.
        """
        layers = make_growing(cache, torch.float16)
        self._capacity = 0
        yield functools.partial(self._read, layers)

    def _read(self, layers: list[GrowingLayer], token_id: int) -> torch.Tensor:
        position, n_threads = layers[0].length, parallel.team_size()
        if position + 1 > self._capacity or n_threads != self._n_threads:
            self._make_room(layers, position + 1, n_threads)
        logits = torch.empty(1, self._head.weight.shape[0] * TILE_ROWS)
        self._hidden.copy_(self._embed(torch.tensor([token_id]))[0])
        row = position * self._cos.shape[-1] * 4
        self._set(position=position, cos=self._cos.data_ptr() + row, sin=self._sin.data_ptr() + row)
        self._set(logits=logits.data_ptr())
        self._phases.zero_()
        parallel.run(decode_step, self._settings.ctypes.data, n_threads)
        for layer in layers:
            layer.length = position + 1
        return logits[:, : self._head.out_features]

    def _make_room(self, layers: list[GrowingLayer], length: int, n_threads: int) -> None:
        for record, layer in zip(self._layers, layers, strict=True):
            layer.reserve(length)
            assert layer.key_room is not None
            assert layer.value_room is not None
            record["keys"], record["values"] = layer.key_room.data_ptr(), layer.value_room.data_ptr()
        self._capacity, self._n_threads = min(layer.capacity for layer in layers), n_threads
        positions = torch.arange(self._capacity)[None]
        cos, sin = self._rotary(self._hidden, positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self._rounded = torch.empty(n_threads, self._rounded_bytes, dtype=torch.uint8)
        self._scores = torch.empty(n_threads, self._capacity + BLOCK_TOKENS)
        phase_bytes, n_phases = parallel.phase_bytes(n_threads), PHASES_A_LAYER * len(layers) + 1
        self._phases = torch.empty(n_phases * phase_bytes, dtype=torch.uint8)
        self._set(
            n_threads=n_threads,
            phases=self._phases.data_ptr(),
            phase_bytes=phase_bytes,
            capacity=self._capacity,
            rounded=self._rounded.data_ptr(),
            scores=self._scores.data_ptr(),
            scores_stride=self._scores.shape[1] * 4,
        )

    def _set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._step[name] = value


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
        and layers[0].self_attn.head_dim % ATTENTION_COLUMNS == 0
        and config.rope_parameters["rope_type"] not in _LENGTH_DEPENDENT_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
    )
