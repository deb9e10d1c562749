"""Loading: from folders, files and a stand-in hub; and one sentence, in time, for whatever is wrong."""

import copy
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from streaming.errors import (
    DefaultModelUnavailable,
    DeviceUnavailable,
    HubUnreachable,
    ModelDamaged,
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    ModelUnavailable,
    NotACausalLM,
)
from streaming.models.device import choose_device, choose_dtype, free_bytes
from streaming.models.int4 import PackedLinear
from streaming.models.loading import LoadProgress, load_model, load_tokenizer
from streaming.models.progress import telling_layers
from streaming.models.sources import find_model
from tests.packed import COMMON, WITH_STEP, random_model
from tests.standin_hub import point_hub_at, refusing_url, serving, silent_url
from tests.tiny import N_CONTEXT, byte_tokenizer, tiny_llama

IDS = torch.tensor([[1, 2, 3, 200, 255]])
LONGEST_WAIT_S = 2.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def point_at(monkeypatch, tmp_path):
    """Make an address the hub, with a cache of the test's own."""
    return lambda url: point_hub_at(monkeypatch, url, tmp_path / "hub-cache")


@pytest.fixture
def hub(point_at, folder):
    with serving() as hub:
        hub.models["ann/tiny"] = folder
        point_at(hub.url)
        yield hub


def refusal(kind: type[ModelUnavailable], model: str, **options) -> str:
    """Load a model that cannot be had; return the sentence, once it is seen to be one and to come in time."""
    started = time.monotonic()
    with pytest.raises(ModelUnavailable) as refused:
        load_model(model, dtype="float32", **options)
    took_s = time.monotonic() - started
    message = str(refused.value)
    assert type(refused.value) is kind, message
    assert "\n" not in message
    assert message.endswith(".")
    assert took_s < LONGEST_WAIT_S
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Folders


def test_a_folder_loads_ready_to_generate(folder):
    steps: list[LoadProgress] = []
    loaded = load_model(str(folder), device="cpu", dtype="float32", progress=steps.append)
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert (loaded.model_id, loaded.n_context) == (str(folder), N_CONTEXT)
    assert loaded.tokenizer.encode("aé") == byte_tokenizer().encode("aé")
    assert steps[-1] == LoadProgress("weights", 2, 2)


def test_the_dtype_is_the_one_asked_for(folder):
    for name in ("float32", "bfloat16", "float16"):
        assert load_model(str(folder), device="cpu", dtype=name).model.dtype == getattr(torch, name)
    unpacked = load_model(str(folder), device="cpu", quantize="none")
    assert unpacked.model.dtype == choose_dtype("auto", torch.device("cpu"))


def test_weights_are_packed_on_a_cpu_unless_told_otherwise(folder):
    packed = load_model(str(folder), device="cpu").model
    assert isinstance(packed.lm_head, PackedLinear)
    assert packed.dtype == torch.float32
    assert isinstance(load_model(str(folder), quantize="int4").model.lm_head, PackedLinear)


def test_a_tokenizer_loads_without_the_weights(folder):
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(str(folder)).encode("aé") == byte_tokenizer().encode("aé")


def test_a_path_from_home_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/tiny").n_context == N_CONTEXT


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "~/nothing", "nothing.gguf", "a/b/c"])
def test_a_path_with_nothing_there_says_so(path):
    assert path in refusal(ModelNotFound, path)


def test_a_file_that_is_no_model_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refusal(ModelNotFound, str(tmp_path / "notes.txt"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but only by name")
    refusal(ModelDamaged, str(tmp_path / "broken.gguf"))


def test_a_folder_without_a_config_says_so(tmp_path):
    assert "config.json" in refusal(ModelDamaged, str(tmp_path))


def test_a_folder_without_a_tokenizer_says_so(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refusal(ModelDamaged, str(folder))


def test_weights_cut_short_are_not_loaded(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refusal(ModelDamaged, str(folder))


def test_weights_with_a_part_missing_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights" in refusal(ModelDamaged, str(folder))


@pytest.mark.parametrize(
    "other",
    [
        lambda: BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=1)),
    ],
    ids=["bert", "t5"],
)
def test_a_model_that_does_not_continue_text_says_so(folder, other):
    other().save_pretrained(folder)
    assert "does not continue text" in refusal(NotACausalLM, str(folder))


@pytest.fixture
def with_code(folder, tmp_path):
    """A folder whose model is of a class of its own, in a file that comes with it; and what that leaves when it ran."""
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(ran)!r}, 'w')\n"
        "class OwnConfig(LlamaConfig): model_type = 'own'\n"
        "class Own(LlamaForCausalLM): config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    return folder, ran


def test_code_that_comes_with_a_model_is_not_run(with_code):
    folder, ran = with_code
    assert "--trust-remote-code" in refusal(NotACausalLM, str(folder))
    assert not ran.exists()


def test_code_that_comes_with_a_model_is_run_where_its_owner_says_so(with_code, hub):
    folder, ran = with_code
    for name in (str(folder), "ann/tiny"):
        ran.unlink(missing_ok=True)
        loaded = load_model(name, dtype="float32", trust_remote_code=True)
        assert type(loaded.model).__name__ == "Own"
        assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)


def test_a_layer_counts_once_all_of_it_was_read():
    names = ["head.weight", "m.layers.0.norm", "m.layers.1.norm", "m.layers.1.experts.7.up", "m.layers.0.experts.3.up"]
    steps: list[LoadProgress] = []
    seen = [
        (weight, [step.done for step in steps])
        for _, weight in telling_layers(zip(names, "abcde", strict=True), names, steps.append)
    ]
    assert seen == [("a", []), ("b", []), ("c", []), ("d", []), ("e", [1])]
    assert steps == [LoadProgress("weights", 1, 2), LoadProgress("weights", 2, 2)]
    assert list(telling_layers([("head.weight", "a")], ["head.weight"], steps.append)) == [("head.weight", "a")]


def test_loading_tells_how_far_it_is(folder):
    steps: list[LoadProgress] = []
    for options in ({"dtype": "float32"}, {"quantize": "int4"}):
        steps.clear()
        load_model(str(folder), device="cpu", progress=steps.append, **options)
        assert steps == [LoadProgress("weights"), LoadProgress("weights", 1, 2), LoadProgress("weights", 2, 2)]
    assert str(LoadProgress("weights", 12, 30)) == "Loading the model · layer 12 of 30"
    assert str(LoadProgress("download", 39_100_000, 93_000_000)) == "Fetching the model · 39 of 93 MB"


def test_room_is_made_once_it_is_known_how_much_is_needed_and_before_any_is_taken(folder):
    asked = []

    def make_room(n_bytes: int, n_free: int) -> None:
        asked.append(n_bytes)
        assert n_free > 0
        raise ModelTooLarge("There is no room.")

    (folder / "model.safetensors").unlink()
    for dtype, n_bytes in (("float32", 4), ("bfloat16", 2)):
        with pytest.raises(ModelTooLarge, match="no room"):
            load_model(str(folder), device="cpu", dtype=dtype, make_room=make_room)
        assert asked.pop() == n_bytes * sum(p.numel() for p in tiny_llama().parameters())


MIXTURE = Qwen3MoeConfig(
    **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, decoder_sparse_step=1
)


@pytest.mark.parametrize("quantize", ["auto", "none"])
@pytest.mark.parametrize("config", [WITH_STEP["llama"], WITH_STEP["llama tied"], MIXTURE], ids=lambda c: c.model_type)
def test_the_room_asked_for_is_what_the_weights_take(folder, config, quantize):
    random_model(config).save_pretrained(folder)
    asked = []
    loaded = load_model(str(folder), quantize=quantize, make_room=lambda n_bytes, _: asked.append(n_bytes))
    assert asked == [sum(p.numel() * p.element_size() for p in loaded.model.parameters())]


def test_a_model_with_nothing_to_pack_loads_as_it_is_unless_packing_was_asked_for(folder):
    config = copy.deepcopy(WITH_STEP["llama"])
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim = 72, 72, 1, 72
    random_model(config).save_pretrained(folder)
    loaded = load_model(str(folder), device="cpu").model
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert loaded.dtype == choose_dtype("auto", torch.device("cpu"))
    with pytest.raises(ModelUnavailable, match="no linear layers that can be quantized; use quantize none"):
        load_model(str(folder), quantize="int4")


def test_packing_leaves_the_default_dtype_of_everyone_else_alone(folder, monkeypatch):
    edit_config(folder, dtype="bfloat16")
    dtypes = set()
    set_dtype = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (dtypes.add(dtype), set_dtype(dtype)))
    load_model(str(folder), device="cpu", quantize="int4")
    assert dtypes <= {torch.float32}


def test_models_that_load_at_once_get_each_its_own_dtype(folder, monkeypatch):
    set_dtype = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (set_dtype(dtype), time.sleep(0.02)))
    names = ["bfloat16", "float32"] * 6
    with ThreadPoolExecutor(4) as pool:
        models = pool.map(lambda name: load_model(str(folder), device="cpu", dtype=name).model, names)
        dtypes = [{parameter.dtype for parameter in model.parameters()} for model in models]
    assert dtypes == [{getattr(torch, name)} for name in names]
    assert torch.get_default_dtype() == torch.float32


def test_a_model_too_large_is_refused_before_its_weights_are_touched(folder):
    edit_config(folder, num_hidden_layers=40, hidden_size=65536, intermediate_size=262144)
    (folder / "model.safetensors").unlink()
    message = refusal(ModelTooLarge, str(folder))
    assert "GB" in message
    assert "cpu" in message


def test_a_wrong_name_is_told_without_torch_in_two_seconds():
    code = (
        "import sys, time; started = time.monotonic()\n"
        "from streaming.errors import ModelUnavailable\n"
        "from streaming.models.sources import find_model\n"
        "for name in ('./nothing', 'ann/unknown'):\n"
        "    try: find_model(name, offline=True).check()\n"
        "    except ModelUnavailable as error: print(type(error).__name__)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert time.monotonic() - started < 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ModelNotFound", "HubUnreachable"]


def test_a_check_fetches_nothing_and_raises_what_loading_would(hub, folder, point_at):
    for good in (str(folder), "ann/tiny"):
        find_model(good).check()
    assert not [path for path in hub.requests if "/resolve/" in path]
    with pytest.raises(ModelNotFound):
        find_model("ann/other").check()
    load_model("ann/tiny")
    with refusing_url() as url:
        point_at(url)
        find_model("ann/tiny").check()
        with pytest.raises(HubUnreachable):
            find_model("ann/other").check()


def test_offline_the_default_model_is_checked_before_it_is_loaded(tmp_path):
    with pytest.raises(DefaultModelUnavailable, match="--offline"):
        find_model(None, offline=True, cache_dir=tmp_path).check()


# Devices and dtypes


def test_a_device_that_is_not_here_says_so(folder):
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    assert missing in refusal(DeviceUnavailable, str(folder), device=missing)


def test_auto_is_a_device_that_is_here():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else choose_device("auto").type)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
    ],
)
def test_a_cpu_takes_bfloat16_only_where_it_has_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", torch.device("cpu")) == expected


def test_what_an_unloaded_model_leaves_in_torchs_hands_is_free(monkeypatch):
    held = {"mem_get_info": (10, 100), "memory_reserved": 70, "memory_allocated": 20}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda:1")) == 60
    held = {"recommended_max_memory": 100, "driver_allocated_memory": 90, "current_allocated_memory": 40}
    for name, value in held.items():
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    assert free_bytes(torch.device("mps")) == 60


# The hub


def test_a_model_comes_from_the_hub_and_then_from_its_cache(hub, folder):
    steps: list[LoadProgress] = []
    loaded = load_model("ann/tiny", dtype="float32", progress=steps.append)
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    assert (loaded.model_id, loaded.n_context) == ("ann/tiny", N_CONTEXT)
    downloads = [step for step in steps if step.stage == "download"]
    assert downloads[-1].done == downloads[-1].total >= (folder / "model.safetensors").stat().st_size

    hub.requests.clear()
    load_model("ann/tiny", dtype="float32")
    assert not [path for path in hub.requests if "/resolve/" in path]
    hub.requests.clear()
    load_model("ann/tiny", dtype="float32", offline=True)
    assert hub.requests == []


def test_safetensors_are_preferred_and_only_what_is_needed_is_fetched(hub, folder):
    for name in ("pytorch_model.bin", "model.onnx", "consolidated.safetensors", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"not wanted")
    load_model("ann/tiny")
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_a_tokenizer_comes_from_the_hub_without_the_weights(hub):
    assert load_tokenizer("ann/tiny").encode("aé") == byte_tokenizer().encode("aé")
    assert not [path for path in hub.requests if path.endswith("model.safetensors")]


def test_pickled_weights_still_load(hub, folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_model("ann/tiny", dtype="float32").model(IDS).logits, tiny_llama()(IDS).logits)


def test_a_model_the_hub_does_not_know_says_so(hub):
    assert "ann/other" in refusal(ModelNotFound, "ann/other")
    refusal(ModelNotFound, "not a name")


def test_a_gated_model_says_what_to_do(hub):
    hub.gated.add("ann/tiny")
    assert "hf auth login" in refusal(ModelGated, "ann/tiny")


def test_a_repository_without_weights_says_so(hub, folder):
    (folder / "model.safetensors").unlink()
    refusal(ModelDamaged, "ann/tiny")


def test_a_model_too_large_is_refused_before_it_is_fetched(hub, folder):
    edit_config(folder, num_hidden_layers=40, hidden_size=65536, intermediate_size=262144)
    refusal(ModelTooLarge, "ann/tiny")
    assert not [path for path in hub.requests if path.endswith("model.safetensors")]


def test_a_hub_in_trouble_says_so(hub):
    hub.status = 503
    assert "503" in refusal(HubUnreachable, "ann/tiny")


@pytest.mark.parametrize("dead", [refusing_url, silent_url])
def test_a_dead_hub_costs_two_seconds_and_a_cached_model_still_loads(point_at, folder, dead):
    with serving() as hub:
        hub.models["ann/tiny"] = folder
        point_at(hub.url)
        load_model("ann/tiny", dtype="float32")
    with dead() as url:
        point_at(url)
        assert "cannot be reached" in refusal(HubUnreachable, "ann/other")
        loaded = load_model("ann/tiny", dtype="float32")
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)


def test_a_half_cached_model_is_not_taken_for_a_whole_one(hub, point_at):
    load_tokenizer("ann/tiny")
    assert "offline" in refusal(HubUnreachable, "ann/tiny", offline=True)


def test_offline_touches_no_network(hub, folder, monkeypatch, tmp_path):
    load_model("ann/tiny")
    touched: list[str] = []

    def forbid(name):
        def touch(*arguments, **_):
            touched.append(f"{name}{arguments!r}")
            raise OSError("the network is forbidden here")

        return touch

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbid(name))
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, forbid(name))
    load_model(str(folder), offline=True)
    load_model("ann/tiny", offline=True)
    refusal(HubUnreachable, "ann/other", offline=True)
    with pytest.raises(ModelUnavailable):
        load_model(None, offline=True, cache_dir=tmp_path)
    assert touched == []


def test_hf_hub_offline_counts_as_offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refusal(HubUnreachable, "ann/tiny")
    assert hub.requests == []


def test_transformers_alone_would_have_loaded_the_same(folder):
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(load_model(str(folder), dtype="float32").model(IDS).logits, alone(IDS).logits)
