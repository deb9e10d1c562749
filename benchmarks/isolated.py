"""Peers in processes of their own.

Two libraries in one process share libgomp, and it stops spinning as soon as their pools together count more threads
than there are cores: llama.cpp runs at half its speed beside a model of PyTorch's.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

TIMEOUT_S = 600


class Isolated:
    """A callable whose work is done in another process: `build()`, called there once, gives what each call runs."""

    def __init__(self, build: Callable[[], Callable[[], float]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> float:
        self._connection.send(True)
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError(f"A peer did not answer within {TIMEOUT_S} s.")
        return float(self._connection.recv())

    def close(self) -> None:
        self._connection.send(False)
        self._process.join(TIMEOUT_S)


def _serve(build: Callable[[], Callable[[], float]], connection: Connection) -> None:
    run = build()
    while connection.recv():
        connection.send(run())
