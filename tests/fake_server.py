"""A server that answers with the bytes that a test tells it to: what servers elsewhere do, right or wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler"], None]
MODELS = {"object": "list", "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "x"}]}


class Handler(BaseHTTPRequestHandler):
    """Takes the requests down, and answers each with the next of the server's replies, the last of them for ever."""

    protocol_version = "HTTP/1.1"
    server: "FakeServer"

    def do_GET(self) -> None:
        self.answer(200, self.server.models)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(
            {"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}, **json.loads(body)}
        )
        replies = self.server.replies
        (replies.pop(0) if len(replies) > 1 else replies[0])(self)

    def answer(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        """Begin a stream, whose end is that of the connection."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()

    def send(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: Any = MODELS
        self.replies: list[Reply] = []
        self.asked: list[dict[str, Any]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that leaves is what tests are about

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def fake_server(*replies: Reply) -> Iterator[FakeServer]:
    server = FakeServer()
    server.replies = list(replies)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="brook-test-server")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def streaming(*deltas: Any, finish_reason: str | None = "stop", usage: Any = None) -> Reply:
    """Reply to a chat with deltas (text, or the object), a finish reason and counts, as servers do."""

    def reply(handler: Handler) -> None:
        handler.begin()
        for delta in deltas:
            delta = {"content": delta} if isinstance(delta, str) else delta
            handler.send(chunk({"index": 0, "delta": delta, "finish_reason": None}))
        if finish_reason:
            handler.send(chunk({"index": 0, "delta": {}, "finish_reason": finish_reason}))
        if usage:
            handler.send({**chunk(), "usage": usage})
        handler.send("[DONE]")

    return reply


def refusing(status: int, body: Any = b"", **headers: str) -> Reply:
    """Reply with an error."""
    return lambda handler: handler.answer(status, body, **headers)


def chunk(*choices: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "fake", "choices": list(choices)}
