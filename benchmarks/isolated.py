"""Peers in processes of their own.

Two libraries in one process share libgomp, and it stops spinning as soon as their pools together count more threads
than there are cores: llama.cpp runs at half its speed beside a model of PyTorch's.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 600

N_THREADS = 2
"""For every peer."""
BROOK_ENVIRONMENT = {
    # What `import streaming` sets when it comes before torch, as in the app; these modules import torch first.
    "GOMP_SPINCOUNT": "1000",
    # Brook measures at each start how many threads are best, and its model has a thread of its own.
    "OMP_NUM_THREADS": str(N_THREADS),
}


class Isolated:
    """A callable whose work is done in another process: `build()`, called there once, gives what each call runs.

    Arguments and results travel by pickle. `environment` is what the process finds set beside this one's variables,
    of which GOMP_SPINCOUNT, which importing Brook sets, is left out: peers run as they come.
    """

    def __init__(self, build: Callable[[], Callable[..., Any]], **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, theirs), daemon=True)
        with _environment(environment):
            self._process.start()
        theirs.close()

    def __call__(self, *arguments: Any) -> Any:
        self._connection.send(arguments)
        if not self._connection.poll(TIMEOUT_S):
            raise TimeoutError(f"A peer did not answer within {TIMEOUT_S} s.")
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(TIMEOUT_S)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop("GOMP_SPINCOUNT", None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(build: Callable[[], Callable[..., Any]], connection: Connection) -> None:
    run = build()
    while (arguments := connection.recv()) is not None:
        connection.send(run(*arguments))
