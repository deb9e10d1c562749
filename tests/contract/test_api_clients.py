"""The API as the clients that people have see it: openai, huggingface_hub, curl."""

import asyncio
import functools
import json
import subprocess
import threading
import time
from contextlib import ExitStack, closing

import huggingface_hub
import openai
import pytest
from huggingface_hub import InferenceClient

from streaming.engine.batched import BatchedEngine
from streaming.engine.menu import ModelMenu
from streaming.models.llama_step import step_of
from streaming.server import api_errors, openai_api
from tests.packed import COMMON, murmuring_llama
from tests.scripted import LONG, LateEngine
from tests.serving import WAIT_S, ask, said, serving_api, wait_for, wait_free
from tests.tiny import loaded

MODEL = "tiny"


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


class TestOpenAI:
    def test_models(self, client):
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError, match="'other' is not served here; there is 'tiny'"):
            client.models.retrieve("other")

    def test_a_chat_in_one_piece(self, client):
        answer = client.chat.completions.create(model=MODEL, messages=said("say: hello"), temperature=0)
        [choice] = answer.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello", "stop")
        assert answer.object == "chat.completion"
        assert answer.usage.completion_tokens == 6
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6

    def test_heartbeats_between_tokens_are_no_events(self, client, monkeypatch):
        monkeypatch.setattr(openai_api, "HEARTBEAT_S", 0.005)
        stream = client.chat.completions.create(model=MODEL, messages=said("slow: hello"), temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello"

    def test_a_chat_as_a_stream(self, client):
        stream = client.chat.completions.create(
            model=MODEL,
            messages=said("say: Zwölf 🇩🇪!"),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, usage = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Zwölf 🇩🇪!"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk.id for chunk in [*chunks, usage]}) == 1
        assert all(chunk.usage is None for chunk in chunks)
        assert usage.choices == []
        assert usage.usage.completion_tokens == len("Zwölf 🇩🇪!".encode()) + 1

    def test_tokens_come_as_they_are_made(self, client, url):
        with client.chat.completions.create(model=MODEL, messages=said(LONG), stream=True) as stream:
            texts = (chunk.choices[0].delta.content for chunk in stream)
            assert next(text for text in texts if text) == "x"
            assert ask(f"{url}healthz")[1]["active"] == 1
        wait_free(url)

    def test_a_completion(self, client):
        answer = client.completions.create(model=MODEL, prompt="An increasing sequence: one,", temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("and so on", "stop")
        stream = client.completions.create(model=MODEL, prompt="one,", temperature=0, stream=True, max_tokens=5)
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "and s"
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_several_choices_and_prompts(self, client):
        answer = client.completions.create(model=MODEL, prompt=["one", "two"], n=2, temperature=0, max_tokens=3)
        assert [(choice.index, choice.text) for choice in answer.choices] == [(i, "and") for i in range(4)]
        one = client.completions.create(model=MODEL, prompt="one", temperature=0, max_tokens=3)
        assert answer.usage.prompt_tokens == 2 * one.usage.prompt_tokens
        assert answer.usage.completion_tokens == 4 * 3
        stream = client.chat.completions.create(model=MODEL, messages=said("say: abc"), n=3, stream=True)
        texts = {0: "", 1: "", 2: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == {0: "abc", 1: "abc", 2: "abc"}

    def test_logprobs_of_a_chat(self, client):
        def content(**options):
            answer = client.chat.completions.create(
                model=MODEL, messages=said("say: hé"), temperature=0, logprobs=True, **options
            )
            return answer.choices[0].logprobs.content

        tokens = content(top_logprobs=2)
        assert "".join(token.token for token in tokens) == "hé"
        assert [token.token for token in tokens] == ["h", "", "é"]  # é takes two tokens; the end is none of the text
        assert tokens[0].bytes == [104]
        assert [len(token.top_logprobs) for token in tokens] == [2, 2, 2]
        assert tokens[0].top_logprobs[0].token == "h"
        assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob < 0
        assert [token.top_logprobs for token in content()] == [[], [], []]

    def test_logprobs_of_a_completion_in_a_stream_are_those_of_the_whole(self, client):
        options = {"model": MODEL, "prompt": "one", "temperature": 0, "max_tokens": 4, "logprobs": 1}
        whole = client.completions.create(**options).choices[0].logprobs
        chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
        assert whole.tokens == ["a", "n", "d", " "]
        assert whole.text_offset == [0, 1, 2, 3]
        assert [text for part in chunks if part for text in part.tokens] == whole.tokens
        assert [offset for part in chunks if part for offset in part.text_offset] == whole.text_offset
        assert [list(top) for top in whole.top_logprobs] == [["a"], ["n"], ["d"], [" "]]

    def test_stop_strings_and_the_length_limit(self, client):
        def ended(**options):
            answer = client.chat.completions.create(model=MODEL, messages=said("say: one. two. three"), **options)
            return answer.choices[0].message.content, answer.choices[0].finish_reason

        assert ended(stop=".") == ("one", "stop")
        assert ended(stop=[" three", "zzz"]) == ("one. two.", "stop")
        assert ended(max_tokens=4) == ended(max_completion_tokens=4) == ("one.", "length")

    def test_text_parts_and_developer_messages(self, client):
        messages = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "say: "}, {"type": "text", "text": "both"}]},
        ]
        assert client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content == "both"

    def test_an_answer_goes_back_as_a_message(self, client):
        first = client.chat.completions.create(model=MODEL, messages=said("say: one"))
        messages = [*said("say: one"), first.choices[0].message, *said("say: two")]
        assert client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content == "two"

    def test_a_model_that_breaks_is_a_server_error_with_the_sentence(self, client):
        with pytest.raises(openai.InternalServerError, match="the scripted failure"):
            client.chat.completions.create(model=MODEL, messages=said("fail: abc"))

    def test_a_stream_that_breaks_says_so_after_what_there_was(self, client):
        texts = []
        stream = client.chat.completions.create(model=MODEL, messages=said("fail: in a stream"), stream=True)
        with pytest.raises(openai.APIError, match="the scripted failure"):
            texts.extend(chunk.choices[0].delta.content for chunk in stream)
        assert "".join(texts) == "in a stream"

    @pytest.mark.parametrize(
        ("options", "param", "says"),
        [
            ({"temperature": 9}, "temperature", "temperature must be between 0 and 5, not 9"),
            ({"max_tokens": 0}, "max_tokens", "max_tokens must be between 1 and"),
            ({"tools": [{"type": "function"}]}, "tools", "does not support tools"),
            ({"extra_body": {"top_kk": 1}}, "top_kk", "does not support top_kk"),
        ],
    )
    def test_what_cannot_be_done_is_named(self, client, options, param, says):
        with pytest.raises(openai.BadRequestError, match=says) as refused:
            client.chat.completions.create(model=MODEL, messages=said("say: x"), **options)
        assert refused.value.param == param

    def test_a_prompt_that_is_too_long_has_its_code(self, client):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL, prompt="x" * 9000)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, messages=[*said("y" * 9000), *said("say: x")])
        assert refused.value.code == "context_length_exceeded"

    def test_an_aborted_stream_frees_its_slot(self, client, url):
        stream = client.chat.completions.create(model=MODEL, messages=said(LONG), stream=True)
        next(iter(stream))
        assert ask(f"{url}healthz")[1]["active"] == 1
        stream.close()
        wait_free(url)

    def test_a_stream_aborted_while_it_waits_leaves_the_queue(self, client, url):
        running = client.chat.completions.create(model=MODEL, messages=said(LONG), stream=True)
        next(iter(running))
        waiting = client.chat.completions.create(model=MODEL, messages=said(LONG), stream=True)
        wait_for(lambda: ask(f"{url}healthz")[1]["queued"] == 1)
        waiting.close()
        wait_for(lambda: ask(f"{url}healthz")[1]["queued"] == 0)
        assert ask(f"{url}healthz")[1]["active"] == 1
        running.close()
        wait_free(url)

    def test_a_whole_answer_that_nobody_waits_for_frees_its_slot(self, client, url):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(model=MODEL, messages=said(LONG))
        wait_free(url)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_model_that_is_not_loaded_is_asked_again_when_it_is(self, stream, monkeypatch):
        monkeypatch.setitem(api_errors.RETRY_AFTER_S, 503, 0.05)
        release, statuses = threading.Event(), []
        menu = ModelMenu(lambda name, make_room: LateEngine(name, lambda: release.wait(WAIT_S)), ["first", "second"])

        def take_note(response):
            statuses.append((response.status_code, response.headers.get("retry-after")))
            release.set()
            menu.find("second").wait_ready(WAIT_S)

        with closing(menu), serving_api(menu) as url, ExitStack() as stack:
            stack.callback(release.set)
            http = openai.DefaultHttpxClient(event_hooks={"response": [take_note]})
            client = stack.enter_context(openai.OpenAI(base_url=f"{url}v1", api_key="none", http_client=http))
            answer = client.chat.completions.create(model="second", messages=said("say: hello"), stream=stream)
            chunks = list(answer) if stream else [answer]
            texts = [(choice.delta if stream else choice.message).content for c in chunks for choice in c.choices]
        assert "".join(filter(None, texts)) == "hello"
        assert statuses == [(503, "0.05"), (200, None)]

    def test_async_streams_at_once_do_not_mix(self, url):
        texts = [f"slow: reader {i} alone" for i in range(4)]

        async def read(client, text):
            stream = await client.chat.completions.create(model=MODEL, messages=said(text), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def all_of_them():
            async with openai.AsyncOpenAI(base_url=f"{url}v1", api_key="none", timeout=WAIT_S) as client:
                return await asyncio.gather(*(read(client, text) for text in texts))

        assert asyncio.run(all_of_them()) == [text.removeprefix("slow: ") for text in texts]

    def test_an_async_stream_that_is_cancelled_frees_its_slot(self, url):
        async def read_one_and_leave():
            async with openai.AsyncOpenAI(base_url=f"{url}v1", api_key="none", timeout=WAIT_S) as client:
                stream = await client.chat.completions.create(model=MODEL, messages=said(LONG), stream=True)
                async with stream:
                    async for chunk in stream:
                        if chunk.choices[0].delta.content:
                            return chunk.choices[0].delta.content
            return None

        assert asyncio.run(read_one_and_leave()) == "x"
        wait_free(url)


class TestManyAtOnce:
    """Choices that share a batch, of a model whose steps are compiled."""

    @pytest.fixture
    def batched(self):
        engine = BatchedEngine(lambda progress: loaded(murmuring_llama(), n_context=COMMON["max_position_embeddings"]))
        with closing(engine):
            assert engine.wait_ready(WAIT_S)
            yield engine

    @pytest.fixture
    def create(self, batched):
        with (
            serving_api(batched) as url,
            openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0, timeout=WAIT_S) as client,
        ):
            yield functools.partial(client.chat.completions.create, model=MODEL, messages=said("Hello"))

    def test_each_choice_says_what_a_request_of_its_own_with_the_next_seed_says(self, create):
        options = {"max_tokens": 40, "temperature": 1.0}
        alone = [create(seed=seed, **options).choices[0].message.content for seed in (5, 6)]
        assert len(set(alone)) == 2
        texts = ["", ""]
        for chunk in create(seed=5, n=2, stream=True, **options):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == alone
        assert [choice.message.content for choice in create(seed=5, n=2, **options).choices] == alone

    def test_an_aborted_stream_of_two_choices_frees_both_seats(self, create, batched, monkeypatch):
        step, runs, submit = step_of(batched._loaded.model), [], batched.submit
        read = step.read
        monkeypatch.setattr(step, "read", lambda *arguments: (time.sleep(0.01), read(*arguments))[1])
        monkeypatch.setattr(batched, "submit", lambda request: runs.append(submit(request)) or runs[-1])
        with create(n=2, stream=True) as stream:
            begun = set()
            while begun != {0, 1}:
                begun |= {choice.index for choice in next(stream).choices if choice.delta.content}
            assert batched.status().n_active == 2
        assert [run.result(WAIT_S).finish.reason for run in runs] == ["cancelled"] * 2
        assert (batched.status().n_active, batched._batch.n_runs) == (0, 0)


class TestHuggingFaceHub:
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch):
        """The hub's client sends nothing at all, not even to this machine, while it is told to be offline."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def test_chat_completion_streams_and_does_not(self, url):
        client = InferenceClient(base_url=f"{url}v1", api_key="none", timeout=WAIT_S)
        answer = client.chat_completion(said("say: hello"), max_tokens=20)
        assert answer.choices[0].message.content == "hello"
        stream = client.chat_completion(said("say: hello"), max_tokens=20, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello"

    def test_it_names_the_model_in_openais_way(self, url):
        client = InferenceClient(base_url=f"{url}v1", api_key="none", timeout=WAIT_S)
        answer = client.chat.completions.create(model=MODEL, messages=said("say: hello"), seed=3, stop=["l"])
        assert answer.choices[0].message.content == "he"


class TestCurl:
    def test_a_stream_ends_with_done(self, url):
        body = json.dumps({"model": MODEL, "messages": said("say: ab"), "stream": True})
        done = subprocess.run(
            ["curl", "-sNi", f"{url}v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        head, _, rest = done.stdout.replace("\r", "").partition("\n\n")
        headers = {line.lower() for line in head.split("\n")}
        assert {"x-accel-buffering: no", "cache-control: no-cache"} <= headers
        assert "content-type: text/event-stream; charset=utf-8" in headers
        frames = [frame.split("\n") for frame in rest.strip().split("\n\n")]
        assert frames[-1] == ["data: [DONE]"]
        ids = [frame[0].removeprefix("id: ") for frame in frames if frame[0].startswith("id: ")]
        assert [id.partition(":")[2] for id in ids] == ["1", "2", "4"]
        deltas = [json.loads(frame[-1].removeprefix("data: "))["choices"][0]["delta"] for frame in frames[:-1]]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]

    def test_a_killed_one_frees_its_slot(self, url):
        body = json.dumps({"model": MODEL, "messages": said(LONG), "stream": True})
        curl = subprocess.Popen(["curl", "-sN", f"{url}v1/chat/completions", "-d", body], stdout=subprocess.PIPE)
        assert curl.stdout.readline().startswith(b"data: ")
        assert ask(f"{url}healthz")[1]["active"] == 1
        curl.kill()
        curl.wait(WAIT_S)
        curl.stdout.close()
        wait_free(url)
