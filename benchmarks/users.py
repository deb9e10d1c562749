"""Many people at once: what they get together, how long they wait to begin, and the longest pause of any.

1 to 16 people ask at the same moment, each for 64 greedy tokens with a prompt of their own. Brook's batched engine, a
thread of bare `generate()` for each (bf16; for 1 and 8 people alone, because it takes long), and
`transformers serve --continuous-batching` (bf16, over HTTP, which is the only way to it), each in a process of its
own, take turns.

    pip install -r requirements-bench.txt && python -m benchmarks.users

With `--engines`, Brook's own two engines take turns instead, with the default model and with one that has no compiled
step: a small GPT-NeoX of random weights.
"""

import argparse
import http.client
import itertools
import json
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.decode import PerToken
from benchmarks.isolated import BROOK_ENVIRONMENT, N_THREADS, Isolated
from benchmarks.report import in_turn, median_ratio, report
from streaming import GenerationRequest
from streaming.engine.load import load_engine
from streaming.events import TokenEvent
from streaming.models.loading import load_model, load_tokenizer

PEOPLE = (1, 2, 4, 8, 16)
MOST_THREADS = 8
N_TOKENS = 64
ROUNDS = 3
ENGINES = ("local", "batched")
ALONE_AND_MANY = (1, 8)
COLUMNS = ("tokens/s, all together", "mean first token, s", "worst first token, s", "longest pause, s")
TIMEOUT_S = 300
TOPICS = ("a lighthouse", "the sea", "a train", "winter", "a market", "two brothers", "a garden", "the moon")

# What one person's stream gives: a thing for each token, or for each piece of several, when it comes.
Stream = Callable[[list[dict[str, str]]], Iterable[Any]]


def messages_of(number: int) -> list[dict[str, str]]:
    """What a person asks; a story goes on for longer than it is measured."""
    return [{"role": "user", "content": f"Person {number} asks for a long story about {TOPICS[number % len(TOPICS)]}."}]


class Served(NamedTuple):
    """What people who ask at once get: all together, then each, in seconds."""

    tokens_per_s: float
    mean_first_s: float
    worst_first_s: float
    longest_pause_s: float


def crowd(stream: Stream, n_people: int) -> Served:
    """Let people ask at once."""
    arrivals: list[list[float]] = [[] for _ in range(n_people)]
    together = threading.Barrier(n_people + 1)

    def ask(number: int) -> None:
        together.wait(TIMEOUT_S)
        for _ in stream(messages_of(number)):
            arrivals[number].append(time.perf_counter())

    people = [threading.Thread(target=ask, args=(number,)) for number in range(n_people)]
    for person in people:
        person.start()
    together.wait(TIMEOUT_S)
    began = time.perf_counter()
    for person in people:
        person.join(TIMEOUT_S)
    least = min(len(times) for times in arrivals)
    assert least > N_TOKENS // 2, f"someone got only {least} pieces of {N_TOKENS} tokens"
    took_s = max(times[-1] for times in arrivals) - began
    pauses = [later - one for times in arrivals for one, later in itertools.pairwise(times)]
    firsts = [times[0] - began for times in arrivals]
    return Served(n_people * N_TOKENS / took_s, statistics.mean(firsts), max(firsts), max(pauses))


def brook(device: str, engine_name: str = "batched", model: str | None = None) -> Callable[[int], Served]:
    engine = load_engine(model, engine=engine_name, device=device)
    torch.set_num_threads(N_THREADS)

    def stream(messages: list[dict[str, str]]) -> Iterable[Any]:
        # Everyone comes for the first time: nothing that an earlier round read is reused.
        request = GenerationRequest(
            messages=messages, max_new_tokens=N_TOKENS, temperature=0, owner=secrets.token_hex(8)
        )
        for event in engine.submit(request).events(timeout=TIMEOUT_S):
            if isinstance(event, TokenEvent):
                yield event

    return partial(crowd, stream)


def threads(device: str) -> Callable[[int], Served]:
    loaded = load_model(quantize="none", dtype="bfloat16", device=device)
    model, tokenizer = loaded.model, loaded.tokenizer
    torch.set_num_threads(N_THREADS)

    def stream(messages: list[dict[str, str]]) -> Iterable[Any]:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(device)
        streamer = PerToken(tokenizer, skip_prompt=True, timeout=TIMEOUT_S)
        options = {"max_new_tokens": N_TOKENS, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
        thread.start()
        yield from (piece for piece in streamer if piece == "\0")
        thread.join()

    return partial(crowd, stream)


class Serve:
    """`transformers serve --continuous-batching` with the same model in a folder, on a free port."""

    def __init__(self, folder: Path, device: str) -> None:
        loaded = load_model(quantize="none", dtype="bfloat16", device="cpu")
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._model = str(folder)
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", self._model]
        options = ["--continuous-batching", "--device", device, "--port", str(self._port), "--host", "127.0.0.1"]
        self._process = subprocess.Popen([*command, *options, "--log-level", "error"])
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self._port), timeout=1):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def __call__(self, n_people: int) -> Served:
        return crowd(self._stream, n_people)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)

    def _stream(self, messages: list[dict[str, str]]) -> Iterable[Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        body = {"model": self._model, "messages": messages, "max_tokens": N_TOKENS, "stream": True, "temperature": 0}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    yield choices[0]["delta"]["content"]
        connection.close()


def save_without_step(folder: Path) -> None:
    """Save a model of random weights that no compiled step fits, about as large as the default one's layers."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 9}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, **shape)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare_engines(device: str, people: Iterable[int], rounds: int) -> None:
    """Let the local and the batched engine take turns, for one person alone and for many."""
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_without_step(Path(folder))
        for kind, model in (("default model", None), ("no compiled step", folder)):
            engines = {name: Isolated(partial(brook, device, name, model), **BROOK_ENVIRONMENT) for name in ENGINES}
            for run in engines.values():
                run(2)  # warm up
            for n_people in people:
                served = in_turn({name: partial(run, n_people) for name, run in engines.items()}, rounds)
                results[f"{kind}, {n_people}"] = served
                speeds = {name: [one.tokens_per_s for one in served[name]] for name in ENGINES}
                for name in ENGINES:
                    ratio = median_ratio(speeds[name], speeds["local"])
                    rows.append([kind, n_people, name, *map(statistics.median, zip(*served[name], strict=True)), ratio])
            for run in engines.values():
                run.close()
    columns = ["model", "people", "engine", *COLUMNS, "tokens/s by local's"]
    report(
        "engines" if device == "cpu" else f"engines_{device}",
        columns,
        rows,
        n_tokens=N_TOKENS,
        n_threads=N_THREADS,
        rounds=results,
    )


def compare_peers(device: str, people: Iterable[int], rounds: int) -> None:
    """Let Brook and its peers take turns."""
    with tempfile.TemporaryDirectory() as folder:
        peers: dict[str, Any] = {
            "Brook": Isolated(partial(brook, device), **BROOK_ENVIRONMENT),
            "threads of generate()": Isolated(partial(threads, device)),
            "transformers serve": Serve(Path(folder), device),
        }
        for run in peers.values():
            run(2)  # warm up
        results: dict[str, dict[int, list[Served]]] = {name: {} for name in peers}
        for _ in range(rounds):
            for n_people in people:
                for name, run in peers.items():
                    if name != "threads of generate()" or n_people in (1, MOST_THREADS):
                        results[name].setdefault(n_people, []).append(run(n_people))
        for run in peers.values():
            run.close()
    rows = [
        [n_people, name, *map(statistics.median, zip(*results[name][n_people], strict=True))]
        for n_people in people
        for name in peers
        if n_people in results[name]
    ]
    name = "users" if device == "cpu" else f"users_{device}"
    report(name, ["people", "", *COLUMNS], rows, n_tokens=N_TOKENS, n_threads=N_THREADS, rounds=results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--people", type=int, nargs="+")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--engines", action="store_true", help="compare Brook's engines with each other")
    arguments = parser.parse_args()
    if arguments.engines:
        compare_engines(arguments.device, arguments.people or ALONE_AND_MANY, arguments.rounds)
    else:
        compare_peers(arguments.device, arguments.people or PEOPLE, arguments.rounds)


if __name__ == "__main__":
    main()
