"""Later turns: time to the first token at each turn of a ten-turn conversation.

Brook, the stock recipe (`Thread(target=model.generate)` + `TextIteratorStreamer`, bf16) and llama.cpp (same GGUF,
2 threads, its own prefix reuse), each in a process of its own, hold the same conversation in turn. Each pauses before a
question, as the person does who writes it; Brook reads ahead in the meantime.

    pip install -r requirements-bench.txt && python -m benchmarks.turns [--rounds 3]
"""

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextIteratorStreamer

from benchmarks.isolated import BROOK_ENVIRONMENT, N_THREADS, Isolated
from benchmarks.peers import llama_cpp, stock_model
from benchmarks.report import in_turn, report
from streaming import GenerationRequest, load_engine
from streaming.events import TokenEvent

ROUNDS = 3
N_REPLY_TOKENS = 32
PAUSE_S = 0.5
QUESTIONS = [
    "Tell me about the history of lighthouses, who built the first ones and what they burned for light.",
    "How did the lenses work, and why were they made of so many separate rings of glass?",
    "What did a keeper do on an ordinary day, from the morning until the lamp was lit?",
    "Describe a storm at sea as a keeper would have seen it from the gallery, in a few sentences.",
    "How were the lamps kept alight when the oil froze in winter, and who carried it up the stairs?",
    "Which inventions made keepers unnecessary, and in what order did they arrive?",
    "What happened to the towers after the keepers had gone, and who looks after them now?",
    "Name some stories or novels with a lighthouse in them and say what it stands for.",
    "If I wanted to visit one, how should I choose, and what should I take along?",
    "Now sum up everything that we talked about in three sentences.",
]


def brook() -> Callable[[], list[float]]:
    engine = load_engine()
    n_conversations = itertools.count()

    def converse() -> list[float]:
        owner = f"conversation {next(n_conversations)}"
        messages: list[dict[str, Any]] = []
        ttfts = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            run = engine.submit(
                GenerationRequest(messages=messages, max_new_tokens=N_REPLY_TOKENS, temperature=0, owner=owner)
            )
            next(event for event in run.events(timeout=120) if isinstance(event, TokenEvent) and event.text)
            ttfts.append(time.perf_counter() - started)
            result = run.result(timeout=120)
            messages.append({"role": "assistant", "content": result.text, "token_ids": result.token_ids})
        return ttfts

    return converse


def stock() -> Callable[[], list[float]]:
    model, tokenizer = stock_model()
    torch.set_num_threads(N_THREADS)

    def converse() -> list[float]:
        messages: list[dict[str, str]] = []
        ttfts = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
            options = {"max_new_tokens": N_REPLY_TOKENS, "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
            thread.start()
            text = ""
            for piece in streamer:
                if piece and not text:
                    ttfts.append(time.perf_counter() - started)
                text += piece
            thread.join()
            messages.append({"role": "assistant", "content": text})
        return ttfts

    return converse


def llama() -> Callable[[], list[float]]:
    model = llama_cpp(n_ctx=4096)

    def converse() -> list[float]:
        model.reset()
        messages: list[Any] = []
        ttfts = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            text = ""
            for chunk in model.create_chat_completion(messages, max_tokens=N_REPLY_TOKENS, temperature=0, stream=True):
                piece = chunk["choices"][0]["delta"].get("content", "")
                if piece and not text:
                    ttfts.append(time.perf_counter() - started)
                text += piece
            messages.append({"role": "assistant", "content": text})
        return ttfts

    return converse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    peers = {
        "Brook": Isolated(brook, **BROOK_ENVIRONMENT),
        "stock": Isolated(stock),
        "llama.cpp": Isolated(llama),
    }
    n_rounds = parser.parse_args().rounds
    for peer in peers.values():
        peer()  # warm up
    rounds = in_turn(peers, n_rounds)
    for peer in peers.values():
        peer.close()
    rows = []
    for turn in range(len(QUESTIONS)):
        ms = {name: statistics.median(r[turn] for r in results) * 1000 for name, results in rounds.items()}
        ratios = [
            statistics.median(
                ours[turn] / theirs[turn] for ours, theirs in zip(rounds["Brook"], rounds[peer], strict=True)
            )
            for peer in ("stock", "llama.cpp")
        ]
        rows.append([turn + 1, *(ms[name] for name in peers), *ratios])
    report("turns", ["turn", *(f"{name} ms" for name in peers), "Brook / stock", "Brook / llama.cpp"], rows)


if __name__ == "__main__":
    main()
