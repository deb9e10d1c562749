"""Many people at once: what they get together, how long the last one waits to begin, and the longest pause of any.

1 to 16 people ask at the same moment, each for 64 greedy tokens with a prompt of their own. Brook's batched engine, a
thread of bare `generate()` for each (bf16; for 1 and 8 people alone, because it takes long), and
`transformers serve --continuous-batching` (bf16, over HTTP, which is the only way to it), each in a process of its
own, take turns.

    pip install -r requirements-bench.txt && python -m benchmarks.users
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
from typing import Any

import torch

from benchmarks.decode import PerToken
from benchmarks.isolated import BROOK_SPINS, Isolated
from benchmarks.peers import N_THREADS
from benchmarks.report import report
from streaming import GenerationRequest
from streaming.engine.load import load_engine
from streaming.events import TokenEvent
from streaming.models.loading import load_model

PEOPLE = (1, 2, 4, 8, 16)
MOST_THREADS = 8
N_TOKENS = 64
ROUNDS = 3
TIMEOUT_S = 300
TOPICS = ("a lighthouse", "the sea", "a train", "winter", "a market", "two brothers", "a garden", "the moon")

# What one person's stream gives: a thing for each token, or for each piece of several, when it comes.
Stream = Callable[[list[dict[str, str]]], Iterable[Any]]


def messages_of(number: int) -> list[dict[str, str]]:
    """What a person asks; a story goes on for longer than it is measured."""
    return [{"role": "user", "content": f"Person {number} asks for a long story about {TOPICS[number % len(TOPICS)]}."}]


def crowd(stream: Stream, n_people: int) -> tuple[float, float, float]:
    """Let people ask at once; return tokens/s of all, the worst first token and the longest pause, in seconds."""
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
    return n_people * N_TOKENS / took_s, max(times[0] for times in arrivals) - began, max(pauses)


def brook(device: str) -> Callable[[int], tuple[float, float, float]]:
    engine = load_engine(engine="batched", device=device)
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


def threads(device: str) -> Callable[[int], tuple[float, float, float]]:
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

    def __call__(self, n_people: int) -> tuple[float, float, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--people", type=int, nargs="+", default=PEOPLE)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    device = arguments.device
    with tempfile.TemporaryDirectory() as folder:
        peers: dict[str, Any] = {
            "Brook": Isolated(partial(brook, device), GOMP_SPINCOUNT=BROOK_SPINS),
            "threads of generate()": Isolated(partial(threads, device)),
            "transformers serve": Serve(Path(folder), device),
        }
        for run in peers.values():
            run(2)  # warm up
        results: dict[str, dict[int, list[tuple[float, float, float]]]] = {name: {} for name in peers}
        for _ in range(arguments.rounds):
            for n_people in arguments.people:
                for name, run in peers.items():
                    if name != "threads of generate()" or n_people in (1, MOST_THREADS):
                        results[name].setdefault(n_people, []).append(run(n_people))
        for run in peers.values():
            run.close()
    rows = []
    for n_people in arguments.people:
        for name in peers:
            if n_people in results[name]:
                speeds, firsts, pauses = zip(*results[name][n_people], strict=True)
                rows.append([n_people, name, statistics.median(speeds), max(firsts), max(pauses)])
    columns = ["people", "", "tokens/s, all together", "worst first token, s", "longest pause, s"]
    name = "users" if device == "cpu" else f"users_{device}"
    report(name, columns, rows, n_tokens=N_TOKENS, n_threads=N_THREADS, rounds=results)


if __name__ == "__main__":
    main()
