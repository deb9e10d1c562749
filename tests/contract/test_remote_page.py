"""Brook's page and API in front of a remote engine, which has neither a tokenizer nor token ids."""

import openai
import pytest
from gradio_client import Client

from streaming.engine.remote import RemoteEngine
from tests.fake_server import fake_server, streaming
from tests.scripted import ScriptedEngine
from tests.serving import WAIT_S, serving


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine()
    engine.wait_ready(WAIT_S)
    with serving(engine) as url:
        far = RemoteEngine(f"{url}v1")
        yield far
        far.close()
    engine.close()


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
