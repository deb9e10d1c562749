"""How fast the page takes tokens in a long conversation: yields per second and bytes per token on the wire.

Both sides stream the same reply to one HTTP client on this machine, one yield a token, as fast as they can: Brook's
page with an engine that has every token ready, and the recipe that everyone copies, a `gr.Chatbot` whose handler
yields the whole history.

    python -m benchmarks.ui_rate [--tokens 400] [--messages 0 20 100 400] [--rounds 3]
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import httpx

from benchmarks.report import in_turn, report
from streaming.engine.base import EngineStatus, Generation, GenerationRequest, Progress, SamplingDefaults
from streaming.events import Event, FinishEvent, TokenEvent
from streaming.log import EventLog
from streaming.settings import Settings
from streaming.ui.build import build_app, launch_app

WORDS = "The brook runs down the hill and past the old mill, and nobody counts the stones.".split()  # noqa: SIM905
EARLIER = "An earlier message of ordinary length, with some **markdown** and `code` in it, as people write them."


class OneAtATimeLog(EventLog):
    """A log that gives its readers one event at a time, so that every token is a yield of its own."""

    async def wait_async(self, after: int, timeout: float) -> list[Event]:
        return self.snapshot(after)[:1] or await super().wait_async(after, timeout)


class ReadyEngine:
    """An engine that has written its reply before it is asked: what is measured is the page alone."""

    kind = "ready"
    model_id = "ready"
    tokenizer = None
    defaults = SamplingDefaults()

    def submit(self, request: GenerationRequest) -> Generation:
        log, n = OneAtATimeLog(), request.max_new_tokens or 1
        run = Generation(request, (1,), log=log, seed=1, cancel=lambda run: None)
        run.progress = Progress("writing", 1, 1)
        for i in range(n):
            log.append(TokenEvent(i, i, WORDS[i % len(WORDS)] + " ", t_s=0.001 * (i + 1)))
        log.append(FinishEvent("length", n_prompt_tokens=1, n_generated_tokens=n))
        return run

    def wait_ready(self, timeout: float | None = None) -> bool:
        return True

    def status(self) -> EngineStatus:
        return EngineStatus("ready", "ready")

    def close(self) -> None:
        return


@dataclass(frozen=True)
class Measured:
    """One run: `n_yields` frames in `seconds`, `n_bytes` of them on the wire; `last` are the outputs at its end."""

    n_yields: int
    seconds: float
    n_bytes: int
    last: list[Any]


class Client:
    """Calls an event of a served page as its browser does, and counts what comes back."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url.rstrip("/"), timeout=120)
        self.config: dict[str, Any] = self._http.get("/config").json()
        self._session = f"bench{time.monotonic_ns()}"

    def event(self, elem_id: str, name: str) -> tuple[int, int]:
        """Find an event of a component: its function's index and the component's id."""
        target = next(c["id"] for c in self.config["components"] if c["props"].get("elem_id") == elem_id)
        deps = self.config["dependencies"]
        return next((d["id"], target) for d in deps if [target, name] in [list(t) for t in d["targets"]])

    def after(self, event: tuple[int, int]) -> tuple[int, int]:
        """Find the event that follows another."""
        return next((d["id"], event[1]) for d in self.config["dependencies"] if d["trigger_after"] == event[0])

    def call_at_once(self, event: tuple[int, int], data: list[Any]) -> None:
        """Run an event that does not queue."""
        body = {"data": data, "fn_index": event[0], "trigger_id": event[1], "session_hash": self._session}
        self._http.post("/gradio_api/run/predict", json=body).raise_for_status()

    def call(self, event: tuple[int, int], data: list[Any]) -> Measured:
        """Run an event to its end."""
        body = {"data": data, "fn_index": event[0], "trigger_id": event[1], "session_hash": self._session}
        self._http.post("/gradio_api/queue/join", json=body).raise_for_status()
        n_yields = n_bytes = 0
        last: list[Any] = []
        began = ended = 0.0
        with self._http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as answer:
            for line in answer.iter_lines():
                if not line:
                    continue
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_generating":
                    began = began or time.perf_counter()
                    ended = time.perf_counter()
                    n_yields += 1
                    n_bytes += len(line) + 2
                elif message["msg"] == "process_completed":
                    if not message["success"]:
                        raise SystemExit(f"The page answered with an error: {message}")
                    last = message["output"]["data"]
                elif message["msg"] == "close_stream":
                    break
        return Measured(n_yields, ended - began, n_bytes, last)


def serve_plain(n_messages: int, n_tokens: int) -> tuple[gr.Blocks, str]:
    """Serve the recipe: a handler that yields the history with the growing reply to a `gr.Chatbot`."""
    roles = ("user", "assistant")
    history = [{"role": roles[i % 2], "content": EARLIER} for i in range(n_messages)]

    async def reply(message: str) -> Any:
        text = ""
        for i in range(n_tokens):
            text += WORDS[i % len(WORDS)] + " "
            yield [*history, {"role": "user", "content": message}, {"role": "assistant", "content": text}]

    with gr.Blocks() as app:
        chatbot = gr.Chatbot(elem_id="chatbot")
        composer = gr.Textbox(elem_id="composer")
        composer.submit(reply, composer, chatbot)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    return app, url


def measure_plain(n_messages: int, n_tokens: int) -> Measured:
    app, url = serve_plain(n_messages, n_tokens)
    try:
        client = Client(url)
        event = client.event("composer", "submit")
        client.call(event, ["warm up"])
        return client.call(event, ["Go"])
    finally:
        app.close()


def measure_brook(n_messages: int, n_tokens: int) -> Measured:
    engine: Any = ReadyEngine()
    app = build_app(engine)
    url, _ = launch_app(app, engine, Settings(port=0))
    try:
        client = Client(url)
        sent = client.event("composer", "submit")
        streamed = client.after(sent)
        settled = client.after(streamed)

        tab = {"browser": "a" * 32, "conversation": ""}

        def ask(text: str, n: int) -> Measured:
            # The session's state, what the tab says of itself, the message, then the settings in the panel's order.
            shown = client.call(sent, [None, tab, text, "", n, 0.0, 1.0, 0, 0.0, 1.0, 0, ""])
            tab["conversation"] = shown.last[1]["conversation"]
            measured = client.call(streamed, [None, tab])
            client.call_at_once(settled, [None, tab])
            return measured

        ask("warm up", 50)
        for _ in range(n_messages // 2 - 1):
            ask(EARLIER, len(EARLIER.split()))
        return ask("Go", n_tokens)
    finally:
        app.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--messages", type=int, nargs="+", default=[0, 20, 100, 400])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for n_messages in options.messages:
        n_bytes: dict[str, float] = {}

        def run(name: str, measure: Any, n_messages: int = n_messages, n_bytes: dict[str, float] = n_bytes) -> float:
            with contextlib.redirect_stdout(io.StringIO()):  # Gradio says when it closes
                measured = measure(n_messages, options.tokens)
            n_bytes[name] = measured.n_bytes / options.tokens
            return float(measured.n_yields / measured.seconds)

        peers = {
            "plain": lambda run=run: run("plain", measure_plain),
            "brook": lambda run=run: run("brook", measure_brook),
        }
        rates = in_turn(peers, options.rounds)
        medians = [round(statistics.median(rates[name])) for name in ("plain", "brook")]
        rows.append([n_messages, *medians, round(n_bytes["plain"]), round(n_bytes["brook"])])
    columns = ["earlier messages", "gr.Chatbot yields/s", "Brook yields/s", "gr.Chatbot B/token", "Brook B/token"]
    report("ui_rate", columns, rows, tokens=options.tokens, rounds=options.rounds)


if __name__ == "__main__":
    main()
