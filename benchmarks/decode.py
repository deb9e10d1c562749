"""Decoding speed: 128 greedy tokens as a reader sees them, from the first to the last.

Brook's engine, the same without guesses (this greedy text comes to repeat itself, which is where they help: see
benchmarks.lookup), the stock recipe (`Thread(target=model.generate)` + `TextIteratorStreamer`, bf16) and llama.cpp
(same GGUF, same threads), each in a process of its own, take turns, so that a noisy minute hits all of them.
`--profile` shows where Brook's step goes.

    pip install -r requirements-bench.txt && python -m benchmarks.decode
"""

import argparse
import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterable

import torch
from transformers import TextIteratorStreamer

from benchmarks.isolated import BROOK_ENVIRONMENT, N_THREADS, Isolated
from benchmarks.peers import llama_cpp, stock_model
from benchmarks.report import in_turn, median_ratio, report
from benchmarks.step_profile import profile_step
from streaming import GenerationRequest, load_engine
from streaming.events import TokenEvent

N_TOKENS = 128
ROUNDS = 5
PROMPT = "The lighthouse keeper climbed the stairs every evening, carrying oil for the lamp."


def tokens_per_s(arrivals: Iterable[object]) -> float:
    """Count what arrives after the first and divide by the time it took."""
    times = [time.perf_counter() for _ in arrivals]
    assert len(times) == N_TOKENS, f"{len(times)} tokens instead of {N_TOKENS}: the text ended by itself"
    return (len(times) - 1) / (times[-1] - times[0])


class PerToken(TextIteratorStreamer):
    """The stock streamer, which shows text by words; here every token counts when it comes."""

    def put(self, value: torch.Tensor) -> None:
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        super().put(value)
        self.on_finalized_text("\0")


def brook(guesses: bool = True) -> Callable[[], float]:
    engine = load_engine()
    if not guesses:
        from streaming.models.llama_step import LlamaStep

        LlamaStep.guess_sizes = (0,)

    def run() -> float:
        request = GenerationRequest(prompt=PROMPT, max_new_tokens=N_TOKENS, temperature=0)
        events = engine.submit(request).events(timeout=120)
        return tokens_per_s(event for event in events if isinstance(event, TokenEvent))

    return run


def stock() -> Callable[[], float]:
    model, tokenizer = stock_model()
    torch.set_num_threads(N_THREADS)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def run() -> float:
        streamer = PerToken(tokenizer, skip_prompt=True, timeout=120)
        options = {"max_new_tokens": N_TOKENS, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
        thread.start()
        speed = tokens_per_s(piece for piece in streamer if piece == "\0")
        thread.join()
        return speed

    return run


def llama() -> Callable[[], float]:
    # generate() and not create_completion(), whose own Python work would halve llama.cpp's speed.
    model = llama_cpp()
    prompt_ids = model.tokenize(PROMPT.encode(), add_bos=False)

    def run() -> float:
        model.reset()
        ids = model.generate(prompt_ids, temp=0)
        return tokens_per_s(model.detokenize([token_id]) for token_id in itertools.islice(ids, N_TOKENS))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", action="store_true", help="only show where Brook's decoding step goes")
    arguments = parser.parse_args()
    if arguments.profile:
        torch.set_num_threads(N_THREADS)
        profile_step()
        return
    peers = {
        "Brook": Isolated(brook, **BROOK_ENVIRONMENT),
        "Brook, no guesses": Isolated(functools.partial(brook, False), **BROOK_ENVIRONMENT),
        "stock bf16": Isolated(stock),
        "llama.cpp": Isolated(llama),
    }
    for run in peers.values():
        run()  # warm up
    results = in_turn(peers, arguments.rounds)
    for peer in peers.values():
        peer.close()
    ours = results["Brook"]
    rows = [
        [name, statistics.median(speeds), min(speeds), max(speeds), median_ratio(ours, speeds)]
        for name, speeds in results.items()
    ]
    columns = ["", "tokens/s (median)", "least", "most", "Brook is × faster"]
    report("decode", columns, rows, n_tokens=N_TOKENS, n_threads=N_THREADS, rounds=results)


if __name__ == "__main__":
    main()
