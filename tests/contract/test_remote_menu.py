"""The app's own wiring in front of another machine's server: limits hold there too, and names are the server's."""

import threading

import pytest

from streaming.engine import menu_model
from streaming.engine.base import GenerationRequest
from streaming.engine.menu import load_menu
from streaming.errors import EngineBusy, ModelUnavailable
from streaming.settings import Settings
from tests.fake_server import fake_server, streaming
from tests.serving import WAIT_S, ask, said, serving_api

HELLO = said("hello")


@pytest.fixture
def menu_of():
    """Make menus as the app does."""
    menus = []

    def make(url: str, **options):
        menus.append(load_menu(Settings(engine="remote", base_url=url, **options)))
        return menus[-1]

    yield make
    for menu in menus:
        menu.close()


def test_the_limits_hold(menu_of):
    hold = threading.Event()
    with fake_server(lambda handler: (hold.wait(WAIT_S), streaming("fine")(handler))) as server:
        menu = menu_of(server.url, max_active=2)
        runs = [menu.submit(GenerationRequest(messages=HELLO, owner=owner)) for owner in ("ann", "ann", "bob")]
        with pytest.raises(EngineBusy, match=r"one person may \(2\)"):
            menu.submit(GenerationRequest(messages=HELLO, owner="ann"))
        assert menu.status().n_active == 3
        hold.set()
        assert [run.result(WAIT_S).text for run in runs] == ["fine"] * 3


def test_a_model_that_was_not_named_is_called_what_the_server_calls_it_and_answers_to_either_name(menu_of):
    with fake_server(streaming("fine")) as server:
        menu = menu_of(server.url)
        host = menu.model_id
        assert host == f"127.0.0.1:{server.server_address[1]}"
        menu.start()
        assert menu.wait_ready(WAIT_S)
        with serving_api(menu) as url:
            assert [model["id"] for model in ask(f"{url}v1/models")[1]["data"]] == ["fake"]
            assert [ask(f"{url}v1/models/{name}")[1]["id"] for name in ("fake", host)] == ["fake", "fake"]
            for name in ("fake", host, None):
                body = {"messages": HELLO} | ({"model": name} if name else {})
                status, answer = ask(f"{url}v1/chat/completions", body)
                assert (status, answer["model"]) == (200, "fake")
            status, answer = ask(f"{url}v1/chat/completions", {"model": "other", "messages": HELLO})
            assert (status, answer["error"]["message"]) == (
                404,
                "The model 'other' is not served here; there is 'fake'.",
            )
        assert menu.find("fake") is menu.find(host) is menu.first
        assert [model.model_id for model in menu.models] == ["fake"]


def test_a_server_that_could_not_be_used_is_asked_again_and_nothing_of_the_first_try_stays(menu_of, monkeypatch):
    monkeypatch.setattr(menu_model, "RETRY_S", 0.0)
    with fake_server(streaming("fine")) as server:
        served, server.models = server.models, {"object": "list", "data": []}
        menu = menu_of(server.url)
        threads = set(threading.enumerate())
        for _ in range(3):
            with pytest.raises(ModelUnavailable, match="it has none"):
                menu.submit(GenerationRequest(messages=HELLO))
        server.models = served
        assert menu.submit(GenerationRequest(messages=HELLO)).result(WAIT_S).text == "fine"
        started = [thread.name for thread in set(threading.enumerate()) - threads]
        assert [name for name in started if name == "brook-engine"] == ["brook-engine"]
