"""The garbage collector rests while a program starts, and what was freed goes back; gradio writes no stubs."""

import gc
import platform
import subprocess
import sys

import pytest

from streaming.startup import collector_paused, give_back_memory


@pytest.fixture(autouse=True)
def frozen_objects_thaw():
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_rests_inside_and_works_again_after():
    with collector_paused():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(made), "what was made meanwhile is looked at no more"


def test_it_works_again_after_an_error_too():
    with pytest.raises(ZeroDivisionError), collector_paused():
        _ = 1 / 0
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


FREE = """
import psutil
from streaming.startup import give_back_memory
rss_mb = lambda: psutil.Process().memory_info().rss / 1e6
made = [bytes(50_000) for _ in range(4000)]  # small enough to come from the heap
kept = made[::400] + [bytes(10)]
del made
before = rss_mb()
give_back_memory()
print(before - rss_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left to themselves")
def test_what_was_freed_goes_back_to_the_system():
    freed_mb = float(subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True).stdout)
    assert freed_mb > 100


def test_an_allocator_that_cannot_be_told_is_left_to_itself(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    give_back_memory()


PARSE = """
import ast, contextlib, sys
from streaming.startup import without_type_stubs
parse, parsed = ast.parse, []
ast.parse = lambda source, *more, **named: parsed.append(source) or parse(source, *more, **named)
with without_type_stubs() if sys.argv[1:] else contextlib.nullcontext():
    import gradio
print(sum("(Component" in str(source) or "(FormComponent" in str(source) for source in parsed))
import inspect
assert inspect.getfile(gradio.Textbox).endswith("textbox.py")
"""


@pytest.mark.parametrize(("arguments", "parses"), [(["without"], False), ([], True)])
def test_gradio_parses_none_of_its_components_while_stubs_are_off(arguments, parses):
    """It may find another way in another version: then `without_type_stubs` is of no use any more."""
    command = [sys.executable, "-c", PARSE, *arguments]
    n_parsed = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (n_parsed > 0) == parses
