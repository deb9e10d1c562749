"""The default model behind the engine says what it says alone."""

import os

import pytest
import torch

from streaming import GenerationRequest, load_engine
from streaming.errors import ModelUnavailable
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.model
WAIT_S = 240

SEED_PROMPT = "An increasing sequence: one,"
SEED_CONTINUATION = " two, three, four, five, six, seven, eight, nine, ten, eleven,"

LONG_PROMPT = " ".join(
    f"In the year {1900 + i}, the {i}th keeper of the lighthouse wrote about {word} and the sea."
    for i, word in enumerate(["fog", "gulls", "lamps", "storms", "ropes", "letters", "salt", "tides"] * 4)
)


@pytest.fixture(scope="module")
def engine():
    try:
        engine = load_engine(dtype="float32", quantize="none")
    except ModelUnavailable as error:
        skip_or_fail(f"the default model is not here: {error}")
    yield engine
    engine.close()


def test_the_seed_prompt_continues_as_the_seed_says(engine):
    run = engine.submit(GenerationRequest(prompt=SEED_PROMPT, max_new_tokens=20, temperature=0))
    assert run.result(WAIT_S).text == SEED_CONTINUATION


def test_it_answers_a_chat(engine):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    run = engine.submit(GenerationRequest(messages=messages, max_new_tokens=40, temperature=0))
    result = run.result(WAIT_S)
    assert "Paris" in result.text
    assert result.finish.error is None


@pytest.mark.parametrize(
    ("prompt", "n_tokens"), [(SEED_PROMPT, 40), (LONG_PROMPT, 24), ("Once upon a time, 昔々 🌊 there was", 40)]
)
def test_greedy_ids_equal_generate_alone_also_where_the_prompt_is_read_in_chunks(engine, prompt, n_tokens):
    run = engine.submit(GenerationRequest(prompt=prompt, max_new_tokens=n_tokens, temperature=0))
    ids = torch.tensor([run.prompt_ids])
    through_brook = run.result(WAIT_S).token_ids  # then the engine is idle, and the model is free to be used here
    model = engine._require_loaded().model
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False)
    assert through_brook == alone[0, ids.shape[1] :].tolist()
    if prompt is LONG_PROMPT:
        assert ids.shape[1] > 2 * 256


def test_later_turns_reuse_what_was_read_and_say_the_same(engine):
    messages = []
    for turn, question in enumerate(["Name three fruits.", "Which is the sweetest?", "And the cheapest?"]):
        messages.append({"role": "user", "content": question})
        request = GenerationRequest(messages=messages, max_new_tokens=24, temperature=0, owner="me")
        run = engine.submit(request)
        result = run.result(WAIT_S)
        fresh = engine.submit(
            GenerationRequest(prompt_ids=run.prompt_ids, max_new_tokens=24, temperature=0, owner=f"other {turn}")
        ).result(WAIT_S)
        assert result.token_ids == fresh.token_ids
        if turn == 0:
            n_opening = result.finish.n_reused_tokens
            start = engine.tokenizer.decode(run.prompt_ids[:n_opening])
            assert start.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
            assert start.endswith("<|im_end|>\n<|im_start|>user\n")
        assert fresh.finish.n_reused_tokens == n_opening
        assert (result.finish.n_reused_tokens > n_opening) == (turn > 0)
        ids = [i for i in result.token_ids if i != engine.tokenizer.eos_token_id]
        messages.append({"role": "assistant", "content": result.text, "token_ids": ids})


TOPICS = ["lighthouses", "bread", "comets", "chess", "rivers", "clocks", "bees", "maps", "salt", "glass"]
QUESTIONS = [
    "Tell me about {}.", "Why?", "Who says so?", "Give an example.", "And the opposite?",
    "In one word?", "What came before?", "What comes next?", "Is that sure?", "Sum it up.",
]  # fmt: skip
N_CONVERSATIONS = int(os.environ.get("BROOK_CONVERSATIONS", "2"))
"""The rest of 40 is done by a tiny model (tests/unit/test_reuse.py); on a quiet machine 40 take ten minutes:
`BROOK_CONVERSATIONS=40 pytest tests/model -k conversations --timeout 3600`."""


@pytest.mark.parametrize("number", range(N_CONVERSATIONS))
def test_conversations_of_ten_turns_say_the_same_with_and_without_reuse(engine, number):
    messages = []
    for turn, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question.format(TOPICS[number % 10] + "!" * (number // 10))})
        request = GenerationRequest(messages=messages, max_new_tokens=6, temperature=0, owner=f"me {number}")
        run = engine.submit(request)
        result = run.result(WAIT_S)
        fresh = engine.submit(
            GenerationRequest(prompt_ids=run.prompt_ids, max_new_tokens=6, temperature=0, owner=f"{number}.{turn}")
        ).result(WAIT_S)
        assert result.token_ids == fresh.token_ids
        if turn == 0:
            n_opening = fresh.finish.n_reused_tokens
        assert (result.finish.n_reused_tokens > n_opening) == (turn > 0)
        ids = [i for i in result.token_ids if i != engine.tokenizer.eos_token_id]
        messages.append({"role": "assistant", "content": result.text, "token_ids": ids})
