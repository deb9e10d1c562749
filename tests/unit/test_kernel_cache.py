"""A kernel that comes from the cache is the one that its sources, all of them, would give now."""

import ast
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from streaming.models import compiling, kernels, step_kernel
from streaming.models.compiling import compile_kernel

CALLED = """
from numba import njit

@njit
def number():
    return {number}
"""
OWN = """
import numpy as np
from numba import carray
from called_by_a_kernel import number

def write_number(address):
    carray(address, 1, np.int64)[0] = number()
"""


@pytest.fixture
def number_of(tmp_path, monkeypatch):
    """Write a kernel and what it calls, as a new process would find them, and give what the kernel says."""
    monkeypatch.syspath_prepend(tmp_path)

    def number(number: int) -> int:
        sources = {"called_by_a_kernel": CALLED.format(number=number), "with_a_kernel": OWN}
        for name, text in sources.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        function = importlib.import_module("with_a_kernel").write_number
        kernel = compile_kernel(function, [tmp_path / f"{name}.py" for name in sources])
        said = np.zeros(1, dtype=np.int64)
        kernel.ctypes(said.ctypes.data)
        return int(said[0]), kernel.cache_hits

    yield number
    for name in ("called_by_a_kernel", "with_a_kernel"):
        sys.modules.pop(name, None)


def test_it_is_compiled_once(number_of):
    assert [number_of(1), number_of(1)] == [(1, 0), (1, 1)]


def test_it_is_compiled_anew_when_what_it_calls_has_changed(number_of):
    assert [number_of(1), number_of(2), number_of(1)] == [(1, 0), (2, 0), (1, 1)]


def test_a_process_beside_one_that_has_not_kept_its_kernel_yet_gets_no_old_one(number_of, monkeypatch):
    assert number_of(1) == (1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", lambda *_: None)
        assert number_of(2) == (2, 0)
    assert number_of(2) == (2, 0)


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
def test_files_that_a_crash_has_cut_are_passed_over(number_of, tmp_path, pattern):
    number_of(1)
    for path in tmp_path.rglob(pattern):
        path.write_bytes(b"")
    assert number_of(1) == (1, 0)


def test_a_folder_that_cannot_be_written_is_done_without(number_of, tmp_path, monkeypatch):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert [number_of(1), number_of(1)] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("module", [kernels, step_kernel])
def test_all_that_goes_into_a_kernel_counts_as_its_sources(module):
    """Else an update of what is missing would go unnoticed."""
    counted = {*compiling.SOURCES, Path(module.__file__)}
    for source in counted:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streaming.models"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = {Path(kernels.__file__).with_name(f"{name.rpartition('.')[2]}.py") for name in names}
                assert {path for path in files if path.exists()} <= counted | {source.with_name("compiling.py")}
