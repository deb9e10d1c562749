"""Replicas of the default model under Ray Serve: streams, sessions, what happens when one is killed, and growth.

pip install -r requirements-dev.txt -r deploy/requirements.txt && pytest -m ray
"""

import collections
import contextlib
import time

import pytest

from streaming.engine.base import GenerationRequest
from streaming.engine.remote import RemoteEngine
from tests.serving import ask, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WAIT_S = 120
GROWTH_S = 240
"""Ray Serve looks at the load of the last 30 s, waits as long before it grows, and a replica loads the model."""
STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper."}]


@pytest.fixture(scope="module")
def url():
    import ray
    from ray import serve

    from deploy.ray_app import Options, build

    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    serve.run(build(Options(min_replicas=2, max_replicas=2)), name="brook")
    yield "http://127.0.0.1:8765/"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def engine(url):
    engine = RemoteEngine(f"{url}v1")
    assert engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


def replicas(app: str = "brook") -> dict[str, object]:
    """Give an application's replicas' actors by their names."""
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    ours = [name for name in names if name.startswith(f"SERVE_REPLICA::{app}#Replica#")]
    return {name.rpartition("#")[2]: ray.get_actor(name, namespace="serve") for name in ours}


def replica_of(url: str, session: str) -> str:
    """Give the name of the replica that a session is sent to."""
    import urllib.request

    request = urllib.request.Request(f"{url}healthz", headers={"x-session-id": session})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return answer.headers["x-brook-replica"]


def test_the_api_is_brooks_own(url, engine):
    assert ask(f"{url}healthz")[1]["status"] == "ready"
    assert ask(f"{url}v1/chat/completions", {"messages": []})[0] == 400
    run = engine.submit(GenerationRequest(prompt="An increasing sequence: one,", max_new_tokens=20, temperature=0))
    *tokens, finish = list(run.events(timeout=WAIT_S))
    assert "".join(event.text for event in tokens) == " two, three, four, five, six, seven, eight, nine, ten, eleven,"
    assert finish.reason == "length"
    assert tokens[0].t_s < tokens[-1].t_s, "the proxy passes tokens on as they come"


def test_a_session_stays_with_its_replica_and_what_that_has_read(url, engine):
    sessions = [f"session {i}" for i in range(16)]
    homes = {session: replica_of(url, session) for session in sessions}
    assert set(homes.values()) == set(replicas())
    assert homes == {session: replica_of(url, session) for session in sessions}

    def n_reused(owner):
        return (
            engine.submit(GenerationRequest(messages=STORY, max_new_tokens=2, temperature=0, owner=owner))
            .result(WAIT_S)
            .finish.n_reused_tokens
        )

    for owner in ("ann", "bob", "cem", "dua"):
        assert n_reused(owner) < 30  # no more than every chat begins with
        assert n_reused(owner) > 30


def test_stop_reaches_the_replica(engine, url):
    run = engine.submit(GenerationRequest(messages=STORY, max_new_tokens=1000, owner="ann"))
    wait_for(lambda: len(run.log) > 3)
    run.cancel()
    assert run.result(WAIT_S).finish.reason == "cancelled"
    session = engine._session_of("ann")
    wait_for(lambda: ask(f"{url}healthz", x_session_id=session)[1]["active"] == 0)


def test_killing_a_replica_breaks_its_streams_alone_and_retry_works(engine, url):
    import ray

    owners = [f"owner {i}" for i in range(8)]
    homes = {owner: replica_of(url, engine._session_of(owner)) for owner in owners}
    victim, n_there = collections.Counter(homes.values()).most_common()[-1]
    assert 0 < n_there < len(owners)
    request = GenerationRequest(messages=STORY, max_new_tokens=150, temperature=0)

    def submit(owner):
        return engine.submit(GenerationRequest(messages=STORY, max_new_tokens=150, temperature=0, owner=owner))

    expected = engine.submit(request).result(WAIT_S).text
    runs = {owner: submit(owner) for owner in owners}
    first_there = next(run for owner, run in runs.items() if homes[owner] == victim)
    wait_for(lambda: len(first_there.log) > 3)
    ray.kill(replicas()[victim])
    results = {owner: run.result(WAIT_S) for owner, run in runs.items()}
    for owner in owners:
        text, finish = results[owner].text, results[owner].finish
        if homes[owner] != victim:
            assert (text, finish.error) == (expected, None)
        elif finish.error is not None:  # it was writing; what waited there was tried again elsewhere
            assert "try again" in finish.error
            assert text
            assert expected.startswith(text)
        else:
            assert text == expected
    assert first_there.result(0).finish.reason == "error"
    retried = submit(next(owner for owner, run in runs.items() if run is first_there)).result(WAIT_S)
    assert (retried.text, retried.finish.error) == (expected, None)
    wait_for(lambda: len(replicas()) == 2)  # Serve has begun another in its place


@pytest.fixture
def small(url):
    """Serve one replica that may become two, beside the others, and give its address."""
    from ray import serve

    from deploy.ray_app import Options, build

    options = Options(min_replicas=1, max_replicas=2, target_ongoing_requests=2, max_active=2)
    serve.run(build(options), name="small", route_prefix="/small")
    yield f"{url}small/"
    serve.delete("small")


def test_replicas_serve_many_at_once_within_their_limits_and_more_work_brings_another(small):
    assert ask(f"{small}healthz")[1]["engine"] == "batched"
    with contextlib.closing(RemoteEngine(f"{small}v1")) as engine:
        assert engine.wait_ready(WAIT_S)

        def submit(owner):
            return engine.submit(
                GenerationRequest(
                    prompt="An increasing sequence: one,", max_new_tokens=1500, temperature=0, owner=owner
                )
            )

        runs = [submit("ann"), submit("ann")]
        wait_for(lambda: all(run.progress.state == "writing" for run in runs))
        assert "as one person may (2)" in submit("ann").result(WAIT_S).finish.error

        deadline = time.monotonic() + GROWTH_S
        sessions = [f"session {i}" for i in range(16)]
        while len(homes := {replica_of(small, session) for session in sessions}) < 2:
            assert time.monotonic() < deadline, "no other replica came"
            runs = [submit(f"owner {i}") for i in range(8)]
            assert [run.result(WAIT_S).finish.error for run in runs] == [None] * 8
        assert homes == set(replicas("small"))
