"""The engine that is made in the background is the engine, a little later."""

import threading
import traceback

import pytest

from streaming.engine.base import GenerationRequest
from streaming.engine.deferred import DeferredEngine
from streaming.engine.local import LocalEngine
from streaming.errors import ModelNotFound, ModelUnavailable
from tests.tiny import loaded, tiny_llama

WAIT_S = 30


def test_requests_wait_until_it_is_made_and_then_it_is_the_engine():
    go = threading.Event()

    def make() -> LocalEngine:
        assert go.wait(WAIT_S)
        return LocalEngine(lambda progress: loaded(tiny_llama()), "tiny")

    engine = DeferredEngine(make, "local", "later")
    engine.start()
    assert (engine.kind, engine.model_id, engine.status().state) == ("local", "later", "loading")
    assert engine.wait_ready(0.01) is False
    go.set()
    run = engine.submit(GenerationRequest(prompt="hello", max_new_tokens=5, temperature=0))
    assert len(run.result(WAIT_S).token_ids) == 5
    assert engine.wait_ready(WAIT_S)
    assert (engine.model_id, engine.status().state) == ("tiny", "ready")
    assert engine.tokenizer.decode([65]) == "b"
    assert engine.defaults.temperature == 0.0
    engine.close()
    assert engine.status().state == "closed"


@pytest.mark.parametrize(
    "error", [ModelNotFound("There is no such model."), RuntimeError("no torch"), SystemExit("no more")]
)
def test_a_failure_reaches_whoever_asks_each_in_a_copy_of_its_own(error):
    def make() -> LocalEngine:
        raise error

    engine = DeferredEngine(make, "local", "later")
    engine.start()
    told = []
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match=str(error)) as refused:
            engine.wait_ready(WAIT_S)
        told.append(refused.value)
    assert len({id(one) for one in told}) == 3, "what each raises would hold the frames of all"
    assert {type(one) for one in told} <= {type(error), ModelUnavailable}
    assert len({len(traceback.extract_tb(one.__traceback__)) for one in told}) == 1
    with pytest.raises(ModelUnavailable):
        engine.submit(GenerationRequest(prompt="hello"))
    assert engine.status().state == "failed"
    engine.close()


def test_closing_before_the_start_is_fine():
    engine = DeferredEngine(lambda: pytest.fail("never made"), "local", "later")
    engine.close()
    assert engine.status().state == "closed"
