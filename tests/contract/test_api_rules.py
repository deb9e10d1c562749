"""Who may ask the API, what it says to whom it refuses, and how a stream is read on after a lost connection."""

import http.client
import json
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from streaming.engine import menu_model
from streaming.engine.base import EngineStatus, Generation, GenerationRequest
from streaming.engine.menu import ModelMenu
from streaming.errors import ModelUnavailable
from streaming.events import FinishEvent
from streaming.log import EventLog
from streaming.server import openai_api
from tests.scripted import LONG, LateEngine, ScriptedEngine
from tests.serving import WAIT_S, ask, said, serving, serving_api, wait_for, wait_free
from tests.tiny import ScriptedModel, loaded

KEYS = ("sk-first-key", "sk-second-key")


def chat(text: str, **options) -> dict:
    return {"messages": said(text), **options}


@pytest.fixture(scope="module")
def keyed_url(scripted):
    with serving(scripted, api_key=KEYS, auth=(("ann", "password"),)) as url:
        yield url


class Stream:
    """A connection that reads frames one by one, and can be cut."""

    def __init__(self, url: str, body: dict, **headers: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("POST", "/v1/chat/completions", json.dumps({"stream": True, **body}), names)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200

    def __iter__(self):
        return self

    def __next__(self) -> tuple[str, str]:
        """Give a frame's id and data; a comment's text as data with the id ":"."""
        id, data = "", ""
        while (line := self.answer.readline().decode()) not in ("\n", ""):
            name, _, value = line.rstrip("\n").partition(": ")
            if not name:
                return ":", value
            id, data = (value, data) if name == "id" else (id, value)
        if not line:
            raise StopIteration
        return id, data

    def cut(self) -> None:
        self.answer.close()
        self.connection.close()


def text_of(frames) -> str:
    chunks = [json.loads(data) for _, data in frames if data.startswith("{")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


class TestWithoutAKey:
    def test_this_machine_may_ask(self, url):
        assert ask(f"{url}v1/models")[0] == 200
        assert ask(f"{url}v1/models", origin=url.rstrip("/"))[0] == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"x_forwarded_for": "127.0.0.1"},
            {"x_forwarded_proto": "https"},
            {"forwarded": "for=127.0.0.1"},
            {"via": "1.1 proxy"},
            {"x_real_ip": "127.0.0.1"},
            {"host": "brook.example"},
            {"host": "brook.example:7860"},
            {"host": "10.0.0.1"},
            {"host": "[::1"},
            {"origin": "http://brook.example"},
            {"origin": "http://localhost:1"},
            {"origin": "null"},
        ],
    )
    def test_a_proxy_and_a_page_of_another_origin_may_not(self, url, scripted, headers):
        n_before = scripted.model.n_forwards
        status, body = ask(f"{url}v1/chat/completions", chat("say: x"), **headers)
        assert status == 403
        assert body["error"]["code"] == "api_closed"
        assert ask(f"{url}v1/models", **headers)[0] == 403
        assert scripted.model.n_forwards == n_before

    def test_a_public_page_lets_nobody_in(self, scripted):
        with serving(scripted, space=True) as url:
            status, body = ask(f"{url}v1/models")
        assert (status, body["error"]["type"]) == (403, "permission_error")
        assert "start Brook with --api-key" in body["error"]["message"]


class TestWithKeys:
    @pytest.mark.parametrize("key", KEYS)
    def test_any_of_them_opens_it_from_everywhere_whatever_the_page_asks_of_people(self, keyed_url, key):
        headers = {"authorization": f"Bearer {key}", "origin": "https://brook.example", "x_forwarded_for": "1.2.3.4"}
        status, body = ask(f"{keyed_url}v1/chat/completions", chat("say: x"), **headers)
        assert (status, body["choices"][0]["message"]["content"]) == (200, "x")

    @pytest.mark.parametrize(
        "authorization", ["", "Bearer", "Bearer sk-first", f"Basic {KEYS[0]}", KEYS[0], "Bearer é"]
    )
    def test_no_other_does(self, keyed_url, authorization):
        status, body = ask(f"{keyed_url}v1/models", authorization=authorization)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert KEYS[0] not in json.dumps(body)

    def test_what_was_read_for_one_is_not_reused_for_another(self, keyed_url):
        def n_reused(key):
            body = chat("say: the same many words for both", user="ann")
            _, answer = ask(f"{keyed_url}v1/chat/completions", body, authorization=f"Bearer {key}")
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        n_template = len("<|user\nsay: ")  # what any two chats of one owner have in common
        assert n_reused(KEYS[0]) <= n_template
        assert n_reused(KEYS[1]) <= n_template
        assert n_reused(KEYS[0]) > n_template + len("the same many words")

    def test_the_limit_counts_a_keys_requests_whatever_sessions_it_names(self):
        engine = ScriptedEngine(max_active=2)
        with closing(engine), serving(engine, api_key=KEYS) as url, ThreadPoolExecutor(4) as pool:

            def send(key, session, text):
                headers = {"authorization": f"Bearer {key}", "x_session_id": session}
                return pool.submit(ask, f"{url}v1/chat/completions", chat(text), **headers)

            try:
                answers = [send(KEYS[0], "a", "hold: first")]
                assert engine.held.wait(WAIT_S)
                for n_queued, (key, session) in enumerate(((KEYS[0], "b"), (KEYS[1], "a")), 1):
                    answers.append(send(key, session, "say: later"))
                    wait_for(lambda n=n_queued: ask(f"{url}healthz")[1]["queued"] == n)
                refused = send(KEYS[0], "c", "say: too many")
                wait_for(lambda: refused.done() or ask(f"{url}healthz")[1]["queued"] == 3)
            finally:
                engine.go.set()
            status, body = refused.result(WAIT_S)
            assert (status, body.get("error", {}).get("code")) == (429, "rate_limit_exceeded")
            assert "as one person may (2)" in body["error"]["message"]
            texts = [answer.result(WAIT_S)[1]["choices"][0]["message"]["content"] for answer in answers]
            assert texts == ["first", "later", "later"]


class TestRefusals:
    def test_unknown_addresses_and_methods(self, url):
        for method_body, path in ((None, "v1/embeddings"), ({}, "v1/embeddings"), (None, "v1/chat/completions")):
            status, body = ask(url + path, method_body)
            assert (status, body["error"]["code"]) == (404, "unknown_url")

    @pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"messages": [}'])
    def test_a_body_that_is_no_json(self, url, body):
        status, answer = ask(f"{url}v1/chat/completions", body)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")

    @pytest.mark.parametrize("name", ["max_tokens", "seed", "temperature", "n", "top_k"])
    def test_a_number_larger_than_any_float(self, url, name):
        status, answer = ask(f"{url}v1/chat/completions", chat("say: x", **{name: 10**400}))
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, name, "invalid_value")
        assert len(answer["error"]["message"]) < 200

    def test_a_bug_in_the_server_is_logged_and_answered_with_an_error_object(self, url, scripted, monkeypatch, caplog):
        def break_down(request):
            raise KeyError("a secret of the server's")

        monkeypatch.setattr(scripted, "submit", break_down)
        status, answer = ask(f"{url}v1/chat/completions", chat("say: x"))
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "secret" not in answer["error"]["message"]
        assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]

    def test_a_body_that_is_too_large(self, url, monkeypatch):
        monkeypatch.setattr(openai_api, "MAX_BODY_BYTES", 100)
        assert ask(f"{url}v1/chat/completions", chat("say: x"))[0] == 200
        assert ask(f"{url}v1/chat/completions", chat("say: " + "x" * 100))[0] == 413

    def test_another_model(self, url):
        status, body = ask(f"{url}v1/chat/completions", chat("say: x", model="gpt-6"))
        assert (status, body["error"]["param"], body["error"]["code"]) == (404, "model", "model_not_found")

    def test_a_model_that_is_still_loading(self):
        release = threading.Event()
        engine = ScriptedEngine(load=lambda progress: (release.wait(WAIT_S), loaded(ScriptedModel()))[1])
        try:
            with serving(engine) as url:
                status, body = ask(f"{url}v1/chat/completions", chat("say: x"))
                release.set()
                assert (status, body["error"]["code"]) == (503, "model_loading")
        finally:
            release.set()
            engine.close()


class TestResuming:
    def test_a_stream_that_waits_for_its_reader_is_read_on_where_it_was(self, url):
        text = "slow: one two three four five"
        stream = Stream(url, chat(text, stream_options={"resume_s": 20, "include_usage": True}))
        frames = [next(stream) for _ in range(5)]
        stream.cut()
        *rest, usage, done = list(Stream(url, chat(text), last_event_id=frames[-1][0]))
        assert text_of(frames) + text_of(rest) == "one two three four five"
        assert json.loads(usage[1])["usage"]["completion_tokens"] == len("one two three four five") + 1
        assert done == ("", "[DONE]")

    def test_a_stream_that_nobody_comes_back_to_ends_in_time(self, url):
        stream = Stream(url, chat(LONG, stream_options={"resume_s": 0.2}))
        next(stream)
        stream.cut()
        wait_free(url)

    def test_one_of_two_readers_may_leave(self, url):
        first = Stream(url, chat("slow: one two three"))
        opening, token = next(first), next(first)
        second = Stream(url, {}, last_event_id=token[0])
        frames = [next(second)]
        first.cut()
        assert text_of([opening, token, *frames, *second]) == "one two three"

    def test_several_choices_go_on_each_where_it_was(self, url):
        def by_choice(frames):
            chunks = [json.loads(data)["choices"][0] for _, data in frames if data.startswith("{")]
            return [[chunk["delta"] for chunk in chunks if chunk["index"] == choice] for choice in (0, 1)]

        *frames, done = list(Stream(url, chat("say: abcdef", n=2)))
        assert frames[-1][0].endswith(":8.8")
        for cut_at in (2, 5, 9):  # the choices may come in another order than the first time, each in its own
            *rest, done_again = list(Stream(url, {}, last_event_id=frames[cut_at][0]))
            assert done_again == done
            assert rest[-1][0] == frames[-1][0]
            assert by_choice(rest) == by_choice(frames[cut_at + 1 :])

    def test_an_answer_is_its_owners_alone(self, keyed_url):
        first = Stream(keyed_url, chat("say: secret"), authorization=f"Bearer {KEYS[0]}")
        [(id, _)] = [frame for frame in first if frame[0].endswith(":1")]
        for key, status in ((KEYS[1], 404), (KEYS[0], 200)):
            body = chat("say: x", stream=True)
            assert ask(f"{keyed_url}v1/chat/completions", body, authorization=f"Bearer {key}", last_event_id=id)[0] == (
                status
            )

    @pytest.mark.parametrize("id", ["x", "chatcmpl-x:1", ":", "7", "x:" + "9" * 5000])
    def test_an_unknown_one_is_not_found(self, url, id):
        status, body = ask(f"{url}v1/chat/completions", chat("say: x", stream=True), last_event_id=id)
        assert (status, body["error"]["code"]) == (404, "stream_not_found")

    @pytest.mark.parametrize("offset", ["99", "-1", "", "x", "1.1", "1.x", "9" * 5000])
    def test_an_offset_that_the_stream_does_not_have_is_not_found(self, url, offset):
        frames = list(Stream(url, chat("say: ab")))
        answer, _, _ = frames[-2][0].partition(":")
        status, body = ask(f"{url}v1/chat/completions", {}, last_event_id=f"{answer}:{offset}")
        assert (status, body["error"]["code"]) == (404, "stream_not_found")


class ToldEngine:
    """An engine whose generations end when they are told to."""

    kind, model_id, tokenizer = "told", "told", None

    def __init__(self) -> None:
        self.runs: list[Generation] = []

    def submit(self, request: GenerationRequest) -> Generation:
        log = EventLog()
        run = Generation(request, (1,), log=log, seed=1, cancel=lambda run: log.append(FinishEvent("cancelled")))
        self.runs.append(run)
        return run

    def wait_ready(self, timeout: float | None = None) -> bool:
        return True

    def status(self) -> EngineStatus:
        return EngineStatus("ready", self.model_id)


def test_one_choice_that_breaks_ends_the_others_at_once():
    engine = ToldEngine()
    with serving_api(engine) as url, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, f"{url}v1/chat/completions", chat("x", n=3))
        wait_for(lambda: len(engine.runs) == 3)
        engine.runs[1].log.append(FinishEvent("error", "the second one broke"))
        status, body = answer.result(WAIT_S)
        assert (status, body["error"]["message"]) == (500, "the second one broke")
        assert [run.result(WAIT_S).finish.reason for run in engine.runs] == ["cancelled", "error", "cancelled"]


def test_a_silent_stream_sends_heartbeats(url, monkeypatch):
    monkeypatch.setattr(openai_api, "HEARTBEAT_S", 0.05)
    running, waiting = Stream(url, chat(LONG)), Stream(url, chat("say: x"))
    next(running)
    assert next(waiting)[1].startswith('{"id"')
    assert [next(waiting), next(waiting)] == [(":", "keep-alive")] * 2
    running.cut()
    assert text_of(waiting) == "x"


class TestSeveralModels:
    @pytest.fixture
    def menu(self):
        engines = {name: ScriptedEngine(name=name) for name in ("first", "second")}
        menu = ModelMenu(lambda name, make_room: engines[name], list(engines))
        menu.start()
        assert menu.wait_ready(WAIT_S)
        yield menu
        menu.close()
        for engine in engines.values():
            engine.close()

    def test_each_answers_to_its_name_and_the_first_one_to_none(self, menu):
        with serving(menu) as url:
            names = [model["id"] for model in ask(f"{url}v1/models")[1]["data"]]
            assert names == ["first", "second"]
            for asked, answered in ((None, "first"), ("first", "first"), ("second", "second"), ("dummy", "first")):
                status, body = ask(f"{url}v1/chat/completions", chat("say: x", model=asked, logprobs=True))
                assert (status, body["model"]) == (200, answered)
            served = {model.name: model.status().state for model in menu.models}
            assert served == {"first": "ready", "second": "ready"}
            status, body = ask(f"{url}v1/chat/completions", chat("say: x", model="third"))
            assert (status, body["error"]["code"]) == (404, "model_not_found")
            assert "'first', 'second'" in body["error"]["message"]

    def test_one_that_is_not_there_begins_to_load_and_has_everyone_ask_again(self):
        release = threading.Event()
        menu = ModelMenu(lambda name, make_room: LateEngine(name, lambda: release.wait(WAIT_S)), ["first", "second"])
        with closing(menu), serving_api(menu) as url, ExitStack() as at_the_end:
            at_the_end.callback(release.set)
            body, path = chat("say: x", model="second"), f"{url}v1/chat/completions"
            refusals = [ask(path, body) for _ in range(3)]
            assert [(status, answer["error"]["code"]) for status, answer in refusals] == [(503, "model_loading")] * 3
            assert [model.status().state for model in menu.models] == ["unloaded", "loading"]
            release.set()
            assert menu.find("second").wait_ready(WAIT_S)
            assert ask(path, body)[1]["choices"][0]["message"]["content"] == "x"

    def test_one_that_could_not_be_loaded_says_why_and_a_while_later_is_tried_anew(self, monkeypatch):
        monkeypatch.setattr(menu_model, "RETRY_S", 0.0)
        release, failures = threading.Event(), [ModelUnavailable("There is no such disk; mount it.")]

        def fail_once():
            release.wait(WAIT_S)
            if failures:
                raise failures.pop()

        menu = ModelMenu(lambda name, make_room: LateEngine(name, fail_once), ["first"])
        with closing(menu), serving_api(menu) as url, ExitStack() as at_the_end:
            at_the_end.callback(release.set)
            seen = []
            for state in ("failed", "failed", "ready", "ready"):
                release.clear()
                status, body = ask(f"{url}v1/chat/completions", chat("say: x"))
                seen.append((status, body["error"]["message"] if "error" in body else body["object"]))
                release.set()
                wait_for(lambda state=state: menu.first.status().state == state)
        assert seen == [
            (503, "The model is still loading; try again."),
            (503, "There is no such disk; mount it."),
            (503, "The model is still loading; try again."),
            (200, "chat.completion"),
        ]
