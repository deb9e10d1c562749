"""The remote engine over servers that no one here wrote: `transformers serve` and llama-cpp-python's.

    pip install -r requirements-bench.txt && pytest -m peers

BROOK_PEERS_PYTHON names the Python that has those requirements, where it is another than the one that runs the tests.
"""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.peers import gguf_path
from streaming.engine.base import GenerationRequest
from streaming.engine.remote import RemoteEngine
from streaming.events import NO_ID, TokenEvent
from streaming.server.address import require_free
from tests.serving import wait_for

pytestmark = pytest.mark.peers

WAIT_S = 120
PYTHON = os.environ.get("BROOK_PEERS_PYTHON", sys.executable)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a very long story about a lighthouse."}]


def free_port() -> int:
    return next(port for port in range(8600, 8700) if _is_free(port))


def _is_free(port: int) -> bool:
    try:
        require_free("127.0.0.1", port)
    except Exception:
        return False
    return True


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server until it answers, and to the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen([PYTHON, *command], stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + WAIT_S
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(WAIT_S)


@pytest.fixture(scope="module")
def transformers_serve(default_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "smollm2"
    default_model.model.save_pretrained(folder)
    default_model.tokenizer.save_pretrained(folder)
    port = free_port()
    # `transformers serve` as a module: the script lies in another folder for each installation.
    command = ["-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with running([*command, *options], port, folder.parent / "log"):
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    port = free_port()
    command = [str(Path(__file__).parent / "llama_server.py"), "--model", str(gguf_path()), "--model_alias", "smollm2"]
    # Left to itself it breaks a reply off when the next request comes.
    options = ["--host", "127.0.0.1", "--port", str(port), "--n_threads", "2", "--interrupt_requests", "false"]
    with running([*command, *options], port, tmp_path_factory.mktemp("llama") / "log"):
        yield f"http://127.0.0.1:{port}/v1", None


@pytest.fixture(scope="module", params=["transformers_serve", "llama_cpp"])
def engine(request):
    url, model = request.getfixturevalue(request.param)
    engine = RemoteEngine(url, model)
    assert engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


def ask(engine, messages=QUESTION, **options):
    return engine.submit(GenerationRequest(messages=messages, **{"temperature": 0, **options}))


def test_a_plain_prompt_goes_on_as_it_does_here(engine):
    run = engine.submit(GenerationRequest(prompt="An increasing sequence: one,", max_new_tokens=14, temperature=0))
    result = run.result(WAIT_S)
    assert result.text.startswith(" two, three, four")  # what comes then differs with llama.cpp's kernels
    assert (result.finish.reason, result.finish.n_generated_tokens) == ("length", 14)


def test_a_chat_streams_token_by_token(engine):
    *tokens, finish = list(ask(engine, max_new_tokens=24).events(timeout=WAIT_S))
    assert len(tokens) > 5
    assert all(isinstance(event, TokenEvent) and event.id == NO_ID for event in tokens)
    assert [event.index for event in tokens] == list(range(len(tokens)))
    times = [event.t_s for event in tokens]
    assert times == sorted(times)
    assert finish.error is None
    assert finish.reason in ("stop", "length")
    assert finish.timings.tokens_per_s > 1


def test_the_same_seed_draws_the_same_text(engine):
    def drawn(seed):
        return ask(engine, STORY, max_new_tokens=16, temperature=1.0, seed=seed).result(WAIT_S).text

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_text_ends_before_a_stop_string(engine):
    run = engine.submit(
        GenerationRequest(prompt="An increasing sequence: one,", max_new_tokens=30, temperature=0, stop=["four"])
    )
    result = run.result(WAIT_S)
    assert (result.text, result.finish.reason) == (" two, three, ", "stop")


def test_stop_is_told_to_the_server(engine):
    run = ask(engine, STORY, max_new_tokens=1500)
    wait_for(lambda: len(run.log) > 3)
    run.cancel()
    result = run.result(WAIT_S)
    assert result.finish.reason == "cancelled"
    assert 3 < result.finish.n_generated_tokens < 200
    # A server that went on would be busy for half a minute, and both answer one request after another.
    began = time.monotonic()
    assert ask(engine, max_new_tokens=2).result(WAIT_S).finish.error is None
    assert time.monotonic() - began < 10


def test_two_at_once_do_not_mix(engine):
    prompts = ("An increasing sequence: one,", "The days of the week: Monday, Tuesday,")
    runs = [engine.submit(GenerationRequest(prompt=p, max_new_tokens=6, temperature=0)) for p in prompts]
    numbers, days = (run.result(WAIT_S).text for run in runs)
    assert numbers.startswith(" two, three, four")
    assert days.startswith(" Wednesday, Thursday")


class TestTransformersServe:
    @pytest.fixture
    def engine(self, transformers_serve):
        engine = RemoteEngine(*transformers_serve)
        yield engine
        engine.close()

    def test_greedy_text_is_that_of_the_same_weights_here(self, engine, default_model):
        tokenizer = default_model.tokenizer
        ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = default_model.model.generate(**ids, max_new_tokens=24, do_sample=False)
        alone = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        result = ask(engine, max_new_tokens=24).result(WAIT_S)
        assert result.text == alone
        assert result.finish.n_prompt_tokens == ids["input_ids"].shape[1]

    def test_what_it_does_not_know_is_told_in_its_words(self, engine):
        finish = ask(engine, top_k=5, max_new_tokens=4).result(WAIT_S).finish
        assert finish.reason == "error"
        assert "refused the request: Unexpected fields in the request: {'top_k'}" in finish.error
        finish = ask(engine, prefix_text="The capital", max_new_tokens=4).result(WAIT_S).finish
        assert "continue_final_message" in finish.error


class TestLlamaCpp:
    @pytest.fixture
    def engine(self, llama_cpp):
        engine = RemoteEngine(*llama_cpp)
        yield engine
        engine.close()

    def test_its_one_model_is_found(self, engine):
        assert engine.wait_ready(WAIT_S)
        assert engine.model_id == "smollm2"

    def test_logprobs_come_with_each_token(self, engine):
        *tokens, _ = ask(engine, max_new_tokens=6, logprobs=3).events(timeout=WAIT_S)
        with_logprobs = [event for event in tokens if event.logprob is not None]
        assert len(with_logprobs) == 6
        assert all(event.logprob <= 0 and len(event.top) == 3 for event in with_logprobs)
        assert all(event.text in {top.text for top in event.top} for event in with_logprobs)
