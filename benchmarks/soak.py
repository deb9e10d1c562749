"""A soak: people ask for minutes on end, and nothing may be lost or pile up.

`python app.py` runs in a process of its own with the default model. Half of the people are programs on `/v1` (openai's
client), half on `/chat` (gradio_client). Each has one conversation after another, of up to MAX_TURNS turns with replies
of random lengths, and leaves one reply in LEAVES midway. Every other stream must end exactly once and be whole: on
`/v1` with one finish reason and as many tokens as the usage says, on `/chat` with texts that only grow. What the people
saw is compared with what the server counted (`/metrics`); when they have gone, nothing may be left in its slots.

Ends with exit code 1 when a stream was lost, and from MIN_MINUTES minutes on when memory grew.

    python -m benchmarks.soak [--minutes 10] [--people 8]
"""

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psutil
from gradio_client import Client
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import report
from benchmarks.server import free_port, started

MINUTES = 10
PEOPLE = 8
SAMPLE_S = 10.0
WAIT_S = 300.0
"""The longest that a reply may take, on however busy a machine."""
MAX_TURNS = 4
MAX_TOKENS = 256
LEAVES = 5
CACHE_MB = 128
"""Memory for reused prefixes: little, so that it is full within two minutes; what fills on purpose is no leak."""
MIN_MINUTES = 6
FLAT = 1.05
"""The most by which the last two minutes' memory may exceed that of minutes 3 and 4, once all caches are full.

Measured without a leak: 1.004. 5 % of 1 GB is 50 MB: the keys and values of ten replies that nobody lets go of, or
200 kB for each of the 250 streams of six minutes.
"""
TOPICS = ("the sea", "a lighthouse", "a train at night", "winter", "the market", "two brothers", "a garden", "the moon")
ASKS = ("Tell me a story about {}.", "What is there to know about {}?", "Write a short poem about {}.")
AGAIN = ("Go on.", "Say that in other words.", "What came before that?", "Why?", "Make it longer, with more about {}.")


class Lost(Exception):
    """A stream that did not end as it must."""


@dataclass
class Tally:
    """What happened to the streams. Used from many threads."""

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def lose(self, why: str) -> None:
        with self._lock:
            self.counts["lost"] += 1
            self.losses.append(why)


@dataclass(frozen=True)
class Turn:
    """What to ask: `messages` so far, the last of them the question; `leave_after` parts of the reply, or never."""

    messages: list[dict[str, str]]
    n_tokens: int
    temperature: float
    seed: int
    leave_after: int | None


# Asks, and gives the reply, or what was there when its reader left.
Ask = Callable[[Turn], str]


class Program:
    """Someone on `/v1`."""

    def __init__(self, url: str, session: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=WAIT_S,
            default_headers={"x-session-id": session},
        )

    def __call__(self, turn: Turn) -> str:
        stream = self._client.chat.completions.create(
            model="dummy",
            messages=turn.messages,
            max_tokens=turn.n_tokens,
            temperature=turn.temperature,
            seed=turn.seed,
            logprobs=True,  # which tells each token
            stream=True,
            stream_options={"include_usage": True},
        )
        texts: list[str] = []
        tokens: list[str] = []
        reasons: list[str] = []
        usage = None
        with stream:
            for number, chunk in enumerate(stream):
                if number == turn.leave_after:
                    return "".join(texts)
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts.append(choice.delta.content or "")
                    tokens += [token.token for token in (choice.logprobs.content if choice.logprobs else None) or ()]
                    reasons += [choice.finish_reason] if choice.finish_reason else []
        text = "".join(texts)
        if reasons not in (["stop"], ["length"]) or usage is None:
            raise Lost(f"/v1 ended with {reasons} and usage {usage}")
        if reasons == ["length"] and usage.completion_tokens != turn.n_tokens:
            raise Lost(f"/v1 wrote {usage.completion_tokens} of {turn.n_tokens} tokens")
        n_told = len(tokens) + (reasons == ["stop"])  # the token that ends a reply is counted, and has no text
        if "".join(tokens) != text or n_told != usage.completion_tokens:
            raise Lost(f"/v1 told {n_told} of {usage.completion_tokens} tokens, or not their text")
        return text

    def close(self) -> None:
        self._client.close()


class Caller:
    """Someone on `/chat`."""

    def __init__(self, url: str) -> None:
        self._client = Client(url, verbose=False, analytics_enabled=False)

    def __call__(self, turn: Turn) -> str:
        *history, question = turn.messages
        job = self._client.submit(
            question["content"],
            history,
            max_new_tokens=turn.n_tokens,
            temperature=turn.temperature,
            seed=turn.seed,
            api_name="/chat",
        )
        deadline = time.monotonic() + WAIT_S
        while turn.leave_after is not None and not job.done():
            if len(job.outputs()) > turn.leave_after:
                job.cancel()
                return str(job.outputs()[-1])
            if time.monotonic() > deadline:
                raise Lost("/chat said nothing")
            time.sleep(0.05)
        final = job.result(timeout=WAIT_S)
        texts = job.outputs()
        if not texts or texts[-1] != final:
            raise Lost("/chat ended without its last text")
        if not all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts)):
            raise Lost("/chat took something back")
        return str(final)

    def close(self) -> None:
        self._client.close()


def turns(draw: random.Random, ask: Ask) -> Iterator[str]:
    """Have a conversation; give for each of its turns what happened to it."""
    topic, messages = draw.choice(TOPICS), list[dict[str, str]]()
    for number in range(draw.randint(1, MAX_TURNS)):
        messages.append({"role": "user", "content": draw.choice(AGAIN if number else ASKS).format(topic)})
        n_tokens = draw.randint(8, MAX_TOKENS)
        leaves = draw.randrange(LEAVES) == 0
        leave_after = draw.randrange(n_tokens // 2) if leaves else None
        turn = Turn(messages, n_tokens, draw.choice((0.0, 0.7, 1.0)), draw.randint(1, 10**9), leave_after)
        messages.append({"role": "assistant", "content": ask(turn)})
        yield "left" if leaves else "ended"


def live(url: str, number: int, until: float, tally: Tally) -> None:
    """Be one of the people: come, talk, go, and come again, until it is time."""
    draw = random.Random(number)
    visit = 0
    while time.monotonic() < until:
        visit += 1
        try:
            with closing(Caller(url) if number % 2 else Program(url, f"{number}.{visit}")) as person:
                for what in turns(draw, person):
                    tally.add(what)
                    if time.monotonic() > until:
                        break
        except Exception as error:  # whatever a client says of a stream that it did not get
            tally.lose(f"{'/chat' if number % 2 else '/v1'}: {error!r}")


@dataclass(frozen=True)
class Sample:
    """What the server takes at a moment, with the processes under it."""

    at_s: float
    rss_mb: float
    n_threads: int
    n_files: int


def sample(process: psutil.Process, at_s: float) -> Sample:
    family = [process, *process.children(recursive=True)]
    return Sample(
        at_s,
        sum(one.memory_info().rss for one in family) / 1e6,
        sum(one.num_threads() for one in family),
        sum(one.num_fds() for one in family),
    )


def counted(client: httpx.Client) -> dict[str, float]:
    """What the server has counted: `tokens`, and generations by how they ended."""
    values = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for one in family.samples:
            if one.name == "brook_generations_total":
                values[one.labels["reason"]] = one.value
            if one.name == "brook_generated_tokens_total":
                values["tokens"] = one.value
    return values


def soak(
    url: str, process: psutil.Process, minutes: int, n_people: int
) -> tuple[list[list[Any]], list[Sample], list[str]]:
    """Let people in for some minutes; give a row for each, the samples, and what went wrong."""
    tally, rows, samples = Tally(), [], []
    with httpx.Client(base_url=url, timeout=WAIT_S) as client, ThreadPoolExecutor(n_people) as pool:
        begun = time.monotonic()
        until = begun + 60 * minutes
        people = [pool.submit(live, url, number, until, tally) for number in range(n_people)]
        before: Counter[str] = Counter()
        n_before = counted(client)["tokens"]
        for minute in range(1, minutes + 1):
            while (now := time.monotonic()) < begun + 60 * minute:
                samples.append(sample(process, now - begun))
                time.sleep(max(0.0, min(SAMPLE_S, begun + 60 * minute - time.monotonic())))
            n_tokens, counts = counted(client)["tokens"], Counter(tally.counts)
            new = counts - before
            recent = [one for one in samples if one.at_s >= 60 * (minute - 1)]
            rows.append(
                [
                    minute, new["ended"], new["left"], new["lost"], (n_tokens - n_before) / 60,
                    statistics.median(one.rss_mb for one in recent),
                    max(one.n_threads for one in recent), max(one.n_files for one in recent),
                ]
            )  # fmt: skip
            print(*rows[-1], flush=True)
            before, n_before = counts, n_tokens
        for person in people:
            person.result(WAIT_S)
        return rows, samples, [*tally.losses, *left_behind(client, tally)]


def left_behind(client: httpx.Client, tally: Tally) -> Iterator[str]:
    """Say what is wrong once everyone has gone: slots that are not free, or ends that the people did not see."""
    deadline = time.monotonic() + WAIT_S
    while (health := client.get("/healthz").json())["active"] or health["queued"]:
        if time.monotonic() > deadline:
            yield f"active {health['active']} and queued {health['queued']} though everyone has gone"
            return
        time.sleep(0.1)
    ends, seen = counted(client), tally.counts
    n_whole = ends["stop"] + ends["length"]
    are_as_many = n_whole + ends["cancelled"] == seen["ended"] + seen["left"]
    # Who leaves may do so when the reply has just ended.
    if ends["error"] or n_whole < seen["ended"] or not (are_as_many or seen["lost"]):
        yield f"the server counted {ends}, the people {dict(seen)}"


def growth(samples: list[Sample], minutes: int) -> float:
    """How many times the memory of minutes 3 and 4 the last two minutes take."""

    def median(first: float, last: float) -> float:
        return statistics.median(one.rss_mb for one in samples if 60 * first <= one.at_s < 60 * last)

    return median(minutes - 2, minutes) / median(2, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=MINUTES)
    parser.add_argument("--people", type=int, default=PEOPLE)
    arguments = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "app.py", "--port", str(port), "--cache-memory", str(CACHE_MB), "--offline"]
    with tempfile.TemporaryDirectory() as folder, started(command, XDG_DATA_HOME=folder) as (_, process):
        wait_ready(url)
        rows, samples, wrong = soak(url, process, arguments.minutes, arguments.people)
    more: dict[str, Any] = {"people": arguments.people, "cache_mb": CACHE_MB, "wrong": wrong}
    if arguments.minutes >= MIN_MINUTES:
        more["growth"] = growth(samples, arguments.minutes)
        if more["growth"] > FLAT:
            wrong.append(f"memory grew {more['growth']:.3f} times")
    columns = ["minute", "ended", "left", "lost", "tokens/s", "RSS, MB", "threads", "files"]
    report("soak", columns, rows, samples=[[s.at_s, s.rss_mb, s.n_threads, s.n_files] for s in samples], **more)
    print(*wrong, f"growth {more.get('growth', 'not measured')}", sep="\n")
    return 1 if wrong else 0


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if httpx.get(f"{url}/healthz").json()["status"] == "ready":
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"The app was not ready within {WAIT_S:g} s")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
