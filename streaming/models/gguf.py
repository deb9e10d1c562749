"""A llama GGUF file, converted once into a folder that loads fast in any dtype.

The folder is a normal transformers one (config, generation config, tokenizer, chat template), but for the
weights: they stay in the quantized blocks of the file, under transformers' names and in transformers' row order,
in `blocks.safetensors`. Nothing is rounded, so `read_weights` gives the exact values of the file in float32 and
their correct rounding in every other dtype, and the folder is as small as the file.

Relied on, and stated by tests/model/test_default_model.py: `transformers.integrations.gguf` (5.23) reads GGUF
metadata in 0.4 s where `gguf.GGUFReader` (0.19) takes 4.4 s on a vocabulary of 49,152.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict, read_gguf_metadata
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from streaming.models.progress import LoadProgress, ProgressCallback, ignore_progress

WEIGHTS_FILE = "blocks.safetensors"

# torch runs an operation on up to 32,768 values in the calling thread (at::internal::GRAIN_SIZE). Larger ones meet
# all threads at a barrier at every step, which is no faster here and takes 10 to 50 times as long on a busy machine.
_CHUNK_VALUES = 1 << 15

_CONTROL_TOKEN = 3  # `token_type` of llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(
    gguf_path: Path, folder: Path, sampling: dict[str, Any], progress: ProgressCallback = ignore_progress
) -> None:
    """Write the model in `gguf_path` into `folder`, which exists.

    `sampling` are the generation defaults to write beside the token ids: a GGUF file carries none. Raises ValueError
    for anything but the llama architecture with the "smollm" vocabulary.
    """
    metadata, tensor_names = _read_metadata(gguf_path)
    if metadata["general.architecture"] != "llama" or not _is_smollm(metadata):
        raise ValueError(f"{gguf_path} holds a model of a kind that this conversion does not know")
    config = _build_config(metadata, tied="output.weight" not in tensor_names)
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    transformers.GenerationConfig(**ids, **sampling).save_pretrained(folder)
    _build_tokenizer(metadata).save_pretrained(folder)
    _convert_weights(gguf_path, folder, config, progress)


def build_known_tokenizer(gguf_path: Path) -> transformers.PreTrainedTokenizerFast | None:
    """Build the tokenizer of a file whose kind transformers gets wrong; None for any other kind."""
    metadata, _ = _read_metadata(gguf_path)
    return _build_tokenizer(metadata) if _is_smollm(metadata) else None


def read_weights(
    folder: Path, dtype: torch.dtype, progress: ProgressCallback = ignore_progress
) -> dict[str, torch.Tensor]:
    """Read a converted folder's weights as `{parameter name: tensor of dtype}`."""
    weights = {}
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        ggml_types = file.metadata()
        for done, name in enumerate(ggml_types):
            progress(LoadProgress("weights", done, len(ggml_types)))
            weights[name] = _unpack(file.get_tensor(name), int(ggml_types[name]), dtype)
        progress(LoadProgress("weights", len(ggml_types), len(ggml_types)))
    return weights


def _read_metadata(gguf_path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    return read_gguf_metadata(str(gguf_path), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))


def _is_smollm(metadata: dict[str, Any]) -> bool:
    return (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")) == ("gpt2", "smollm")


def _build_config(metadata: dict[str, Any], tied: bool) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def _build_tokenizer(metadata: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """Build llama.cpp's "smollm" tokenizer: each digit alone, then GPT-2's byte-level BPE.

    transformers 5.23's own conversion does not know this pre-tokenizer and joins digits.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, normalized=False, special=True)
        for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if token_type == _CONTROL_TOKEN
    ]
    backend.add_special_tokens(control)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer


def _convert_weights(
    gguf_path: Path, folder: Path, config: transformers.LlamaConfig, progress: ProgressCallback
) -> None:
    ggml_types = GgufHeader.from_file(str(gguf_path)).ggml_types
    lazy = load_gguf_state_dict(GgufHeader.from_file(str(gguf_path)))
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    tensors: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    for done, (gguf_name, blocks) in enumerate(lazy.items()):
        progress(LoadProgress("conversion", done, len(lazy)))
        name, tensor = _rename(gguf_name), blocks[:]
        for suffix, n_heads in heads.items():
            if f"{suffix}.weight" in name:
                tensor = _restore_rotary_rows(tensor, n_heads)
        tensors[name] = tensor
        types[name] = str(ggml_types[gguf_name])
    save_file(tensors, folder / WEIGHTS_FILE, metadata=types)
    progress(LoadProgress("conversion", len(lazy), len(lazy)))


def _rename(gguf_name: str) -> str:
    layer, stem, suffix = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name).groups()  # type: ignore[union-attr]
    return f"{f'model.layers.{layer}.' if layer else ''}{_NAMES[stem]}.{suffix}"


def _restore_rotary_rows(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the two halves of each head's rows.

    Blocks run along a row, so whole rows can change places while they are packed. Source: llama.cpp
    `convert_hf_to_gguf.py`, `LlamaModel.permute`.
    """
    rows, *rest = tensor.shape
    return tensor.reshape(n_heads, rows // n_heads // 2, 2, *rest).transpose(1, 2).reshape(tensor.shape)


def _unpack(blocks: torch.Tensor, ggml_type: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack `(rows, bytes a row)` into `(rows, columns)`; plain values are only cast."""
    if ggml_type not in GGML_BLOCK:
        return blocks.to(dtype)
    block_values, block_bytes = GGML_BLOCK[ggml_type]
    flat = blocks.view(-1, block_bytes)
    values = torch.empty(len(flat), block_values, dtype=dtype)
    step = _CHUNK_VALUES // block_values
    for start in range(0, len(flat), step):
        chunk = flat[start : start + step]
        values[start : start + step] = dequantize(chunk, ggml_type).view(len(chunk), block_values)
    return values.view(len(blocks), -1)
