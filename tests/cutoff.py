"""A proxy between a browser and a server: a cable that can be pulled, or fall silent as that of a sleeping phone."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator

CHUNK = 65536
SEND_S = 5.0
"""How long an end that takes nothing can hold up the others."""


class Cable:
    """What passes between the two; `url` is where the browser goes. One thread moves the bytes."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._peers: dict[socket.socket, socket.socket] = {}
        self._silent: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._ending = False
        self._is_cut = False
        self._thread = threading.Thread(target=self._move, name="brook-cable", daemon=True)
        self._thread.start()

    def silence(self) -> None:
        """Let nothing more through on the connections that there are, which stay open; new ones work."""
        with self._lock:
            self._silent |= set(self._peers)

    def cut(self) -> None:
        """Break every connection, and each new one until `mend()`."""
        with self._lock:
            self._is_cut = True
            for end in list(self._peers):
                self._hang_up(end)

    def mend(self) -> None:
        """Let new connections through again."""
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        self._ending = True
        self._thread.join(10)
        for end in (*self._peers, self._listener):
            end.close()
        self._selector.close()

    def _move(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(0.05):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                with self._lock:
                    if end is self._listener:
                        self._connect(end.accept()[0])
                    elif end in self._silent:
                        self._selector.unregister(end)
                    elif end in self._peers:
                        self._pass_on(end)

    def _connect(self, browser: socket.socket) -> None:
        if self._is_cut:
            browser.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), timeout=SEND_S)
        except OSError:
            browser.close()
            return
        browser.settimeout(SEND_S)
        self._peers |= {browser: server, server: browser}
        for end in (browser, server):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = end.recv(CHUNK)
        other = self._peers[end]
        with contextlib.suppress(OSError):
            other.sendall(data)
        if not data:
            self._hang_up(end)
            self._hang_up(other)

    def _hang_up(self, end: socket.socket) -> None:
        self._peers.pop(end, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(end)
        end.close()


@contextlib.contextmanager
def cable(server_port: int) -> Iterator[Cable]:
    made = Cable(server_port)
    try:
        yield made
    finally:
        made.close()
