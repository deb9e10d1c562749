"""Brook's page and API in front of a remote engine, which has neither a tokenizer nor token ids."""

import asyncio

import openai
import pytest
from gradio_client import Client

from streaming.engine.remote import RemoteEngine
from streaming.server.runs import Runs
from tests.fake_server import fake_server, streaming
from tests.serving import WAIT_S, serving
from tests.unit.test_ui_chat import Tab, settings


@pytest.fixture(scope="module")
def engine(url):
    far = RemoteEngine(f"{url}v1")
    assert far.wait_ready(WAIT_S)
    yield far
    far.close()


@pytest.fixture
def tab(engine):
    runs = Runs(engine)
    yield Tab(runs)
    runs.close()
    runs.store.close()


def test_a_conversation_goes_on_without_token_ids(tab):
    for text in ("one", "two"):
        asyncio.run(tab.ask(f"say: {text}"))
    assert tab.texts == ["say: one", "one", "say: two", "two"]
    assert {message.token_ids for message in tab.kept.messages.values()} == {()}


def test_a_reply_that_was_cut_goes_on_where_it_was(tab):
    asyncio.run(tab.ask("say: abcdef", max_new_tokens=3))
    assert tab.texts == ["say: abcdef", "abc"]

    async def go_on():
        await tab.do("resume", None, *settings())
        await tab.finish()

    asyncio.run(go_on())
    assert tab.texts == ["say: abcdef", "abcdef"]


@pytest.fixture
def gradio():
    """Connect to pages as gradio_client does, and let go of them at the end."""
    clients = []

    def connect(url: str) -> Client:
        clients.append(Client(url, verbose=False))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def test_reasoning_is_told_between_tags(gradio):
    with fake_server(streaming({"reasoning": "Hm."}, "Yes.")) as server:
        far = RemoteEngine(server.url)
        with serving(far) as url:
            assert gradio(url).predict("Well?", api_name="/chat") == "<think>\nHm.\n</think>\n\nYes."
        far.close()


def test_the_endpoints_and_the_api_speak_through_it(engine, gradio):
    with serving(engine) as url:
        client = gradio(url)
        assert client.predict("say: far", temperature=0, api_name="/chat") == "far"
        assert client.predict("one,", 5, 0, api_name="/complete") == "and s"
        with openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0) as api:
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "say: far"}]}
            answer = api.chat.completions.create(**ask, logprobs=True, top_logprobs=1)
            assert answer.choices[0].message.content == "far"
            assert [token.token for token in answer.choices[0].logprobs.content] == ["f", "a", "r"]
            with pytest.raises(openai.InternalServerError, match="tokens long but the model can read at most"):
                api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 9000}])
