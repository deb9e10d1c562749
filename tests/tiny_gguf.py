"""A tiny model as llama.cpp writes it."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _gpt2_bytes() -> Iterator[str]:
    """GPT-2's spelling of each byte as a visible character."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    n_hidden = 0
    for byte in range(256):
        if byte in shown:
            yield chr(byte)
        else:
            yield chr(256 + n_hidden)
            n_hidden += 1


TOKENS = [*CONTROL, *sorted(_gpt2_bytes()), "Ġt", "he", "Ġthe", "12"]
TOKEN_TYPES = [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL))


def write_gguf(path: Path, *, pre: str = "smollm", tied: bool = True, matrices: str = "Q4_1") -> LlamaForCausalLM:
    """Write a random model; return the model that its values, once unpacked by the gguf package, make."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.norm.weight)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(12345.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TOKEN_TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    exact = {}
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = value.numpy()
        n_heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if n_heads:
            values = interleave(values, n_heads)
        kind = (
            gguf.GGMLQuantizationType.F32 if values.ndim == 1
            else gguf.GGMLQuantizationType.Q8_0 if "embed" in name or "lm_head" in name
            else gguf.GGMLQuantizationType[matrices]
        )  # fmt: skip
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
        unpacked = gguf.quants.dequantize(packed, kind)
        exact[name] = torch.from_numpy(separate(unpacked, n_heads) if n_heads else unpacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(exact, strict=not tied)
    return model


def interleave(weights, n_heads):
    """What llama.cpp's converter does to the rows of q and k (`LlamaModel.permute`), written out row by row."""
    size = len(weights) // n_heads
    order = [h * size + half * (size // 2) + i for h in range(n_heads) for i in range(size // 2) for half in (0, 1)]
    return weights[order]


def separate(weights, n_heads):
    """The inverse of `interleave`."""
    size = len(weights) // n_heads
    order = [h * size + half * (size // 2) + i for h in range(n_heads) for i in range(size // 2) for half in (0, 1)]
    result = weights.copy()
    result[order] = weights
    return result
