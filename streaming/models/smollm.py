"""What SmolLM's GGUF files say that transformers does not hear.

transformers 5.23 knows no "smollm" rules and joins digits, and takes 8 s for a config and 6 s for a tokenizer; here
both take less than one.
"""

from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from streaming.models.gguf import GgufFile

_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def is_smollm(file: GgufFile) -> bool:
    """Whether a file is of the llama architecture with the "smollm" vocabulary."""
    keys = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    return tuple(map(file.metadata.get, keys)) == ("llama", "gpt2", "smollm")


def build_config(file: GgufFile) -> transformers.LlamaConfig:
    llama = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
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
        tie_word_embeddings="output.weight" not in file.tensors,
        **_special_ids(file),
    )


def build_generation_config(file: GgufFile, **sampling: Any) -> transformers.GenerationConfig:
    """Build the generation defaults; `sampling` adds what a GGUF file cannot say."""
    return transformers.GenerationConfig(**_special_ids(file), **sampling)


def build_tokenizer(file: GgufFile) -> transformers.PreTrainedTokenizerFast:
    """Build llama.cpp's "smollm" tokenizer: each digit alone, then GPT-2's byte-level BPE."""
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    token_types = file.metadata["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, token_type in zip(tokens, token_types, strict=True)
            if token_type == _CONTROL_TOKEN
        ]
    )
    ids = _special_ids(file)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[ids["bos_token_id"]],
        eos_token=tokens[ids["eos_token_id"]],
        pad_token=tokens[ids["pad_token_id"]],
        unk_token=tokens[file.metadata.get("tokenizer.ggml.unknown_token_id", 0)],
        model_max_length=file.metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = file.metadata.get("tokenizer.chat_template")
    return tokenizer


def _special_ids(file: GgufFile) -> dict[str, Any]:
    ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    eos = file.metadata["tokenizer.ggml.eos_token_id"]
    return {name: file.metadata.get(f"tokenizer.ggml.{key}", eos) for name, key in ids.items()}
