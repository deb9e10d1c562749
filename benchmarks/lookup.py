"""Prompt lookup: tokens/s on texts that repeat and on ones that do not, with guesses and without.

Brook guesses by itself where it pays; its peer is generate() with `prompt_lookup_num_tokens=10`, bf16. Each is
measured against itself without guesses, in processes of their own, in turn.

    python -m benchmarks.lookup [--rounds 3]
"""

import argparse
import functools
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import PerToken
from benchmarks.isolated import BROOK_ENVIRONMENT, N_THREADS, Isolated
from benchmarks.peers import stock_model
from benchmarks.report import in_turn, median_ratio, report
from streaming import GenerationRequest, load_engine
from streaming.events import TokenEvent

N_TOKENS = 128
ROUNDS = 3
TEXTS = Path(__file__).parent / "texts"


@functools.cache
def tasks() -> dict[str, tuple[str, float]]:
    """What is asked, and at which temperature."""
    code, prose = ((TEXTS / f"{kind}.txt").read_text()[:1500] for kind in ("code", "prose"))
    return {
        "repeats: code": (f"Repeat this code exactly:\n```python\n{code}\n```", 0.0),
        "repeats: prose": (f"Copy the most important sentences of this text word by word:\n\n{prose}", 0.0),
        "does not repeat: sampled story": ("Write a story about a lighthouse keeper and his daughter.", 1.0),
    }


def brook(guesses: bool) -> Callable[[str], float]:
    engine = load_engine()
    if not guesses:
        from streaming.models.llama_step import LlamaStep

        LlamaStep.guess_sizes = (0,)

    def run(task: str) -> float:
        question, temperature = tasks()[task]
        request = GenerationRequest(
            messages=[{"role": "user", "content": question}], max_new_tokens=N_TOKENS, temperature=temperature, seed=1
        )
        events = engine.submit(request).events(timeout=120)
        return tokens_per_s([time.perf_counter() for event in events if isinstance(event, TokenEvent)])

    return run


def stock(guesses: bool) -> Callable[[str], float]:
    model, tokenizer = stock_model()
    torch.set_num_threads(N_THREADS)

    def run(task: str) -> float:
        question, temperature = tasks()[task]
        messages = [{"role": "user", "content": question}]
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 10} if guesses else {}
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        options |= tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        torch.manual_seed(1)
        streamer = Arrivals(tokenizer, skip_prompt=True, timeout=120)
        options |= {"max_new_tokens": N_TOKENS, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        times = [time.perf_counter() for piece in streamer for _ in range(piece.count("\0"))]
        thread.join()
        return tokens_per_s(times)

    return run


class Arrivals(PerToken):
    """The stock streamer, in which every token counts; assisted decoding brings several at once, `(1, n)`."""

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.dim() == 1:
            super().put(value)
            return
        for token_id in value[0]:
            super().put(token_id[None])


def tokens_per_s(times: list[float]) -> float:
    """Count what arrives after the first and divide by the time it took."""
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    peers = {
        "without": Isolated(functools.partial(brook, False), **BROOK_ENVIRONMENT),
        "with": Isolated(functools.partial(brook, True), **BROOK_ENVIRONMENT),
        "stock without": Isolated(functools.partial(stock, False)),
        "stock with": Isolated(functools.partial(stock, True)),
    }
    rows, all_results = [], {}
    for task in tasks():
        runs = {name: functools.partial(peer, task) for name, peer in peers.items()}
        for name in ("without", "with"):
            runs[name]()  # warm up
        results = all_results[task] = in_turn(runs, rounds)
        medians = [statistics.median(speeds) for speeds in results.values()]
        gain = median_ratio(results["with"], results["without"])
        stock_gain = median_ratio(results["stock with"], results["stock without"])
        rows.append([task, *medians[:2], gain, *medians[2:], stock_gain])
    for peer in peers.values():
        peer.close()
    columns = ["text", "Brook without", "Brook with", "gain ×", "stock without", "stock with", "stock's gain ×"]
    report("lookup", columns, rows, n_tokens=N_TOKENS, n_threads=N_THREADS, rounds=all_results)


if __name__ == "__main__":
    main()
