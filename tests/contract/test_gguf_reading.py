"""What Brook relies on in the way transformers reads GGUF files, most of which is not documented.

Each test states one thing in its docstring. When one fails after an upgrade, that statement is what changed; what
relies on it is streaming/models/gguf_weights.py and assembling.py.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaForCausalLM

from streaming.models import int4
from streaming.models.assembling import LazyWeight
from streaming.models.loading import load_model
from streaming.models.packing import unpack
from tests.gguf_files import CONFIGS, write_random
from tests.packed import pack_model
from tests.tiny import tiny_llama

# What is more than moved by whole rows, or is no matrix in the file.
ROUNDED = {
    "qwen2moe": {"mlp.shared_expert_gate"},
    "qwen35": {"linear_attn.out_proj"},
    "qwen35moe": {"linear_attn.out_proj", "mlp.shared_expert_gate"},
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_parameters_are_what_transformers_makes_of_the_file(tmp_path, architecture):
    """TENSOR_PROCESSORS and GGUF_ARCHS, with the names of the package gguf, say all about how to read a file."""
    write_random(tmp_path / "model.gguf", architecture)
    dequantizing = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **dequantizing).state_dict()

    floats = load_model(str(tmp_path / "model.gguf"), device="cpu", dtype="float32", quantize="none").model
    ours = floats.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert different == [], f"transformers makes other values of these parameters of {architecture}"

    packed = load_model(str(tmp_path / "model.gguf"), quantize="int4").model
    modules = {n: m for n, m in packed.named_modules() if isinstance(m, int4.PackedLinear | int4.PackedEmbedding)}
    rounded = {n for n, m in modules.items() if not torch.equal(unpack(m.weight, n_rows(m)), theirs[f"{n}.weight"])}
    kinds = {name.partition("layers.")[2].partition(".")[2] for name in rounded}
    assert kinds == ROUNDED.get(architecture, set()), "transformers does more than move the rows of others than these"
    with torch.no_grad():
        ids = torch.arange(5, 30)[None]
        logits, exact = packed(ids).logits, floats(ids).logits
    assert (logits - exact).norm() < 2e-3 * exact.norm()


def n_rows(module):
    return module.out_features if isinstance(module, int4.PackedLinear) else module.num_embeddings


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_weight_is_read_once_when_its_turn_comes(is_packed):
    """`from_pretrained` takes each value of a `state_dict` by `[...]`, once, and asks `get_dtype()` if it may cast."""
    model = pack_model(tiny_llama()) if is_packed else tiny_llama()
    n_read = dict.fromkeys(model.state_dict(), 0)

    def read(name):
        n_read[name] += 1
        return model.state_dict()[name]

    config = model.config
    config.quantization_config = int4.Int4Config().to_dict() if is_packed else None
    loaded = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={
            name: LazyWeight(lambda name=name: read(name), value.dtype == torch.uint8)
            for name, value in model.state_dict().items()
        },
        dtype=torch.float32,
    )
    assert set(n_read.values()) == {1}
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
    assert any(value.dtype == torch.uint8 for value in theirs.values()) == is_packed
