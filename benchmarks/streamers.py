"""Streamers: what a token costs, and when text first appears, with Brook's streamer and transformers' own.

Both are given the same ids of the default model's tokenizer, in turn, as `generate()` gives them. Times are of the
thread's own work (`time.thread_time`), the best of all rounds: what else runs on the machine only adds.

    python -m benchmarks.streamers [--plot]
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextIteratorStreamer

from benchmarks.report import BENCH_DIR, report
from streaming import IteratorStreamer
from streaming.models.loading import load_tokenizer

LENGTHS = (300, 3_000, 30_000)
ROUNDS = 15
BUDGET_S = 5.0  # for one run: the peer would need minutes for the longest lines

TEXTS = {
    "English, newlines": "The keeper climbed the stairs and lit the lamp.\nOutside, the sea was calm and very dark.\n",
    "English, one line": "The keeper climbed the stairs and lit the lamp, and outside the sea was calm and very dark. ",
    "kana": "とうだいもりはかいだんをのぼりランプにひをともしました。うみはしずかでとてもくらかった。",
    "Thai": "ผู้ดูแลประภาคารปีนขึ้นบันไดและจุดตะเกียงข้างนอกทะเลสงบและมืดมาก",
    "emoji": "👩‍👩‍👧‍👦🇩🇪👍🏽❤️‍🔥🧑‍🚀🏳️‍🌈🎉",
    "code": "def light(lamp):\n    if lamp.oil > 0:\n        return lamp.burn(rate=0.5)\n\n    raise Dark(lamp)\n\n",
}


@dataclass(frozen=True)
class Outcome:
    """What one run gave; `n_tokens` is less than asked for where the time was up."""

    us_per_token: float
    first_text_after: int
    n_chunks: int
    n_tokens: int


def run(
    make: Callable[[], Any], chunks_of: Callable[[Any], list[tuple[int, str]]], steps: list[torch.Tensor]
) -> Outcome:
    streamer = make()
    streamer.put(torch.tensor([[0]]))
    started = time.thread_time()
    n_tokens = 0
    for n_tokens, step in enumerate(steps, 1):
        streamer.put(step)
        if n_tokens % 100 == 0 and time.thread_time() - started > BUDGET_S:
            break
    took_s = time.thread_time() - started
    streamer.end()
    chunks = chunks_of(streamer)
    return Outcome(1e6 * took_s / n_tokens, chunks[0][0] if chunks else n_tokens, len(chunks), n_tokens)


def brook_chunks(streamer: IteratorStreamer) -> list[tuple[int, str]]:
    return [(event.index + 1, event.text) for event in list(streamer.events())[:-1] if event.text]  # type: ignore[union-attr]


class CountingPeer(TextIteratorStreamer):
    """The peer, noting after which token each text came; that costs it a fraction of a microsecond."""

    n_put = -1  # the prompt is no token

    def put(self, value: torch.Tensor) -> None:
        self.n_put += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text_queue.put((self.n_put, text))


def peer_chunks(streamer: CountingPeer) -> list[tuple[int, str]]:
    pieces = [streamer.text_queue.get_nowait() for _ in range(streamer.text_queue.qsize())]
    return [piece for piece in pieces if piece[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw assets/bench/streamers.svg as well (matplotlib)")
    wants_plot = parser.parse_args().plot
    tokenizer = load_tokenizer()
    peers: dict[str, tuple[Callable[[], Any], Callable[[Any], list[tuple[int, str]]]]] = {
        "Brook": (lambda: IteratorStreamer(tokenizer, skip_prompt=True), brook_chunks),
        "peer": (lambda: CountingPeer(tokenizer, skip_prompt=True), peer_chunks),
    }
    rows = []
    for (kind, text), length in itertools.product(TEXTS.items(), LENGTHS):
        once = tokenizer(text)["input_ids"]
        steps = [torch.tensor([token_id]) for token_id in itertools.islice(itertools.cycle(once), length)]
        outcomes: dict[str, list[Outcome]] = {name: [] for name in peers}
        for number in range(ROUNDS):
            for name, (make, chunks_of) in peers.items():
                if number > 0 and name == "peer" and outcomes[name][0].us_per_token > 100:
                    continue  # once is enough where it is so much slower
                outcomes[name].append(run(make, chunks_of, steps))
        ours, theirs = (outcomes[name] for name in peers)
        rows.append(
            [
                kind,
                length,
                min(o.us_per_token for o in ours),
                min(o.us_per_token for o in theirs),
                ours[0].first_text_after,
                theirs[0].first_text_after,
                ours[0].n_chunks,
                theirs[0].n_chunks,
                "" if theirs[0].n_tokens == length else theirs[0].n_tokens,
            ]
        )
    columns = ["text", "tokens", "Brook µs/token", "TextIteratorStreamer µs/token", "Brook first text after token",
               "theirs", "Brook chunks", "theirs ", f"stopped after {BUDGET_S:g} s, at token"]  # fmt: skip
    report("streamers", columns, rows)
    if wants_plot:
        plot(rows)


def plot(rows: list[list[Any]]) -> None:
    """Draw microseconds a token over the number of tokens, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "brook"  # the same numbers draw the same file
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for column, colour, name in ((3, "#b3541e", "TextIteratorStreamer"), (2, "#1e6fb3", "Brook")):
        for number, kind in enumerate(TEXTS):
            # The peer's time may have been up before the end.
            points = [(row[-1] or row[1] if column == 3 else row[1], row[column]) for row in rows if row[0] == kind]
            axes.loglog(*zip(*points, strict=True), color=colour, marker="o", label=name if number == 0 else None)
            label = "one line, kana, Thai, emoji" if kind == "English, one line" else kind
            if column == 3 and kind not in ("kana", "Thai", "emoji"):
                axes.annotate(label, points[-1], textcoords="offset points", xytext=(8, -3), fontsize=8)
    axes.set(xlabel="tokens in the stream", ylabel="µs a token", xlim=(200, 200_000))
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(BENCH_DIR / "streamers.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
