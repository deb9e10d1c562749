"""Decoding on a GPU: 128 greedy tokens, from the call to the last token.

Brook's engine against bare `generate()` in the same dtype and attention, without a streamer, with the stock recipe's,
and with a static cache that transformers compiles (its compiling is told apart from its speed). The default model, or
any other:

    python -m benchmarks.gpu [--model ID_OR_PATH]
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextIteratorStreamer

from benchmarks.report import in_turn, median_ratio, report
from streaming import GenerationRequest
from streaming.engine.local import LocalEngine
from streaming.events import TokenEvent
from streaming.models.loading import load_model

N_TOKENS = 128
ROUNDS = 5
PROMPT = "The lighthouse keeper climbed the stairs every evening, carrying oil for the lamp."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder (default: the default model)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled static cache out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU, and there is none here.")
    loaded = load_model(arguments.model, device="cuda")
    model, tokenizer = loaded.model, loaded.tokenizer
    model.generation_config.eos_token_id = None  # every peer writes all tokens
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"max_new_tokens": N_TOKENS, "do_sample": False, "pad_token_id": 0}
    engine = LocalEngine(lambda progress: loaded, max_cache_bytes=0)
    ids: dict[str, list[int]] = {}

    def seconds(name: str, generate: Callable[[], list[int]]) -> Callable[[], float]:
        def run() -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            ids[name] = generate()
            assert len(ids[name]) == N_TOKENS, f"{name}: {len(ids[name])} tokens"
            return time.perf_counter() - started

        return run

    def bare(**extra: Any) -> list[int]:
        out = model.generate(**inputs, **options, **extra)
        return list(out[0, inputs["input_ids"].shape[1] :].tolist())

    def recipe() -> list[int]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
        out: list[Any] = []
        thread = threading.Thread(target=lambda: out.append(bare(streamer=streamer)))
        thread.start()
        for _ in streamer:
            pass
        thread.join()
        return list(out[0])

    def brook() -> list[int]:
        run = engine.submit(GenerationRequest(prompt=PROMPT, max_new_tokens=N_TOKENS, temperature=0))
        return [event.id for event in run.events(timeout=120) if isinstance(event, TokenEvent)]

    peers = {
        "generate()": seconds("generate()", bare),
        "the copied recipe": seconds("the copied recipe", recipe),
        "Brook": seconds("Brook", brook),
    }
    if not arguments.no_compile:
        peers["generate(), compiled"] = seconds("generate(), compiled", lambda: bare(cache_implementation="static"))
    warm_up = {}
    for name, run in peers.items():
        warm_up[name] = run()
        print(f"{name}: first call {warm_up[name]:.1f} s", flush=True)
    results = in_turn(peers, ROUNDS)
    engine.close()
    base = results["generate()"]
    rows = [
        [
            name,
            statistics.median(N_TOKENS / s for s in took),
            median_ratio(base, took),
            warm_up[name],
            next(
                (i for i, pair in enumerate(zip(ids[name], ids["generate()"], strict=True)) if len(set(pair)) > 1),
                N_TOKENS,
            ),
        ]
        for name, took in results.items()
    ]
    columns = [torch.cuda.get_device_name(), "tokens/s", "× generate()", "first call, s", "same tokens as generate()"]
    report("gpu", columns, rows, rounds=results, first_call_s=warm_up, model=loaded.model_id)


if __name__ == "__main__":
    main()
