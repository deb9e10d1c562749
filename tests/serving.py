"""Brook's page with its API on a free port of this machine, and ways to ask it without any client library."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from streaming.engine.menu import ModelMenu
from streaming.server.routes import meter
from streaming.server.runs import Runs
from streaming.settings import Settings
from streaming.ui.build import build_app, launch_app

WAIT_S = 30


@contextmanager
def serving(engine: Any, **options: Any) -> Iterator[str]:
    """Serve an engine; give the address, with a slash at its end."""
    settings = Settings(port=0, **options)
    menu = _menu_of(engine)
    metered, routes = meter(menu, settings)
    runs = Runs(metered, menu=menu)
    app = build_app(metered, runs)
    url, _ = launch_app(app, metered, settings, routes)
    try:
        yield url
    finally:
        app.close()
        runs.close()
        runs.store.close()


@contextmanager
def serving_api(engine: Any) -> Iterator[str]:
    """Serve an engine's API without a page, which is there within milliseconds; give the address as `serving` does."""
    _, routes = meter(_menu_of(engine), Settings())
    # uvicorn looks for the port itself: sockets made elsewhere lack TCP_NODELAY, and each frame would wait for 40 ms.
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, name="brook-test-server")
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)


def _menu_of(engine: Any) -> ModelMenu:
    return engine if isinstance(engine, ModelMenu) else ModelMenu.of(engine)


def said(text: str) -> list[dict[str, str]]:
    """Give a chat of one message."""
    return [{"role": "user", "content": text}]


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Send a body as JSON, or GET without one; give the status and what came back, read as JSON where it is."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, {"content-type": "application/json", **names})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def wait_free(url: str) -> None:
    """Wait until nothing runs or waits behind an address."""
    wait_for(lambda: (lambda health: health["active"] == health["queued"] == 0)(ask(f"{url}healthz")[1]))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, and fail when it never does."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.01)
