"""Overhead: `generate()` with no streamer, with Brook's and with transformers' own.

A tiny model, whose step takes a millisecond, shows what a streamer adds to a token; the default model shows what
that matters.

    python -m benchmarks.overhead
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TextIteratorStreamer

from benchmarks.report import in_turn, median_ratio, report
from streaming import IteratorStreamer
from streaming.models.loading import load_model

ROUNDS = 5
PROMPT = "An increasing sequence: one,"


def tiny_model(vocab_size: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be all that is measured
    loaded = load_model()
    tokenizer = loaded.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")
    rows = []
    results = {}
    models = {"tiny": (tiny_model(len(tokenizer)), 200), "SmolLM2-135M": (loaded.model, 32)}
    for name, (model, n_tokens) in models.items():

        def took(make: Callable[[], Any], model: Any = model, n_tokens: int = n_tokens) -> float:
            """Seconds a token."""
            streamer = make()
            started = time.perf_counter()
            model.generate(
                **inputs,
                streamer=streamer,
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            return (time.perf_counter() - started) / n_tokens

        peers: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "Brook": lambda: IteratorStreamer(tokenizer, skip_prompt=True),
            "TextIteratorStreamer": lambda: TextIteratorStreamer(tokenizer, skip_prompt=True),
        }
        for make in peers.values():
            took(make)  # warm up
        runs = in_turn({peer: lambda make=make: took(make) for peer, make in peers.items()}, ROUNDS)
        results[name] = runs
        for peer, seconds in runs.items():
            ratio = median_ratio(seconds, runs["none"])
            rows.append([name, peer, 1e6 * sorted(seconds)[len(seconds) // 2], 100 * (ratio - 1)])
    report("overhead", ["model", "streamer", "µs a token", "more than none, %"], rows, rounds=results)


if __name__ == "__main__":
    main()
