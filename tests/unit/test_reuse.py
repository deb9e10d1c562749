"""Forty conversations of ten turns say the same with what was read before and without."""

import random

import pytest

from streaming import GenerationRequest
from streaming.engine.local import LocalEngine
from tests.tiny import loaded, tiny_llama

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
