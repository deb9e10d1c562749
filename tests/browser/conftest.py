"""A served page on a scripted engine, and Chromium to look at it."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streaming.server.runs import Runs
from streaming.settings import Settings
from streaming.ui.build import build_app, launch_app
from tests.conftest import skip_or_fail
from tests.scripted import ScriptedEngine

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 60_000


def serve(engine: Any, runs: Runs | None = None) -> tuple[Any, str]:
    """Serve the page for an engine on a free port of this machine; give the app and its address."""
    app = build_app(engine, runs)
    url, _ = launch_app(app, engine, Settings(port=0))
    return app, url


@pytest.fixture(scope="session")
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def runs(engine: ScriptedEngine) -> Iterator[Runs]:
    runs = Runs(engine)
    yield runs
    runs.close()
    runs.store.close()


@pytest.fixture(scope="session")
def url(engine: ScriptedEngine, runs: Runs) -> Iterator[str]:
    app, url = serve(engine, runs)
    yield url
    app.close()


@pytest.fixture
def short_grace(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replies that nobody watches go on for a moment only."""
    monkeypatch.setattr(runs, "_grace_s", 1.0)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if not os.path.exists(CHROMIUM):
        skip_or_fail(f"{CHROMIUM} is not there; install Debian's chromium to run the browser tests.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Open the page in a context of its own: another person's browser."""
    contexts = []

    def open_page(address: str = url, **options: Any) -> Any:
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.seen_errors = []
        page.on("pageerror", lambda error: page.seen_errors.append(str(error)))
        page.on("console", lambda m: page.seen_errors.append(m.text) if m.type == "error" else None)
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(address)
        page.wait_for_selector("#status-line", state="attached")
        page.wait_for_selector(".conversation", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()
