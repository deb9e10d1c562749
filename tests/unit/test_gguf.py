"""GGUF files: what they say, their values, and the models that are made of them."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from streaming.errors import ModelDamaged
from streaming.models import int4, loading
from streaming.models.gguf import GgufFile, unpack
from streaming.models.gguf_weights import find_parameters
from streaming.models.llama_step import step_of
from streaming.models.loading import load_model
from streaming.models.packing import bits_of
from streaming.models.packing import unpack as unpack_packed
from tests.gguf_files import CONFIGS, random_blocks, write_random
from tests.memory import mb_to_load
from tests.tiny_gguf import TEMPLATE, TOKENS, write_gguf

IDS = torch.arange(5, 30)[None]
FOUR_BITS = {"Q4_0", "Q4_1", "Q4_K"}
EXACT = {"Q4_0", "Q4_1", "Q5_0", "Q8_0"}
KINDS = [*sorted(EXACT), "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q5_1", "IQ4_NL", "F16", "BF16", "F32"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def weights(model) -> dict[str, tuple[torch.Tensor, int]]:
    """The packed weights by name, and their rows."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, int4.PackedLinear | int4.PackedEmbedding)}
    rows = {n: getattr(m, "out_features", None) or m.num_embeddings for n, m in modules.items()}
    return {n: (m.weight, rows[n]) for n, m in modules.items()}


def test_a_file_says_what_the_gguf_package_reads_in_it(path):
    write_random(path, "llama")
    file, reader = GgufFile.open(path), gguf.GGUFReader(path)
    assert file.architecture == "llama"
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == fields
    assert file.metadata["tokenizer.ggml.tokens"] == TOKENS
    assert file.metadata["tokenizer.chat_template"] == TEMPLATE
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert file.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert file.read(tensor.name).numpy().tobytes() == tensor.data.tobytes()


def test_any_alignment_is_kept_to(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    values = np.arange(5, dtype=np.float32)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile.open(path)
    assert file.read("b").view(torch.float32).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("n_bytes", [0, 3, 20, 100, 5000, -100])
def test_a_part_of_a_file_is_refused(path, n_bytes):
    write_random(path, "llama")
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ModelDamaged, match="cannot be loaded"):
        load_model(str(path))
    if n_bytes > 20:
        with pytest.raises(ValueError, match="cut short"):
            GgufFile.open(path)


def test_another_file_and_blocks_of_the_future_are_refused(path):
    path.write_bytes(b"GGUF, but only by name")
    with pytest.raises(ValueError, match="version 2 or 3"):
        GgufFile.open(path)
    write_random(path, "llama", kind="F32")
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelDamaged, match=r"GGML type 99 of token_embd\.weight is not known"):
        load_model(str(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_that_the_gguf_package_unpacks(kind, dtype):
    ggml_type = gguf.GGMLQuantizationType[kind]
    blocks = random_blocks(kind, (3, 50, 1024))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, ggml_type).reshape(3, 50, 1024)).to(dtype)
    raw = torch.from_numpy(blocks.view(np.uint8).reshape(3, 50, -1))
    assert torch.equal(unpack(raw, int(ggml_type), dtype), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2"])
def test_blocks_are_packed_as_they_are_or_rounded_once(path, architecture, kind):
    """gemma2 has no compiled step; its embedding is scaled, and so stays as it is."""
    write_random(path, architecture, kind)
    packed = load_model(str(path), quantize="int4").model
    exact = load_model(str(path), quantize="none", dtype="float32").model
    assert (step_of(packed) is None) == (architecture == "gemma2")
    assert len(weights(packed)) == 2 * 7 + 2 * (architecture != "gemma2")
    for name, (weight, n_rows) in weights(packed).items():
        assert bits_of(weight) == (4 if kind in FOUR_BITS else 8), name
        values, expected = unpack_packed(weight, n_rows), exact.get_parameter(f"{name}.weight")
        if kind in EXACT:
            assert torch.equal(values, expected), name
        else:
            assert (values - expected).abs().max() < 0.005 * expected.abs().max(), name
    with torch.no_grad():
        logits, expected = packed(IDS).logits, exact(IDS).logits
    assert (logits - expected).norm() < (1e-3 if kind in EXACT else 0.05) * expected.norm()


def test_tensors_of_a_file_may_be_of_different_types(path):
    """As in a Q4_K_M of llama.cpp, whose head and some other matrices take more bits."""
    kinds = {"token_embd.weight": "Q4_0", "output.weight": "Q6_K", "blk.1.ffn_down.weight": "Q6_K"}
    write_random(path, "llama", "Q4_K", kinds=kinds)
    model = load_model(str(path)).model
    bits = {name: bits_of(weight) for name, (weight, _) in weights(model).items()}
    assert {name for name, n in bits.items() if n == 8} == {"lm_head", "model.layers.1.mlp.down_proj"}
    exact = load_model(str(path), quantize="none", dtype="float32").model
    with torch.no_grad(), step_of(model).continuing(DynamicCache(config=model.config)) as append:
        expected = exact(IDS).logits[0]
        for logits in (model(IDS).logits[0], append(*IDS[0].tolist())):
            assert (logits - expected).norm() < 0.05 * expected.norm()


def test_a_tied_head_is_the_embedding(path):
    write_random(path, "qwen2", "Q6_K")
    model = load_model(str(path)).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == 2


def test_all_packed_weights_lie_in_one_piece_of_memory(path):
    write_random(path, "llama")
    packed = [weight for weight, _ in weights(load_model(str(path)).model).values()]
    assert len({weight.untyped_storage().data_ptr() for weight in packed}) == 1
    assert all(weight.data_ptr() % 64 == 0 for weight in packed)


def test_room_is_counted_by_the_types_of_the_file(path):
    asked = []
    for kind in ("Q4_0", "Q6_K", "F16"):
        write_random(path, "llama", kind)
        model = load_model(str(path), make_room=lambda n_bytes, _: asked.append(n_bytes)).model
        assert asked[-1] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert asked[0] < asked[1] == asked[2]


def llama_3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What llama.cpp's converter divides rotary frequencies by (`LlamaModel.generate_extra_tensors`)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < 8192 / 4, 1, np.where(wavelengths > 8192, factor, between)).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_frequencies_of_llama_3_are_stretched(path, factor):
    """Of which transformers' own reading says nothing: its config has those of Llama 3.0."""
    divisors = llama_3_divisors(64, 1e4, factor)
    assert len(set(divisors.tolist())) > 3
    write_random(path, "llama", more={"rope_freqs.weight": divisors})
    model = load_model(str(path)).model
    frequencies = 1e4 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(model.model.rotary_emb.inv_freq, frequencies / torch.from_numpy(divisors), rtol=1e-5)
    assert step_of(model) is not None


def test_frequencies_of_no_known_kind_are_refused(path):
    write_random(path, "llama", more={"rope_freqs.weight": np.full(32, 3, np.float32)})
    with pytest.raises(ModelDamaged, match="rotary frequencies"):
        load_model(str(path))


def test_smollm_files_of_any_type_load(path):
    """llama.cpp takes Q5_0 where columns do not fill K-blocks, so a Q4_K_M of SmolLM2-135M is mostly Q5_0."""
    model = write_gguf(path, matrices="Q5_0")
    packed = load_model(str(path)).model
    theirs = model.state_dict()
    for name, (weight, n_rows) in weights(packed).items():
        assert torch.equal(unpack_packed(weight, n_rows), theirs[f"{name}.weight"]), name


def test_a_tensor_that_does_not_fit_is_refused_by_its_name(path):
    write_random(path, "llama", config=LlamaConfig(**{**CONFIGS["llama"].to_dict(), "intermediate_size": 768}))
    file = GgufFile.open(path)
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    parameter = find_parameters(file, other)["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight is of shape \(768, 256\) where \(512, 256\) is wanted"):
        parameter.pack(torch.empty(parameter.packed_shape, dtype=torch.uint8))


def test_a_file_without_a_weight_is_not_made_up(path, monkeypatch):
    write_random(path, "llama")
    whole = GgufFile.open(path)
    some = {name: tensor for name, tensor in whole.tensors.items() if name != "blk.1.ffn_up.weight"}
    monkeypatch.setattr(loading.GgufFile, "open", lambda _: dataclasses.replace(whole, tensors=some))
    with pytest.raises(ModelDamaged, match="lacks 1 of its weights"):
        load_model(str(path))


def test_loading_tells_of_layers(path):
    steps = []
    write_random(path, "llama")
    load_model(str(path), progress=steps.append)
    assert list(map(str, steps)) == ["Loading the model", *(f"Loading the model · layer {i} of 2" for i in (1, 2))]


MIDDLING = {
    "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "Q4_0"), ("qwen2", "Q4_K"), ("llama", "Q5_K")])
def test_loading_takes_no_more_memory_than_three_times_the_file(path, architecture, kind):
    config = type(CONFIGS[architecture])(**MIDDLING, tie_word_embeddings=architecture == "qwen2")
    write_random(path, architecture, kind, config=config, kinds={"token_embd.weight": "Q6_K"})
    file_mb = path.stat().st_size / 1e6
    assert 60 <= file_mb <= 100
    assert mb_to_load(str(path)) <= 3 * file_mb
