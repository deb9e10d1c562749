"""SmolLM's GGUF files, read exactly and fast.

transformers 5.23 reads a GGUF file of the llama architecture through `gguf.GGUFReader`: 15 s for a model of 135M
parameters, at every start, with a tokenizer that does not know the "smollm" rules and joins digits. The files that
carry these rules are therefore read here, in 2 s; all others are left to transformers. Weights come under
transformers' names and in transformers' row order.

Relied on, and stated by tests/model/test_default_model.py: `transformers.integrations.gguf` reads what a file says
and unpacks its blocks (5.23).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

from streaming.models.progress import ProgressCallback, ignore_progress, telling_layers

# torch runs an operation on up to 32,768 values in the calling thread (at::internal::GRAIN_SIZE). Larger ones meet
# all threads at a barrier at every step: no faster here, and 10 to 50 times as long while something else computes.
_CHUNK_VALUES = 1 << 15

_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

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


Unpack = Callable[[torch.Tensor, int], torch.Tensor]
"""From packed blocks `(rows, bytes a row)`, or plain values, and their ggml type to what a parameter holds."""


class SmolGguf:
    """A GGUF file of the llama architecture with the "smollm" vocabulary."""

    def __init__(self, path: Path, metadata: dict[str, Any], is_tied: bool) -> None:
        self.path = path
        self._metadata = metadata
        self._is_tied = is_tied

    @classmethod
    def open(cls, path: Path) -> "SmolGguf | None":
        """Read what the file says about itself; None if it is of another kind. Raises ValueError if it is no GGUF."""
        metadata, tensor_names = read_gguf_metadata(str(path), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
        keys = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        if tuple(map(metadata.get, keys)) != ("llama", "gpt2", "smollm") or not all(map(_rename, tensor_names)):
            return None
        return cls(path, metadata, is_tied="output.weight" not in tensor_names)

    def build_config(self) -> transformers.LlamaConfig:
        llama = {key.removeprefix("llama."): value for key, value in self._metadata.items()}
        return transformers.LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(llama["tokenizer.ggml.tokens"]),
            hidden_size=llama["embedding_length"],
            intermediate_size=llama["feed_forward_length"],
            num_hidden_layers=llama["block_count"],
            num_attention_heads=llama["attention.head_count"],
            num_key_value_heads=llama["attention.head_count_kv"],
            head_dim=llama["embedding_length"] // llama["attention.head_count"],
            max_position_embeddings=llama["context_length"],
            rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
            tie_word_embeddings=self._is_tied,
            **self._special_ids(),
        )

    def build_generation_config(self, **sampling: Any) -> transformers.GenerationConfig:
        """Build the generation defaults; `sampling` adds what a GGUF file cannot say."""
        return transformers.GenerationConfig(**self._special_ids(), **sampling)

    def build_tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """Build llama.cpp's "smollm" tokenizer: each digit alone, then GPT-2's byte-level BPE."""
        tokens: list[str] = self._metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in self._metadata["tokenizer.ggml.merges"]]
        backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        token_types = self._metadata["tokenizer.ggml.token_type"]
        backend.add_special_tokens(
            [
                AddedToken(token, normalized=False, special=True)
                for token, token_type in zip(tokens, token_types, strict=True)
                if token_type == _CONTROL_TOKEN
            ]
        )
        ids = self._special_ids()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=tokens[ids["bos_token_id"]],
            eos_token=tokens[ids["eos_token_id"]],
            pad_token=tokens[ids["pad_token_id"]],
            unk_token=tokens[self._metadata.get("tokenizer.ggml.unknown_token_id", 0)],
            model_max_length=self._metadata["llama.context_length"],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = self._metadata.get("tokenizer.chat_template")
        return tokenizer

    def read_weights(self, unpack: Unpack, progress: ProgressCallback = ignore_progress) -> dict[str, torch.Tensor]:
        """Read the weights as `{parameter name: unpack(blocks, ggml type)}`."""
        blocks = self.read_blocks()
        return {name: unpack(*block) for name, block in telling_layers(blocks.items(), blocks, progress)}

    def read_blocks(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Read the weights as they are, `(rows, bytes a row)` or plain values, with each one's ggml type."""
        header = GgufHeader.from_file(str(self.path))
        n_heads = {
            "self_attn.q_proj.weight": self._metadata["llama.attention.head_count"],
            "self_attn.k_proj.weight": self._metadata["llama.attention.head_count_kv"],
        }
        weights = {}
        for gguf_name, lazy in load_gguf_state_dict(header).items():
            name = _rename(gguf_name)
            heads = [n for suffix, n in n_heads.items() if name.endswith(suffix)]
            blocks = _restore_rotary_rows(lazy[:], heads[0]) if heads else lazy[:]
            weights[name] = (blocks, header.ggml_types[gguf_name])
        return weights

    def _special_ids(self) -> dict[str, Any]:
        ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
        eos = self._metadata["tokenizer.ggml.eos_token_id"]
        return {name: self._metadata.get(f"tokenizer.ggml.{key}", eos) for name, key in ids.items()}


def _rename(gguf_name: str) -> str:
    """Turn a tensor's name into transformers'; "" for one that is not known."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _NAMES:
        return ""
    return f"{f'model.layers.{match[1]}.' if match[1] else ''}{_NAMES[match[2]]}.weight"


def unpack_blocks(blocks: torch.Tensor, ggml_type: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack `(rows, bytes a row)` into `(rows, columns)`; plain values are only cast."""
    if ggml_type not in GGML_BLOCK:
        if not blocks.is_floating_point():
            raise ValueError(f"GGML type {ggml_type} is not known; choose a file of another quantization")
        return blocks.to(dtype)
    block_values, block_bytes = GGML_BLOCK[ggml_type]
    flat = blocks.view(-1, block_bytes)
    values = torch.empty(len(flat), block_values, dtype=dtype)
    step = _CHUNK_VALUES // block_values
    for start in range(0, len(flat), step):
        chunk = flat[start : start + step]
        values[start : start + step] = dequantize(chunk, ggml_type).view(len(chunk), block_values)
    return values.view(len(blocks), -1)


def _restore_rotary_rows(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the two halves of each head's rows.

    Blocks run along a row, so whole rows can change places while packed. Source: llama.cpp, `convert_hf_to_gguf.py`,
    `LlamaModel.permute`.
    """
    rows, *rest = tensor.shape
    return tensor.reshape(n_heads, rows // n_heads // 2, 2, *rest).transpose(1, 2).reshape(tensor.shape)
