"""Reading speed: a prompt of 1,024 tokens up to the logits of the first new token, nothing reused.

Brook's model in chunks of 256 tokens, as its engine reads; the stock model (bf16) at once, as stock `generate()`
does; and llama.cpp (same GGUF, same threads). Each has a process of its own, and they take turns.

    pip install -r requirements-bench.txt && python -m benchmarks.prefill
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.isolated import BROOK_ENVIRONMENT, N_THREADS, Isolated
from benchmarks.peers import llama_cpp, stock_model
from benchmarks.report import in_turn, median_ratio, report
from streaming.engine.decode_loop import decode_loop
from streaming.engine.generate import PREFILL_CHUNK_TOKENS
from streaming.models.loading import load_model

N_TOKENS = 1024
ROUNDS = 5


def prompt_ids() -> torch.Tensor:
    return torch.randint(100, 49000, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))


def timed(read: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        read()
        return N_TOKENS / (time.perf_counter() - started)

    return run


def generating_one(model: Any, ids: torch.Tensor, **options: Any) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **options)


def brook() -> Callable[[], float]:
    model, ids = load_model().model, prompt_ids()

    def read() -> None:
        cache = DynamicCache(config=model.config)
        chunks = {"prefill_chunk_size": PREFILL_CHUNK_TOKENS, "past_key_values": cache}
        generating_one(model, ids, custom_generate=decode_loop, **chunks)

    return timed(read)


def stock() -> Callable[[], float]:
    (model, _), ids = stock_model(), prompt_ids()
    torch.set_num_threads(N_THREADS)
    return timed(lambda: generating_one(model, ids))


def llama() -> Callable[[], float]:
    model, ids = llama_cpp(), prompt_ids()[0].tolist()

    def read() -> None:
        model.reset()
        model.eval(ids)

    return timed(read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    peers = {
        "Brook": Isolated(brook, **BROOK_ENVIRONMENT),
        "stock bf16": Isolated(stock),
        "llama.cpp": Isolated(llama),
    }
    for run in peers.values():
        run()  # warm up
    results = in_turn(peers, arguments.rounds)
    for peer in peers.values():
        peer.close()
    rows = [
        [name, statistics.median(speeds), min(speeds), max(speeds), median_ratio(results["Brook"], speeds)]
        for name, speeds in results.items()
    ]
    columns = ["", "tokens/s (median)", "least", "most", "Brook is × faster"]
    report("prefill", columns, rows, n_tokens=N_TOKENS, n_threads=N_THREADS, rounds=results)


if __name__ == "__main__":
    main()
