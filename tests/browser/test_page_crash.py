"""The app as a process that is killed while a reply is written, and the page that was open meanwhile."""

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.page_steps import WAIT_MS, last_reply, send
from tests.tiny import ALPHABET, byte_tokenizer, chanting_llama

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
START_S = 120
LOST_S = 1.0
"""How much of what was shown a killed server may have lost."""


@pytest.fixture(scope="module")
def chanting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    chanting_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class App:
    """`python app.py` on a data folder and a port of its own, as often as it is started."""

    def __init__(self, model: Path, data: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.data = data
        self.url = f"http://127.0.0.1:{port}/"
        self._command = [
            sys.executable, "app.py", "--port", str(port), "--data-dir", str(data), "--model", str(model),
            "--device", "cpu", "--dtype", "float32", "--quantize", "none", "--offline",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start the app and wait for its model, or for its page alone."""
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while self._state() not in (("ready",) if wait else ("loading", "ready")):
            assert time.monotonic() < deadline
            assert self._process.poll() is None
            time.sleep(0.1)

    def end(self, how: signal.Signals) -> int:
        """Send a signal and wait for the end; give the exit code."""
        if self._process is None:
            return 0
        os.kill(self._process.pid, how)
        code, self._process = self._process.wait(30), None
        return code

    def damage(self) -> str:
        """Say what is wrong with the database, as one who opens it now sees it: `ok` for nothing."""
        with sqlite3.connect(self.data / "conversations.db") as db:
            [found] = db.execute("PRAGMA integrity_check").fetchone()
        db.close()
        return str(found)

    def _state(self) -> str:
        try:
            with urllib.request.urlopen(f"{self.url}healthz", timeout=5) as answer:
                return str(json.load(answer)["status"])
        except OSError:
            return ""


@pytest.fixture
def app(chanting: Path, tmp_path: Path) -> Iterator[App]:
    app = App(chanting, tmp_path / "data")
    app.start()
    yield app
    app.end(signal.SIGKILL)


def chant(text: str) -> str:
    """Give the text as long as `text` that the model should have written."""
    return (ALPHABET * (len(text) // len(ALPHABET) + 1))[: len(text)].strip()


def text_of(page: Any) -> str:
    return str(last_reply(page).inner_text()).strip()


def watch_for(page: Any, seconds: float) -> list[tuple[float, str]]:
    """Look at a reply that is being written for some seconds: when it showed what, until now."""
    seen, until = [(time.monotonic(), text_of(page))], time.monotonic() + seconds
    while time.monotonic() < until:
        page.wait_for_timeout(20)
        seen.append((time.monotonic(), text_of(page)))
    return seen


def begin(page: Any) -> None:
    page.click("#new-chat")
    expect(page.locator("#chatbot .message")).to_have_count(0, timeout=WAIT_MS)
    page.locator("#max-new-tokens input").fill("12000")
    send(page, "Sing.")
    expect(last_reply(page)).to_contain_text("abc", timeout=WAIT_MS)


def survives_kills(app: App, page: Any, n_kills: int, seed: int) -> None:
    moments = random.Random(seed)
    for _ in range(n_kills):
        begin(page)
        seen = watch_for(page, moments.uniform(0, 2.5))
        killed_at = time.monotonic()
        assert app.end(signal.SIGKILL) == -signal.SIGKILL
        assert app.damage() == "ok"
        app.start()
        # The page comes back by itself.
        expect(page.locator(".live .notice")).to_contain_text("Interrupted", timeout=WAIT_MS)
        stored = text_of(page)
        assert stored == chant(stored)
        assert all(chant(text) == text for _, text in seen)
        must_be_there = max((text for at, text in seen if at < killed_at - LOST_S), default="", key=len)
        assert len(stored) >= len(must_be_there)
        page.locator(".resume-notice").click()
        expect(page.locator("#status-line")).to_have_attribute("data-state", "done", timeout=WAIT_MS)
        whole = text_of(page)
        assert whole == chant(whole)
        assert len(whole) >= len(stored) + 200
    assert not list(app.data.glob("*damaged*"))


def test_a_killed_server_loses_a_second_at_most_and_the_page_goes_on_where_it_stopped(app, open_page):
    survives_kills(app, open_page(app.url), n_kills=2, seed=1)


@pytest.mark.endurance
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 7))
def test_fifty_kills_do_no_harm(app, open_page, seed):
    survives_kills(app, open_page(app.url), n_kills=10, seed=seed)


def test_a_server_that_is_told_to_end_while_the_model_loads_ends_as_soon(app):
    app.end(signal.SIGKILL)
    app.start(wait=False)
    told_at = time.monotonic()
    assert app.end(signal.SIGTERM) == 0
    assert time.monotonic() - told_at < 5


def test_a_server_that_is_told_to_end_keeps_all_and_is_gone_in_five_seconds(app, open_page):
    page = open_page(app.url)
    begin(page)
    shown = watch_for(page, 1.0)[-1][1]
    told_at = time.monotonic()
    assert app.end(signal.SIGTERM) == 0
    assert time.monotonic() - told_at < 5
    assert app.damage() == "ok"
    app.start()
    expect(page.locator(".live .notice")).to_contain_text("Interrupted", timeout=WAIT_MS)
    stored = text_of(page)
    assert stored == chant(stored)
    assert len(stored) >= len(shown)
