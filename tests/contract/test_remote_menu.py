"""The app's own wiring in front of another machine's server: limits hold there too, and names are the server's."""

import threading

import pytest

from streaming.engine.base import GenerationRequest
from streaming.engine.menu import load_menu
from streaming.errors import EngineBusy
from streaming.settings import Settings
from tests.fake_server import fake_server, streaming
from tests.serving import WAIT_S, said

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
