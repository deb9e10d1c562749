"""What keeping conversations costs: decoding with and without it, and opening, listing and searching many.

    python -m benchmarks.store [--rounds 9] [--tokens 256] [--conversations 1000] [--messages 100]

Decoding: the default model writes the same reply with its text kept every half second, and without, in turn. Beside the
ratio, which a busy machine blurs, stands what the keeping thread itself takes of a second of decoding.
Reading: conversations of ordinary words, from which the sidebar's list, one conversation and searches are read.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import in_turn, median_ratio, report
from streaming import GenerationRequest, load_engine
from streaming.conversations.store import Store
from streaming.conversations.tree import Conversation, Message
from streaming.server.runs import Runs

TEXTS = Path(__file__).parent / "texts"
WORDS_PER_MESSAGE = 60
OWNER = "browser:bench"
PROMPT = "Tell a long story about a brook, a mill and the people who lived beside them."


class TimedStore(Store):
    """A store that counts what its updates take."""

    busy_s = 0.0
    n_updates = 0

    def update(self, conversation_id: str, reply: Message) -> None:
        began = time.thread_time()
        super().update(conversation_id, reply)
        self.busy_s += time.thread_time() - began
        self.n_updates += 1


class TimedRuns(Runs):
    """Runs that count what their threads take for keeping: reading the log, checking the ids, writing."""

    busy_s = 0.0

    def _keep(self, reply: Any) -> None:
        began = time.thread_time()
        super()._keep(reply)
        self.busy_s += time.thread_time() - began


def measure_decoding(folder: Path, n_tokens: int, rounds: int) -> list[list[Any]]:
    engine, store = load_engine(), TimedStore(folder / "decode")
    runs = TimedRuns(engine, store)
    decoding_s = 0.0

    def write(keep: bool) -> float:
        """Give the tokens per second of one reply."""
        nonlocal decoding_s
        question = Message(role="user", content=PROMPT)
        reply = Message(role="assistant", content="", parent=question.id)
        conversation = Conversation(owner=OWNER).add(question).add(reply)
        store.save(conversation, [question, reply])
        live = runs.start(
            reply,
            lambda: GenerationRequest(
                messages=[{"role": "user", "content": PROMPT}], max_new_tokens=n_tokens, temperature=1.0, seed=1
            ),
            owner=OWNER,
            conversation_id=conversation.id if keep else None,
        )
        with live.reading():
            stats = live.done.result(120).stats
        if keep:
            decoding_s += stats["n_generated_tokens"] / stats["tokens_per_s"]
        return float(stats["tokens_per_s"])

    try:
        write(False)  # warm up
        rates = in_turn({"kept": lambda: write(True), "not kept": lambda: write(False)}, rounds)
    finally:
        runs.close()
        store.close()
        engine.close()
    slower = 100 * (1 - median_ratio(rates["kept"], rates["not kept"]))
    return [
        ["decode, not kept, tokens/s", statistics.median(rates["not kept"])],
        ["decode, kept, tokens/s", statistics.median(rates["kept"])],
        ["decode, kept is slower by, % (median of rounds)", slower],
        ["the keeping thread takes of the decoding time, %", 100 * runs.busy_s / decoding_s],
        ["one checkpoint, ms", 1000 * runs.busy_s / store.n_updates],
    ]


def fill(store: Store, n_conversations: int, n_messages: int) -> list[str]:
    """Keep conversations of words from a text; give the words."""
    words = (TEXTS / "prose.txt").read_text("utf-8").split()
    draw = random.Random(0)
    for _ in range(n_conversations):
        messages: dict[str, Message] = {}
        parent = None
        for i in range(n_messages):
            message = Message(
                role="user" if i % 2 == 0 else "assistant",
                content=" ".join(draw.choices(words, k=WORDS_PER_MESSAGE)),
                parent=parent,
                token_ids=tuple(range(90)) if i % 2 else (),
                reason="stop" if i % 2 else None,
            )
            messages[message.id], parent = message, message.id
        conversation = Conversation(owner=OWNER, title=f"About {draw.choice(words)}", messages=messages, leaf=parent)
        store.save(conversation, messages.values())
    rare = Message(role="user", content="the one needle in all this hay")
    store.save(Conversation(owner=OWNER).add(rare), [rare])
    return words


def measure_reading(folder: Path, n_conversations: int, n_messages: int) -> list[list[Any]]:
    store = Store(folder / "many")
    words = fill(store, n_conversations, n_messages)
    store.close()
    began = time.perf_counter()
    store = Store(folder / "many")
    opened_s = time.perf_counter() - began

    def took(work: Callable[[Any], Any], values: list[Any]) -> float:
        """Give the slowest of the calls, in ms."""
        times_s = []
        for value in values:
            began = time.perf_counter()
            work(value)
            times_s.append(time.perf_counter() - began)
        return 1000 * max(times_s)

    ids = [summary.id for summary in store.recent(OWNER)]
    often = max(set(words), key=words.count)
    some = random.Random(1).sample(sorted({word for word in words if len(word) > 4}), 20)
    rows = [
        ["opening the file, ms", 1000 * opened_s],
        ["the list, slowest of 20, ms", took(lambda _: store.recent(OWNER), [None] * 20)],
        ["one conversation, slowest of 50, ms", took(lambda i: store.open(OWNER, i), ids[::-1][:50])],
        ["search, slowest of 20 words, ms", took(lambda word: store.search(OWNER, word), some)],
        ["search, the most frequent word, ms", took(lambda word: store.search(OWNER, word), [often])],
        ["search, a word that is there once, ms", took(lambda word: store.search(OWNER, word), ["needle"])],
        ["search, a word that is not there, ms", took(lambda word: store.search(OWNER, word), ["zzyzx"])],
        ["search, two letters, not there, ms", took(lambda word: store.search(OWNER, word), ["qž"])],
        ["size, MB", (folder / "many" / "conversations.db").stat().st_size / 1e6],
    ]
    store.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--messages", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_decoding(Path(folder), options.tokens, options.rounds)
        rows += measure_reading(Path(folder), options.conversations, options.messages)
    report("store", ["what", "measured"], rows, **vars(options))


if __name__ == "__main__":
    main()
