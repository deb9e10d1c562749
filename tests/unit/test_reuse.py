"""Later turns: what is read once is not read again, and the words stay the same."""

import random
import threading

import pytest

from streaming import GenerationRequest
from streaming.chat import encode_opening
from streaming.engine.batched import BatchedEngine
from streaming.engine.local import LocalEngine
from tests.packed import WITH_STEP, pack_model, random_model
from tests.serving import wait_for
from tests.tiny import N_CONTEXT, loaded, tiny_llama

N_CONVERSATIONS, N_TURNS, WAIT_S = 40, 10, 60


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngine(lambda _: loaded(tiny_llama()))
    yield engine
    engine.close()


@pytest.mark.parametrize("number", range(N_CONVERSATIONS))
def test_a_conversation_says_the_same_with_and_without_reuse(engine, number):
    chance = random.Random(number)
    ids: list[int] = []
    for turn in range(N_TURNS):
        if turn and chance.random() < 0.2:  # the last turn is edited
            del ids[-chance.randint(1, 8) :]
        ids += [chance.randrange(256) for _ in range(chance.randint(1, 30))]
        options = {"prompt_ids": tuple(ids), "max_new_tokens": chance.randint(1, 12), "temperature": 0}
        reused = engine.submit(GenerationRequest(**options, owner=f"me {number}")).result(WAIT_S)
        fresh = engine.submit(GenerationRequest(**options, owner=f"{number}, {turn}")).result(WAIT_S)
        assert reused.token_ids == fresh.token_ids
        assert fresh.finish.n_reused_tokens == 0
        assert (reused.finish.n_reused_tokens > 0) == (turn > 0)
        ids += reused.token_ids


@pytest.mark.parametrize("kind", [LocalEngine, BatchedEngine])
def test_what_stands_between_a_reply_and_the_next_message_is_read_while_nobody_waits(kind):
    models = [loaded(pack_model(random_model(WITH_STEP["llama"]))) for _ in range(2)]
    engine, fresh = (kind(lambda _, model=model: model) for model in models)
    options = {"max_new_tokens": 12, "temperature": 0}
    messages, n_prepared = [], 0
    for turn in range(4):
        messages.append({"role": "user", "content": f"and {turn}?"})
        run = engine.submit(GenerationRequest(messages=messages, **options, owner="me"))
        result = run.result(WAIT_S)
        again = fresh.submit(GenerationRequest(prompt_ids=run.prompt_ids, **options, owner=str(turn)))
        assert result.token_ids == again.result(WAIT_S).token_ids
        assert result.finish.n_reused_tokens == n_prepared
        ids = result.token_ids[: -1 if result.finish.reason == "stop" else None]
        messages.append({"role": "assistant", "content": result.text, "token_ids": ids})
        opening = encode_opening(engine.tokenizer, messages, N_CONTEXT)
        wait_for(lambda opening=opening: opening in [entry.ids for entry in engine._reading.prefixes._entries])
        n_prepared = len(opening)
        assert n_prepared > len(run.prompt_ids) + len(ids)
    for each in (engine, fresh):
        each.close()


def test_a_turn_that_cannot_be_prepared_is_read_when_it_comes(monkeypatch):
    engine = LocalEngine(lambda _: loaded(pack_model(random_model(WITH_STEP["llama"]))))
    engine.wait_ready(WAIT_S)
    tried = threading.Event()

    def fail(*_: object) -> None:
        tried.set()
        raise MemoryError

    monkeypatch.setattr("streaming.engine.reading.read", fail)
    for question in ("one?", "two?"):
        request = GenerationRequest(messages=[{"role": "user", "content": question}], max_new_tokens=4, temperature=0)
        result = engine.submit(request).result(WAIT_S)
        assert (result.finish.reason, len(result.token_ids)) == ("length", 4)
        assert tried.wait(WAIT_S)
        tried.clear()
    engine.close()
