"""Small random models of several families, with packed weights."""

import string

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from streaming.models.arena import move_to_arena
from streaming.models.int4 import PackedEmbedding, PackedLinear, replace_linears
from streaming.models.packing import quantize
from tests.tiny import byte_tokenizer

COMMON = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

WITH_STEP = {
    "llama": LlamaConfig(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "llama tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**COMMON, attention_bias=True),
    "llama 3": LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama with wide heads": LlamaConfig(**{**COMMON, "head_dim": 128}),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "qwen 2 (biases)": Qwen2Config(**COMMON),
    "qwen 3 (norms of heads)": Qwen3Config(**COMMON),
}
WITHOUT_STEP = {
    "gpt-neox": GPTNeoXConfig(**{name: COMMON[name] for name in KEPT}, intermediate_size=96),
    "opt": OPTConfig(
        **{name: COMMON[name] for name in KEPT}, ffn_dim=96, word_embed_proj_dim=64, eos_token_id=258, pad_token_id=256
    ),
    "gemma": GemmaConfig(**COMMON),
    "mistral with a window": MistralConfig(**COMMON, sliding_window=16),
    "llama with odd heads": LlamaConfig(**{**COMMON, "head_dim": 32}),
    "llama with gelu": LlamaConfig(**COMMON, hidden_act="gelu"),
}


def random_model(config, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = 258
    model.generation_config.pad_token_id = 256
    return model


def pack_model(model):
    """Pack a float32 model in place as loading it packed does, and return it."""
    floats = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    replace_linears(model)
    packed_weights = {}
    for name, old in floats.items():
        new = model.get_submodule(name)
        if not isinstance(new, PackedLinear | PackedEmbedding):
            continue
        key = id(old.weight)
        if key not in packed_weights:
            packed_weights[key] = nn.Parameter(quantize(old.weight, new.bits), requires_grad=False)
        new.weight = packed_weights[key]
        if isinstance(new, PackedLinear):
            new.bias = old.bias
        del old.weight
    move_to_arena(model)
    return model


def murmuring_llama() -> PreTrainedModel:
    """A packed Llama that says small letters without end, which hang on every token before them.

    Greedy, it says something else to everyone who asks something else; with byte_tokenizer.
    """
    model = random_model(WITH_STEP["llama"])
    torch.manual_seed(1)
    says = torch.zeros(model.config.vocab_size, 1)
    says[byte_tokenizer()(string.ascii_lowercase)["input_ids"]] = 1
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
            matrix.add_(torch.randn_like(matrix) * 0.3)  # else it soon says the same again and again
        model.lm_head.weight.mul_(says)
    return pack_model(model)
