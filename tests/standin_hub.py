"""A stand-in for the hub on the loopback: the few routes that fetching a model needs, served from folders."""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandinHub(ThreadingHTTPServer):
    """Serve `models` ({id: folder}); `gated` ids give no files, and while `status` is set every answer is that."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.status = 0
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandinHub

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        path = self.path.partition("?")[0]
        if self.server.status:
            return self._answer(b"", self.server.status)
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)(/revision/\w+|/tree/\w+)?", path):
            return self._describe(*match.groups())
        if match := re.fullmatch(r"/([\w-]+/[\w.-]+)/resolve/\w+/([\w.-]+)", path):
            return self._give(*match.groups())
        return self._answer(b"", 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _describe(self, model_id: str, route: str | None) -> None:
        if model_id not in self.server.models:
            return self._answer(b"", 401, {"X-Error-Code": "RepoNotFound"})
        files = sorted(self.server.models[model_id].iterdir())
        if route and route.startswith("/tree"):
            listing = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)} for file in files
            ]
            return self._answer(json.dumps(listing).encode())
        info = {"id": model_id, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
        return self._answer(json.dumps(info).encode())

    def _give(self, model_id: str, name: str) -> None:
        if model_id in self.server.gated:
            return self._answer(b"", 403, {"X-Error-Code": "GatedRepo"})
        file = self.server.models[model_id] / name
        if not file.is_file():
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._answer(file.read_bytes(), 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"'})

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[StandinHub]:
    with StandinHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(10)


def point_hub_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Make `url` the hub and `cache` its cache, as HF_ENDPOINT and HF_HUB_CACHE do where they are set at the start."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextlib.contextmanager
def refusing_url() -> Iterator[str]:
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def silent_url() -> Iterator[str]:
    """The address of a server that takes a connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def swallowing_url() -> Iterator[str]:
    """The address of a port that drops whoever knocks, as a dead network does: its queue is full (Linux)."""
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            knock = sockets.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
