"""Reading speed: a prompt of 1,024 tokens up to the logits of the first new token, nothing reused.

Brook's model in chunks of 256 tokens, as its engine reads; the stock model (bf16) at once, as stock `generate()`
does; and llama.cpp (same GGUF, same threads). They take turns.

    pip install -r requirements-bench.txt && python -m benchmarks.prefill
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.peers import N_THREADS, llama_cpp, stock_model
from benchmarks.report import in_turn, median_ratio, report
from streaming.engine.decode_loop import decode_loop
from streaming.engine.local import PREFILL_CHUNK_TOKENS
from streaming.models.loading import load_model

N_TOKENS = 1024
ROUNDS = 5


def tokens_per_s(read: Callable[[], Any]) -> float:
    started = time.perf_counter()
    read()
    return N_TOKENS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    loaded, (stock, _), llama = load_model(), stock_model(), llama_cpp()
    torch.set_num_threads(N_THREADS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 49000, (1, N_TOKENS), generator=generator)
    one_token = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def read_brook() -> None:
        cache = DynamicCache(config=loaded.model.config)
        chunks = {"prefill_chunk_size": PREFILL_CHUNK_TOKENS, "past_key_values": cache}
        loaded.model.generate(ids, custom_generate=decode_loop, **one_token, **chunks)

    def read_llama() -> None:
        llama.reset()
        llama.eval(ids[0].tolist())

    peers = {
        "Brook": functools.partial(tokens_per_s, read_brook),
        "stock bf16": functools.partial(tokens_per_s, lambda: stock.generate(ids, **one_token)),
        "llama.cpp": functools.partial(tokens_per_s, read_llama),
    }
    for run in peers.values():
        run()  # warm up
    results = in_turn(peers, arguments.rounds)
    rows = [
        [name, statistics.median(speeds), min(speeds), max(speeds), median_ratio(results["Brook"], speeds)]
        for name, speeds in results.items()
    ]
    columns = ["", "tokens/s (median)", "least", "most", "Brook is × faster"]
    report("prefill", columns, rows, n_tokens=N_TOKENS, n_threads=N_THREADS, rounds=results)


if __name__ == "__main__":
    main()
