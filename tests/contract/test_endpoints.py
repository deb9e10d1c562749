"""The two endpoints as gradio_client sees them, and /healthz."""

import asyncio
import itertools
from contextlib import ExitStack, closing

import pytest

from streaming.settings import Settings
from streaming.ui.build import build_app, launch_app
from tests.scripted import LONG, ScriptedEngine
from tests.serving import WAIT_S, ask, serving, wait_for, wait_free


@pytest.fixture(scope="module")
def app(scripted):
    app = build_app(scripted)
    yield app
    app.close()


@pytest.fixture(scope="module")
def url(app, scripted):
    url, _ = launch_app(app, scripted, Settings(port=0))
    return url


@pytest.fixture(scope="module")
def client(url):
    from gradio_client import Client

    client = Client(url, verbose=False)
    yield client
    client.close()


def test_the_two_endpoints_are_all_there_is(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/chat", "/complete"}
    names = [p["parameter_name"] for p in endpoints["/chat"]["parameters"]]
    assert names == ["message", "history", "system_prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed"]
    names = [p["parameter_name"] for p in endpoints["/complete"]["parameters"]]
    assert names == ["prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed"]


def test_nothing_is_summed_up_after_each_event(app, client):
    queue = app._queue
    n_before = queue.events_recorded
    client.predict("say: one more", api_name="/chat")
    wait_for(lambda: not queue.event_ids_to_events)
    assert queue.events_recorded > n_before
    assert queue.cached_event_analytics_summary == {"functions": {}}


def test_chat_streams_the_growing_text(client):
    job = client.submit("slow: one two three", api_name="/chat", temperature=0)
    assert job.result(timeout=WAIT_S) == "one two three"
    texts = job.outputs()
    assert len(texts) >= 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_chat_takes_a_history_and_a_system_prompt(client):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    reply = client.predict("say: yes", history, "Be kind.", 64, 0, api_name="/chat")
    assert reply == "yes"


def test_complete_streams_the_continuation(client):
    assert client.predict("An increasing sequence: one,", 5, 0, api_name="/complete") == "and s"


def test_the_seed_is_reported_beside_the_text(client):
    async def logs(**options):
        job = client.submit("say: a word", api_name="/chat", **options)
        return {update.log async for update in job if getattr(update, "log", None)}

    def report(**options):
        # gradio_client 2.7 reads updates from another thread's asyncio.Queue and now and then loses one: ask again.
        return next(filter(None, (asyncio.run(logs(**options)) for _ in range(5))))

    assert report(seed=1234) == {("seed 1234", "info")}
    [(words, _)] = report()
    assert int(words.removeprefix("seed ")) > 0


def test_a_refusal_is_the_sentence(client):
    with pytest.raises(Exception, match="temperature must be between 0 and 5, not 9"):
        client.predict("say: x", temperature=9, api_name="/chat")


def test_cancelling_the_job_frees_the_engine(client, url):
    job = client.submit(LONG, max_new_tokens=2000, api_name="/chat")
    wait_for(lambda: job.outputs())
    assert ask(f"{url}healthz")[1]["active"] == 1
    job.cancel()
    wait_free(url)


@pytest.mark.parametrize(
    ("auth", "persons"),
    [
        ((), ({}, None, {})),
        ((("ann", "one"), ("bob", "two")), ({"auth": ("ann", "one")},) * 2 + ({"auth": ("bob", "two")},)),
    ],
    ids=["programs", "accounts"],
)
def test_each_program_is_one_person_and_with_accounts_each_account(auth, persons):
    """`persons` are how ann connects, ann connects again (None: it is the same program), and bob."""
    from gradio_client import Client

    engine, owners = ScriptedEngine(max_active=1), []
    submit = engine.submit
    engine.submit = lambda request: owners.append(request.owner) or submit(request)
    with closing(engine), serving(engine, auth=auth) as url, ExitStack() as stack:
        stack.callback(engine.go.set)
        ann, again, bob = (
            who if who is None else stack.enter_context(closing(Client(url, verbose=False, **who))) for who in persons
        )
        first = ann.submit("hold: first", api_name="/chat")
        assert engine.held.wait(WAIT_S)
        for api_name in ("/chat", "/complete"):
            with pytest.raises(Exception, match=r"as one person may \(1\)"):
                (again or ann).submit("say: too many", api_name=api_name).result(WAIT_S)
        other = bob.submit("say: other", api_name="/chat")
        wait_for(lambda: ask(f"{url}healthz")[1]["queued"] == 1)
        engine.go.set()
        assert (first.result(WAIT_S), other.result(WAIT_S)) == ("first", "other")
    assert owners[0] == owners[1] == owners[2] != owners[3]


def test_healthz_tells_how_the_engine_is(url):
    assert ask(f"{url}healthz")[1] == {
        "status": "ready",
        "model": "tiny",
        "engine": "local",
        "device": "cpu",
        "active": 0,
        "queued": 0,
        "detail": "",
    }
