"""The API over the default model, asked with OpenAI's own client."""

import openai
import pytest

from streaming import load_engine
from streaming.errors import ModelUnavailable
from tests.conftest import skip_or_fail
from tests.serving import serving

pytestmark = pytest.mark.model
WAIT_S = 240


@pytest.fixture(scope="module")
def client():
    try:
        engine = load_engine()
    except ModelUnavailable as error:
        skip_or_fail(f"the default model is not here: {error}")
    with (
        serving(engine) as url,
        openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0, timeout=WAIT_S) as client,
    ):
        yield client
    engine.close()


def test_the_seed_prompt_continues_as_the_seed_says(client):
    [model] = client.models.list()
    answer = client.completions.create(
        model=model.id, prompt="An increasing sequence: one,", max_tokens=20, temperature=0, logprobs=2
    )
    assert answer.choices[0].text == " two, three, four, five, six, seven, eight, nine, ten, eleven,"
    assert answer.choices[0].finish_reason == "length"
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text


def test_a_streamed_chat_is_the_whole_one_and_later_turns_are_reused(client):
    [model] = client.models.list()
    ask = {
        "model": model.id,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    *chunks, usage = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in text
    assert text == whole.choices[0].message.content
    assert usage.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_penalties_keep_it_from_repeating_itself(client):
    [model] = client.models.list()

    def n_different(**options):
        answer = client.completions.create(
            model=model.id, prompt="la la la la la la", max_tokens=30, temperature=0, logprobs=0, **options
        )
        return len(set(answer.choices[0].logprobs.tokens))

    assert n_different(frequency_penalty=2, presence_penalty=2) > n_different()
