"""Later turns: time to the first token at each turn of a ten-turn conversation.

Brook, the stock recipe (`Thread(target=model.generate)` + `TextIteratorStreamer`, bf16) and llama.cpp (same GGUF,
2 threads, its own prefix reuse) hold the same conversation in turn.

    pip install -r requirements-bench.txt && python -m benchmarks.turns
"""

import statistics
import threading
import time
from typing import Any

import torch
from transformers import TextIteratorStreamer

from benchmarks.peers import llama_cpp, stock_model
from benchmarks.report import report
from streaming import GenerationRequest, load_engine
from streaming.events import TokenEvent

ROUNDS = 5
N_REPLY_TOKENS = 32
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


class Brook:
    def __init__(self) -> None:
        self.engine = load_engine()
        self._n_conversations = 0

    def converse(self) -> list[float]:
        self._n_conversations += 1
        messages: list[dict[str, Any]] = []
        ttfts = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            started = time.perf_counter()
            run = self.engine.submit(
                GenerationRequest(
                    messages=messages,
                    max_new_tokens=N_REPLY_TOKENS,
                    temperature=0,
                    owner=f"conversation {self._n_conversations}",
                )
            )
            first = next(event for event in run.events(timeout=120) if isinstance(event, TokenEvent) and event.text)
            ttfts.append(time.perf_counter() - started)
            assert first.index == 0
            result = run.result(timeout=120)
            messages.append({"role": "assistant", "content": result.text, "token_ids": result.token_ids})
        return ttfts


class Stock:
    def __init__(self) -> None:
        self.model, self.tokenizer = stock_model()

    def converse(self) -> list[float]:
        messages: list[dict[str, str]] = []
        ttfts = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            started = time.perf_counter()
            inputs = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
            options = {"max_new_tokens": N_REPLY_TOKENS, "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=self.model.generate, kwargs={**inputs, **options})
            thread.start()
            text = ""
            for piece in streamer:
                if piece and not text:
                    ttfts.append(time.perf_counter() - started)
                text += piece
            thread.join()
            messages.append({"role": "assistant", "content": text})
        return ttfts


class LlamaCpp:
    def __init__(self) -> None:
        self.model = llama_cpp(n_ctx=4096)

    def converse(self) -> list[float]:
        self.model.reset()
        messages: list[Any] = []
        ttfts = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            started = time.perf_counter()
            text = ""
            chunks: Any = self.model.create_chat_completion(
                messages, max_tokens=N_REPLY_TOKENS, temperature=0, stream=True
            )
            for chunk in chunks:
                piece = chunk["choices"][0]["delta"].get("content", "")
                if piece and not text:
                    ttfts.append(time.perf_counter() - started)
                text += piece
            messages.append({"role": "assistant", "content": text})
        return ttfts


def main() -> None:
    torch.manual_seed(0)
    peers = {"Brook": Brook(), "stock": Stock(), "llama.cpp": LlamaCpp()}
    rounds: dict[str, list[list[float]]] = {name: [] for name in peers}
    for peer in peers.values():
        peer.converse()  # warm up
    for _ in range(ROUNDS):
        for name, peer in peers.items():
            rounds[name].append(peer.converse())
    peers["Brook"].engine.close()
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
