"""A streamer that sends events over a TCP or Unix socket."""

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Sequence
from typing import Any

from streaming.errors import StreamerMisuse
from streaming.events import Event, PromptEvent
from streaming.streamers.base import EventStreamer, event_json

logger = logging.getLogger(__name__)

Address = tuple[str, int] | str | os.PathLike[str]


class SocketStreamer(EventStreamer):
    """Send events as JSON lines to whoever listens at `address`: `(host, port)`, or the path of a Unix socket.

    Each `generate()` makes a connection of its own, which a thread serves: generation never waits for the peer. A
    peer that is not there, goes away, or is `n_buffered` events behind is dropped: the reason is logged and kept in
    `dropped`. `end()` waits for the rest to be sent, at most `timeout` seconds.
    """

    def __init__(
        self,
        tokenizer: Any,
        address: Address,
        skip_prompt: bool = False,
        timeout: float = 5.0,
        *,
        n_buffered: int = 1024,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, eos_token_id=eos_token_id, **decode_kwargs)
        if not isinstance(address, tuple) and not hasattr(socket, "AF_UNIX"):
            raise StreamerMisuse("This system has no Unix sockets; give (host, port).")
        self.address = address
        self.dropped: str | None = None
        self._timeout = timeout
        self._n_buffered = n_buffered
        self._sender: _Sender | None = None

    def on_start(self, n_rows: int) -> None:
        self.dropped = None
        self._sender = _Sender(self.address, self._timeout, self._n_buffered)

    def on_prompt(self, row: int, text: str) -> None:
        self._send(row, PromptEvent(text))

    def on_event(self, row: int, event: Event) -> None:
        self._send(row, event)

    def on_end(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self.dropped, self._sender = self._sender.dropped, None

    def _send(self, row: int, event: Event | PromptEvent) -> None:
        if self._sender is not None:
            self._sender.send(event_json(event, row if self._n_rows > 1 else None))
            self.dropped = self._sender.dropped


class _Sender:
    """One connection and its thread."""

    def __init__(self, address: Address, timeout: float, n_buffered: int) -> None:
        self.dropped: str | None = None
        self._address = address
        self._timeout = timeout
        self._lines: queue.Queue[str | None] = queue.Queue(n_buffered)
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._work, name="brook-socket", daemon=True)
        self._thread.start()

    def send(self, line: str) -> None:
        """Leave a line to be sent, without waiting."""
        if self.dropped is not None:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._drop(f"it is {self._lines.maxsize} events behind")

    def close(self) -> None:
        """Send what is left, then close the connection and join the thread."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=self._timeout)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            self._drop(f"it did not read the rest within {self._timeout:g} s")
            self._thread.join(self._timeout)  # connecting and sending take no longer

    def _work(self) -> None:
        try:
            with self._connect() as self._socket:
                while self.dropped is None and (line := self._lines.get()) is not None:
                    self._socket.sendall(line.encode() + b"\n")
        except OSError as error:
            self._drop(str(error) or type(error).__name__)

    def _connect(self) -> socket.socket:
        if isinstance(self._address, tuple):
            return socket.create_connection(self._address, self._timeout)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(self._timeout)
        try:
            connection.connect(os.fspath(self._address))
        except OSError:
            connection.close()
            raise
        return connection

    def _drop(self, reason: str) -> None:
        if self.dropped is not None:
            return
        self.dropped = reason
        logger.warning("The peer at %s was dropped: %s", self._address, reason)
        with contextlib.suppress(OSError, queue.Full):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread from sending
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)  # or from waiting for lines
