"""What the remote engine promises beside what every engine does: over Brook's own API, and over servers that do as they
like. Tests of what every engine promises are in test_engine.py, over Brook's own API too.
"""

import socket
import threading
import time
from collections.abc import Sequence

import pytest

from streaming.engine import remote
from streaming.engine.base import GenerationRequest
from streaming.engine.local import LocalEngine
from streaming.engine.remote import RemoteEngine
from streaming.errors import InvalidRequest, ModelUnavailable
from streaming.events import NO_ID
from tests.fake_server import Handler, chunk, fake_server, refusing, streaming
from tests.scripted import LONG
from tests.serving import WAIT_S, said, serving_api, wait_for
from tests.tiny import loaded, tiny_llama

HELLO = said("hello")


def ask(engine, text="hello", **options):
    return engine.submit(GenerationRequest(messages=said(text), **options))


@pytest.fixture(scope="module")
def local():
    engine = LocalEngine(lambda progress: loaded(tiny_llama()))
    engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


def connected(engine):
    """Serve an engine, and give one that asks it from elsewhere."""
    with serving_api(engine) as url:
        far = RemoteEngine(f"{url}v1")
        try:
            yield far
        finally:
            far.close()


@pytest.fixture(scope="module")
def far(local):
    yield from connected(local)


@pytest.fixture(scope="module")
def far_scripted(scripted):
    yield from connected(scripted)


@pytest.fixture
def connect():
    """Ask servers, and let go of them at the end."""
    engines = []

    def start(url, *args, **options):
        engines.append(RemoteEngine(url, *args, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


class TestOverBrook:
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0.0},
            {"temperature": 0.0, "frequency_penalty": 2.0, "presence_penalty": 1.0},
            {"temperature": 0.9, "top_p": 0.8, "seed": 7},
            {"temperature": 0.9, "top_k": 3, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 7},
        ],
    )
    def test_every_setting_makes_the_difference_that_it_makes_there(self, local, far, options):
        here = ask(local, max_new_tokens=30, **options).result(WAIT_S)
        there = ask(far, max_new_tokens=30, **options).result(WAIT_S)
        assert there.text == here.text
        assert there.finish.reason == here.finish.reason == "length"
        for count in ("n_prompt_tokens", "n_generated_tokens"):
            assert getattr(there.finish, count) == getattr(here.finish, count)

    def test_it_is_the_one_model_of_the_server_without_a_tokenizer(self, far):
        assert far.wait_ready(WAIT_S)
        assert (far.model_id, far.tokenizer, far.kind) == ("tiny", None, "remote")
        assert far.status().state == "ready"
        *tokens, _ = ask(far, max_new_tokens=4).events(timeout=WAIT_S)
        assert {event.id for event in tokens} == {NO_ID}

    def test_logprobs_of_a_plain_prompt_tell_the_likeliest_by_text(self, local, far):
        def told(engine):
            request = GenerationRequest(prompt="one", max_new_tokens=8, temperature=0, logprobs=3)
            *tokens, _ = engine.submit(request).events(timeout=WAIT_S)
            # Two tokens may share a text, which is then told once.
            return [(event.text, event.logprob, {top.text: top.logprob for top in event.top}) for event in tokens]

        assert told(far) == told(local)

    def test_token_ids_of_a_reply_are_not_continued(self, far):
        with pytest.raises(InvalidRequest, match="give prefix_text"):
            far.submit(GenerationRequest(messages=HELLO, prefix_ids=[1, 2]))

    def test_stop_frees_the_model_there_and_keeps_what_was_written(self, scripted, far_scripted):
        run = ask(far_scripted, LONG)
        wait_for(lambda: len(run.log) > 2)
        assert run.progress.state == "writing"
        assert scripted.status().n_active == far_scripted.status().n_active == 1
        run.cancel()
        result = run.result(WAIT_S)
        assert result.finish.reason == "cancelled"
        assert result.text == "x" * result.finish.n_generated_tokens
        wait_for(lambda: scripted.status().n_active == 0)
        assert far_scripted.status().n_active == 0
        assert ask(far_scripted, "say: next").result(WAIT_S).text == "next"

    def test_a_refusal_is_the_servers_sentence(self, far_scripted):
        finish = ask(far_scripted, "x" * 9000).result(WAIT_S).finish
        assert finish.reason == "error"
        assert "tokens long but the model can read at most" in finish.error


class TestReasoning:
    @pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
    def test_it_stands_between_tags_before_the_reply(self, connect, field):
        deltas = [{"role": "assistant", "content": ""}, {field: "Let me"}, {field: " think."}, "\n\nYes", "."]
        with fake_server(streaming(*deltas)) as server:
            result = ask(connect(server.url)).result(WAIT_S)
        assert result.text == "<think>\nLet me think.\n</think>\n\nYes."
        assert result.finish.n_generated_tokens == 4

    def test_it_stays_open_where_the_reply_ends_within(self, connect):
        with fake_server(streaming({"reasoning": "Let me"}, finish_reason="length")) as server:
            result = ask(connect(server.url)).result(WAIT_S)
        assert (result.text, result.finish.reason) == ("<think>\nLet me", "length")


class TestStopStrings:
    @pytest.mark.parametrize(
        ("deltas", "text", "reason"),
        [
            (["one. ", "two"], "one", "stop"),
            (["on", "e", ".", " two"], "one", "stop"),
            (["one", " E", "ND two"], "one ", "stop"),
            (["one", " EN"], "one EN", "length"),
        ],
    )
    def test_a_server_that_shows_them_is_cut_there(self, connect, deltas, text, reason):
        with fake_server(streaming(*deltas, finish_reason="length")) as server:
            result = ask(connect(server.url), stop=[".", "END"]).result(WAIT_S)
        assert (result.text, result.finish.reason) == (text, reason)

    def test_the_server_is_left_at_once(self, connect):
        release = threading.Event()

        def reply(handler: Handler) -> None:
            handler.begin()
            handler.send(chunk({"index": 0, "delta": {"content": "one. two"}, "finish_reason": None}))
            release.wait(WAIT_S)

        with fake_server(reply) as server:
            assert ask(connect(server.url), stop=["."]).result(WAIT_S).text == "one"
            release.set()


class TestCounts:
    def test_they_are_the_servers(self, connect):
        usage = {
            "prompt_tokens": 30,
            "completion_tokens": 7,
            "total_tokens": 37,
            "prompt_tokens_details": {"cached_tokens": 20},
        }
        with fake_server(streaming("Hello there", usage=usage)) as server:
            finish = ask(connect(server.url)).result(WAIT_S).finish
        assert (finish.n_prompt_tokens, finish.n_reused_tokens, finish.n_generated_tokens) == (30, 20, 7)


def telling(*chunks: tuple[str, Sequence[str]]):
    """Reply to a chat with chunks of text, each with the tokens that its logprobs tell of."""

    def reply(handler: Handler) -> None:
        handler.begin()
        for text, told in chunks:
            content = [{"token": token, "logprob": -1.0, "bytes": None, "top_logprobs": []} for token in told]
            logprobs = {"content": content, "refusal": None}
            choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}
            handler.send(chunk(choice))
        handler.send(chunk({"index": 0, "delta": {}, "finish_reason": "stop"}))
        handler.send("[DONE]")

    return reply


class TestLogprobs:
    def test_those_of_text_that_is_held_back_are_left_out(self, connect):
        with fake_server(telling(("ab", "ab"), ("x", "xy"), ("z", "q"))) as server:
            *tokens, _ = ask(connect(server.url), logprobs=1).events(timeout=WAIT_S)
        assert [(t.text, t.logprob) for t in tokens] == [("a", -1.0), ("b", -1.0), ("x", None), ("z", -1.0)]

    def test_tokens_after_a_stop_string_are_none_of_the_reply(self, connect):
        with fake_server(telling(("one. two", ["one", ".", " two"]))) as server:
            *tokens, finish = ask(connect(server.url), logprobs=1, stop=["."]).events(timeout=WAIT_S)
        assert [(t.text, t.logprob) for t in tokens] == [("one", -1.0), ("", -1.0)]
        assert (finish.reason, finish.n_generated_tokens) == ("stop", 2)


class TestWhatIsSent:
    def test_settings_that_are_off_stay_here(self, connect):
        with fake_server(streaming("x")) as server:
            request = GenerationRequest(
                messages=[{"role": "user", "content": "hi", "token_ids": (1,)}],
                temperature=0.5, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=3, max_new_tokens=9, owner="ann",
            )  # fmt: skip
            connect(server.url, None, "the key").submit(request).result(WAIT_S)
        [asked] = server.asked
        headers = asked.pop("headers")
        assert asked == {
            "path": "/v1/chat/completions",
            "model": "fake",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "seed": 3,
            "max_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert headers["authorization"] == "Bearer the key"
        assert "ann" not in str(headers)

    def test_each_owner_has_a_session_of_its_own_on_the_server(self, connect):
        with fake_server(streaming("x")) as server:
            for engine in (connect(server.url), connect(server.url)):
                for owner in ("ann", "bob", "ann", ""):
                    ask(engine, owner=owner).result(WAIT_S)
            sessions = [asked["headers"].get("x-session-id") for asked in server.asked]
        ann, bob, again, nobody, *elsewhere = sessions
        assert ann == again != bob
        assert nobody is elsewhere[3] is None
        assert not {ann, bob} & set(elsewhere), "who a session is cannot be told from another page's"

    def test_what_the_environment_holds_for_openai_is_not(self, connect, monkeypatch):
        for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
            monkeypatch.setenv(name, "secret")
        with fake_server(streaming("x")) as server:
            ask(connect(server.url)).result(WAIT_S)
        assert "secret" not in str(server.asked[0]["headers"])


class TestQueue:
    def test_beyond_the_seats_people_take_turns_and_their_places_move(self, connect):
        hold = threading.Event()

        def reply(handler: Handler) -> None:
            assert hold.wait(WAIT_S)
            streaming("fine")(handler)

        with fake_server(reply) as server:
            engine = connect(server.url, n_seats=1)
            runs = [ask(engine, f"{n}", owner=owner) for n, owner in enumerate(("ann", "ann", "ann", "bob"))]
            assert [run.progress.n_ahead for run in runs] == [0, 1, 3, 2]
            assert (engine.status().n_active, engine.status().n_queued) == (1, 3)
            runs[1].cancel()
            assert runs[1].result(0).finish.reason == "cancelled"
            assert [run.progress.n_ahead for run in runs] == [0, 0, 1, 2]
            hold.set()
            finishes = [run.result(WAIT_S).finish for run in runs]
            assert [asked["messages"][0]["content"] for asked in server.asked] == ["0", "2", "3"]
        assert all(finish.timings.queued_s > finishes[0].timings.queued_s for finish in finishes[1:])
        assert finishes[3].timings.ttft_s >= finishes[3].timings.queued_s
        assert (engine.status().n_active, engine.status().n_queued) == (0, 0)

    def test_closing_ends_those_who_wait(self, connect):
        release = threading.Event()
        with fake_server(lambda handler: release.wait(WAIT_S)) as server:
            engine = connect(server.url, n_seats=1)
            runs = [ask(engine) for _ in range(3)]
            engine.close()
            assert [run.result(0).finish.reason for run in runs] == ["cancelled"] * 3
            release.set()


class TestFailures:
    @pytest.fixture(autouse=True)
    def no_pauses(self, monkeypatch):
        monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)

    @pytest.mark.parametrize("status", [429, 500, 502, 503])
    def test_a_server_that_is_busy_or_broken_is_asked_again(self, connect, status):
        with fake_server(refusing(status), refusing(status), streaming("fine")) as server:
            assert ask(connect(server.url)).result(WAIT_S).text == "fine"
            assert len(server.asked) == 3

    def test_but_not_for_ever(self, connect):
        with fake_server(refusing(503, {"error": {"message": "no room"}})) as server:
            finish = ask(connect(server.url)).result(WAIT_S).finish
            assert len(server.asked) == remote.MAX_TRIES
        assert finish.error.endswith("failed (no room); try again.")

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_server_is_left_alone_for_as_long_as_it_asks(self, connect, status):
        with fake_server(refusing(status, retry_after="0.3"), streaming("fine")) as server:
            began = time.monotonic()
            assert ask(connect(server.url)).result(WAIT_S).text == "fine"
            assert time.monotonic() - began >= 0.3

    @pytest.mark.parametrize("when", ["3600", "Fri, 31 Dec 9999 23:59:59 GMT"])
    def test_nobody_waits_for_a_server_that_asks_for_too_long(self, connect, when):
        with fake_server(refusing(429, {"error": {"message": "no more today"}}, retry_after=when)) as server:
            finish = ask(connect(server.url)).result(WAIT_S).finish
            assert len(server.asked) == 1
        assert "is busy (no more today)" in finish.error

    @pytest.mark.parametrize("when", ["soon", "-1", "nan", "Fri, 31 Dec 1999 23:59:59 GMT"])
    def test_what_it_asks_for_may_mean_nothing(self, connect, when):
        with fake_server(refusing(429, retry_after=when), streaming("fine")) as server:
            assert ask(connect(server.url)).result(WAIT_S).text == "fine"

    def test_stop_ends_such_a_pause_at_once(self, connect):
        with fake_server(refusing(429, retry_after="29")) as server:
            run = ask(connect(server.url))
            wait_for(lambda: server.asked)
            run.cancel()
            assert run.result(10).finish.reason == "cancelled"

    def test_a_connection_that_breaks_before_the_first_token_is_made_again(self, connect):
        with fake_server(lambda handler: handler.begin(), streaming("fine")) as server:
            # Ended without a word: nothing says that the reply is whole.
            assert ask(connect(server.url)).result(WAIT_S).text == "fine"

    def test_after_the_first_token_nothing_is_asked_twice(self, connect):
        def half(handler: Handler) -> None:
            handler.begin()
            handler.send(chunk({"index": 0, "delta": {"content": "half"}, "finish_reason": None}))

        with fake_server(half) as server:
            result = ask(connect(server.url)).result(WAIT_S)
            assert len(server.asked) == 1
        assert (result.text, result.finish.reason) == ("half", "error")
        assert result.finish.error.endswith("ended the reply in the middle; try again.")

    def test_nor_after_text_that_is_held_back_for_a_stop_string(self, connect):
        with fake_server(streaming("Hu", finish_reason=None), streaming("Hello there")) as server:
            result = ask(connect(server.url), stop=["Human:"]).result(WAIT_S)
            assert len(server.asked) == 1
        assert (result.text, result.finish.reason) == ("Hu", "error")

    @pytest.mark.parametrize(
        ("reply", "says"),
        [
            (refusing(400, {"error": {"message": "no top_k here"}}), "refused the request: no top_k here"),
            (refusing(422, {"detail": [{"msg": "bad"}]}), "refused the request: [{'msg': 'bad'}]"),
            (refusing(401, {"error": {"message": "sk-123 is wrong"}}), "wants another API key"),
            (refusing(404, b"not here"), "does not have that (not here); check --base-url and --model."),
            (streaming("x", finish_reason="content_filter"), "ended the reply early (content_filter)."),
            (lambda h: (h.begin(), h.send({"error": {"message": "out of memory"}})), "an error (out of memory)"),
            (lambda h: (h.begin(), h.send("{half")), "sent something that cannot be read"),
            (refusing(400, b"<html>" + b"x" * 9000), "refused the request: <html>xxx"),
        ],
    )
    def test_an_error_is_a_sentence_and_asked_once(self, connect, reply, says):
        with fake_server(reply) as server:
            finish = ask(connect(server.url)).result(WAIT_S).finish
            assert len(server.asked) == 1
        assert finish.reason == "error"
        assert says in finish.error
        assert "sk-123" not in finish.error
        assert len(finish.error) < 500

    def test_a_server_that_falls_silent_is_left_in_time(self, connect):
        release = threading.Event()
        with fake_server(lambda handler: (handler.begin(), release.wait(WAIT_S))) as server:
            finish = ask(connect(server.url, read_timeout_s=0.2)).result(WAIT_S).finish
            release.set()
            assert len(server.asked) == 1
        assert "sent nothing for 0.2 s; try again." in finish.error


class TestTheServerItself:
    def test_nobody_there_is_a_sentence_at_once(self, connect):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.monotonic()
        engine = connect(f"http://127.0.0.1:{port}/v1")
        with pytest.raises(ModelUnavailable, match=rf"server at 127.0.0.1:{port} cannot be reached.*check --base-url"):
            engine.wait_ready(WAIT_S)
        assert time.monotonic() - began < 2
        assert engine.status().state == "failed"
        with pytest.raises(ModelUnavailable) as first:
            ask(engine)
        with pytest.raises(ModelUnavailable) as second:
            ask(engine)
        assert first.value is not second.value, "what each raises would hold the frames of all"

    def test_several_models_have_to_be_told_apart(self, connect):
        with fake_server(streaming("x")) as server:
            server.models = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("a", "b")]}
            with pytest.raises(ModelUnavailable, match="with --model; it has a, b"):
                connect(server.url).wait_ready(WAIT_S)
            engine = connect(server.url, "b")
            assert engine.wait_ready(WAIT_S)
            assert engine.model_id == "b"

    def test_closing_frees_the_model_there(self, connect, scripted):
        with serving_api(scripted) as url:
            engine = connect(f"{url}v1")
            run = ask(engine, LONG)
            wait_for(lambda: len(run.log) > 1)
            engine.close()
            assert run.result(0).finish.reason == "cancelled"
            wait_for(lambda: scripted.status().n_active == 0)
