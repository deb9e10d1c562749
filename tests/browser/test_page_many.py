"""Many people on one model at once: tabs and programs, each with a reply of its own, and what a closed tab leaves."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import openai
import pytest
from playwright.sync_api import expect

from streaming.engine.base import GenerationRequest
from streaming.engine.batched import BatchedEngine
from streaming.engine.local import LocalEngine
from streaming.models.llama_step import step_of
from streaming.server.runs import Runs
from tests.browser.conftest import serve
from tests.browser.page_steps import WAIT_MS, last_reply, send, shown, wait_done, wait_until, watch
from tests.packed import COMMON, murmuring_llama
from tests.serving import WAIT_S, ask, serving
from tests.tiny import loaded

pytestmark = pytest.mark.browser

N_PEOPLE = 8
MAX_ACTIVE = 16
"""As many requests as one person may have by default; programs without keys are one person."""
N_TOKENS = 200
N_LONG = 400
"""More than anyone gets in the tests' time at SLOW_S a token."""
SLOW_S = 0.5
AT_ONCE_S = 10.0
"""Far less than the time that a reply goes on by default, on however busy a machine."""
SAME = 40
"""Replies with so much in common would hide that one was taken for another."""


class Pace:
    """How fast an engine's model steps: not at all, slowly, or as it can."""

    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read
        self._goes = Event()
        self.go()

    def hold(self) -> None:
        self._goes.clear()

    def go(self, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s
        self._goes.set()

    def read(self, *arguments: Any) -> Any:
        self._goes.wait(WAIT_S)
        time.sleep(self._pause_s)
        return self._read(*arguments)


def load(_progress: Any) -> Any:
    return loaded(murmuring_llama(), n_context=COMMON["max_position_embeddings"])


@pytest.fixture(scope="module")
def batched() -> Iterator[BatchedEngine]:
    engine = BatchedEngine(load, max_active=MAX_ACTIVE)
    assert engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


@pytest.fixture
def pace(batched: BatchedEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    step = step_of(batched._loaded.model)
    pace = Pace(step.read)
    monkeypatch.setattr(step, "read", pace.read)
    yield pace
    pace.go()


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[[str, int], str]]:
    """What the same model replies to a question while nobody else is served."""
    engine = LocalEngine(load)

    def alone(question: str, n_tokens: int) -> str:
        messages = [{"role": "user", "content": question}]
        return engine.submit(GenerationRequest(messages=messages, max_new_tokens=n_tokens)).result(WAIT_S).text

    yield alone
    engine.close()


def questions(who: str, n_people: int = N_PEOPLE) -> list[str]:
    return [f"What has {who} {number} to hear?" for number in range(n_people)]


def health(url: str) -> dict[str, Any]:
    return ask(f"{url}healthz")[1]


def open_tabs(open_page: Callable[..., Any], url: str, n_people: int, n_tokens: int) -> list[Any]:
    """Open a tab in a browser of its own for everyone."""
    tabs = []
    for _ in range(n_people):
        tabs.append(open_page(url))
        watch(tabs[-1])
        tabs[-1].locator("#max-new-tokens input").fill(str(n_tokens))
    return tabs


def stream(url: str, question: str) -> tuple[str, list[str], int]:
    """Ask the API as OpenAI's client does; give the text, how it ended each time it did, and the tokens used."""
    with openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        *chunks, usage = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            max_tokens=N_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    choices = [chunk.choices[0] for chunk in chunks]
    ends = [choice.finish_reason for choice in choices if choice.finish_reason]
    return "".join(choice.delta.content or "" for choice in choices), ends, usage.usage.completion_tokens


def test_eight_browsers_and_eight_programs_at_once_each_get_what_they_get_alone(open_page, batched, pace, alone):
    in_tabs, over_api = questions("tab"), questions("program")
    expected = {question: alone(question, N_TOKENS) for question in (*in_tabs, *over_api)}
    pieces = {text[at : at + SAME] for text in expected.values() for at in range(N_TOKENS - SAME + 1)}
    assert len(pieces) == len(expected) * (N_TOKENS - SAME + 1)
    with serving(batched) as url, ThreadPoolExecutor(N_PEOPLE) as pool:
        tabs = open_tabs(open_page, url, N_PEOPLE, N_TOKENS)
        pace.hold()
        for tab, question in zip(tabs, in_tabs, strict=True):
            send(tab, question)
        answers = [pool.submit(stream, url, question) for question in over_api]
        wait_until(tabs[0], lambda: (now := health(url))["active"] + now["queued"] == N_PEOPLE * 2)
        pace.go(SLOW_S)
        wait_until(tabs[0], lambda: health(url)["active"] == N_PEOPLE * 2)
        pace.go()
        for tab, question in zip(tabs, in_tabs, strict=True):
            expect(last_reply(tab)).to_have_text(expected[question], timeout=WAIT_MS)
            wait_done(tab)
            assert all(expected[question].startswith(text) for text in shown(tab))
            assert tab.locator("#chatbot .message").all_inner_texts() == [question, expected[question]]
            assert tab.seen_errors == []
        for answer, question in zip(answers, over_api, strict=True):
            assert answer.result(WAIT_S) == (expected[question], ["length"], N_TOKENS)
        assert (health(url)["active"], health(url)["queued"]) == (0, 0)
        for tab in tabs:
            tab.context.close()


@pytest.mark.parametrize(("grace_s", "n_people"), [(0.0, N_PEOPLE), (60.0, 2)])
def test_tabs_that_are_closed_free_their_slots_at_once_or_go_on_for_the_grace_time(
    open_page, batched, pace, alone, grace_s, n_people
):
    asked = questions("tab", n_people)
    expected = [alone(question, N_LONG) for question in asked]
    runs = Runs(batched, grace_s=grace_s)
    app, url = serve(batched, runs)
    tabs = open_tabs(open_page, url, n_people, N_LONG)
    pace.hold()
    for tab, question in zip(tabs, asked, strict=True):
        send(tab, question)
    wait_until(tabs[0], lambda: (now := health(url))["active"] + now["queued"] == n_people)
    pace.go(SLOW_S)
    for tab in tabs:
        expect(last_reply(tab)).not_to_be_empty(timeout=WAIT_MS)
    assert health(url)["active"] == n_people

    replies = list(runs._threads)
    closed, others = tabs[: n_people // 2], tabs[n_people // 2 :]
    for tab in closed:
        tab.close()
    closed_at = time.monotonic()
    if grace_s:
        wait_until(others[0], lambda: sum(not reply._n_readers for reply in replies) == len(closed))
        assert health(url)["active"] == n_people
    else:
        wait_until(others[0], lambda: health(url)["active"] == len(others))
        assert time.monotonic() - closed_at < AT_ONCE_S
    pace.go()
    for tab, text in zip(others, expected[len(closed) :], strict=True):
        expect(last_reply(tab)).to_have_text(text, timeout=WAIT_MS)
        wait_done(tab)
        assert all(text.startswith(earlier) for earlier in shown(tab))
        assert tab.seen_errors == []
    wait_until(others[0], lambda: health(url)["active"] == 0)
    for tab, text in zip(closed, expected, strict=False):
        later = tab.context.new_page()
        later.goto(url)
        later.locator(".conversation .open", has_text="tab").click()
        if grace_s:
            expect(last_reply(later)).to_have_text(text, timeout=WAIT_MS)
        else:
            expect(later.locator(".live .notice")).to_contain_text("Stopped: nobody was watching.", timeout=WAIT_MS)
            part = last_reply(later).inner_text().strip()
            assert 0 < len(part) < N_LONG
            assert text.startswith(part)
    for tab in tabs:
        tab.context.close()
    app.close()
    runs.close()
    runs.store.close()
