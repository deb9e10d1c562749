"""What makes a program of Brook's own start sooner, and leaner."""

import contextlib
import ctypes
import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector off while modules and the model load, and what they made out of its later sight.

    Imports make some million objects that stay for ever. Python's collector looks through all of them each time
    their number has grown by a quarter: 1.3 s of a start, and afterwards tens of milliseconds in the midst of a reply.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def without_type_stubs() -> Iterator[None]:
    """Keep gradio, while it is imported, from parsing its components' sources to write type stubs: 0.7 s of a start.

    It leaves out classes whose file is not found (gradio 6.31, `component_meta.create_or_modify_pyi`).
    """
    find = inspect.getfile

    def find_no_components(what: Any) -> str:
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError("its stubs are there already, or nobody needs them")
        return find(what)

    inspect.getfile = find_no_components  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = find


def give_back_memory() -> None:
    """Give memory that was freed back to the system, which glibc by itself keeps for later: 150 MB after a first start.

    Elsewhere (macOS, Windows, musl) allocators do it by themselves, or cannot be told to.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
