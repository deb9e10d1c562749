"""GGUF files of the architectures that transformers reads, with random values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from tests.tiny_gguf import MERGES, TEMPLATE, TOKEN_TYPES, TOKENS

COMMON = {
    "vocab_size": len(TOKENS),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
}
_FEW = {name: COMMON[name] for name in ("vocab_size", "hidden_size")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_QWEN35 = {
    **_FEW, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_value_head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip

# By the architecture that the file names. What is not said there (sizes of experts) is as transformers has it.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=128),
    "phi3": Phi3Config(**COMMON),
    "gemma2": Gemma2Config(**COMMON, head_dim=64, sliding_window=16),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=64, sliding_window=16),
    "starcoder2": Starcoder2Config(**COMMON),
    "stablelm": StableLmConfig(**COMMON),
    "nemotron": NemotronConfig(**COMMON),
    "falcon": FalconConfig(**_FEW, num_hidden_layers=2, num_attention_heads=4, multi_query=True),
    "gpt2": GPT2Config(vocab_size=len(TOKENS), n_embd=256, n_layer=2, n_head=4, n_ctx=1024),
    "bloom": BloomConfig(**_FEW, n_layer=2, n_head=4),
    "qwen2moe": Qwen2MoeConfig(**COMMON, **_EXPERTS, moe_intermediate_size=1408, shared_expert_intermediate_size=5632),
    "qwen3moe": Qwen3MoeConfig(**COMMON, **_EXPERTS, head_dim=64, moe_intermediate_size=768),
    "lfm2": Lfm2Config(**COMMON, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen35": Qwen3_5TextConfig(**_QWEN35, intermediate_size=512),
    "qwen35moe": Qwen3_5MoeTextConfig(
        **_QWEN35, **_EXPERTS, moe_intermediate_size=256, shared_expert_intermediate_size=256
    ),
}

_HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
_SHAPE = {"context_length": 128, "embedding_length": 256, "feed_forward_length": 512, "rope.freq_base": 1e4}
_QWEN35_KEYS = {
    **_SHAPE, **_HEADS, "block_count": 4, "attention.key_length": 64, "full_attention_interval": 4,
    "ssm.conv_kernel": 4, "ssm.state_size": 64, "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 256,
    "rope.dimension_sections": [4, 2, 2, 0], "rope.dimension_count": 16,
}  # fmt: skip
_KEYS: dict[str, dict[str, Any]] = {
    "lfm2": {**_SHAPE, **_HEADS, "block_count": 2, "attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
    "qwen35": _QWEN35_KEYS,
    "qwen35moe": {
        **_QWEN35_KEYS, "expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256,
        "expert_count": 4, "expert_used_count": 2,
    },
}  # fmt: skip

# Where the float16 scales and offsets of a block are, and how large they make its values some 0.1.
_SCALES = {
    "Q4_0": ([0], 1e-2), "Q4_1": ([0, 1], 1e-2), "Q5_0": ([0], 5e-3), "Q8_0": ([0], 1e-3), "Q2_K": ([40, 41], 2e-3),
    "Q3_K": ([54], 1e-3), "Q4_K": ([0, 1], 1e-4), "Q5_K": ([0, 1], 1e-4), "Q6_K": ([104], 3e-5), "IQ4_NL": ([0], 1e-3),
}  # fmt: skip


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Make blocks of values around 0.1."""
    ggml_type, source = gguf.GGMLQuantizationType[kind], np.random.default_rng(seed)
    if kind not in _SCALES:
        return gguf.quants.quantize(source.standard_normal(shape, np.float32) * np.float32(0.1), ggml_type)
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = source.integers(0, 256, (*shape[:-1], shape[-1] // n_values, n_bytes), dtype=np.uint8)
    places, scale = _SCALES[kind]
    halves = blocks.view(np.float16)
    halves[..., places] = source.uniform(scale / 2, scale, halves[..., places].shape)
    return blocks.reshape(*shape[:-1], -1)


def write_random(
    path: Path,
    architecture: str,
    kind: str = "Q4_0",
    *,
    config: PreTrainedConfig | None = None,
    kinds: Mapping[str, str] = {},
    more: Mapping[str, np.ndarray] = {},
) -> None:
    """Write a model of an architecture, or of its `config`.

    `kind` is the type of its matrices' blocks, where their columns fill them, and `kinds` that of tensors by name;
    `more` are tensors that are no parameters.
    """
    config = config or CONFIGS[architecture]
    with torch.device("meta"):
        shapes = {name: v.shape for name, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_KEYS.get(architecture) or _keys(architecture, config)).items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TOKEN_TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for seed, (tensor, name) in enumerate(_tensors(architecture, config, shapes).items()):
        shape = _shape_in_file(architecture, tensor, tuple(shapes[name]))
        n_values, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        own = kinds.get(tensor, kind if len(shape) > 1 and shape[-1] % n_values == 0 else "F32")
        values = random_blocks(own, shape, seed)
        if "ssm_a" in tensor:
            values = -np.abs(values)
        writer.add_tensor(tensor, values, raw_dtype=gguf.GGMLQuantizationType[own])
    for tensor, values in more.items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(architecture: str, config: PreTrainedConfig) -> dict[str, Any]:
    family = architecture.replace("moe", "_moe")
    known = {key: name for key, name in GGUF_CONFIG_MAPPING[family].items() if name}
    values = {key: 1e4 if name == "rope_theta" else getattr(config, name, None) for key, name in known.items()}
    return {key: value for key, value in values.items() if value is not None}


def _tensors(architecture: str, config: PreTrainedConfig, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Map the tensors of a file to the model's parameters, as transformers does."""
    if is_gguf_arch_supported(architecture):
        mapping = get_gguf_conversion_mapping(architecture, config)
        rules = [[rule for rule in mapping if isinstance(rule, kind)] for kind in (WeightRenaming, WeightConverter)]
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        stems = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]]
        names = [stem.format(bid=i) for stem in stems for i in range(config.num_hidden_layers if "bid" in stem else 1)]
        found = {
            name + end: rename_source_key(name + end, *rules)[0] for name in names for end in (".weight", ".bias", "")
        }
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        found = get_gguf_hf_weights_map(model, processor)
        found = {tensor + ".weight" * tensor.endswith("_exps"): name for tensor, name in found.items()}
    head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {tensor: name for tensor, name in found.items() if name in shapes.keys() - head}


def _shape_in_file(architecture: str, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if "gate_exps" in tensor or "up_exps" in tensor:  # one parameter
        return (shape[0], shape[1] // 2, *shape[2:])
    if "conv" in tensor and len(shape) == 3:
        return (shape[0], shape[2])
    if "gate_inp_shexp" in tensor:
        return shape[1:]
    return shape[::-1] if architecture == "gpt2" and len(shape) == 2 and tensor.startswith("blk") else shape
