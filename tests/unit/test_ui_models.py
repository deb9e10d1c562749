"""What the header is told of the models: without a page."""

import asyncio
import dataclasses

import gradio as gr
import pytest
from starlette.requests import Request

from streaming.engine import menu_model
from streaming.engine.batched import BatchedEngine
from streaming.engine.local import LocalEngine
from streaming.engine.menu import ModelMenu
from streaming.errors import ModelDamaged
from streaming.models.loading import LoadedModel
from streaming.server.runs import Runs
from streaming.ui.models import About, ModelHandlers
from streaming.ui.session import Session
from tests.serving import WAIT_S
from tests.tiny import Parrot, loaded


class Site:
    """A menu of two models, and a tab of its page; what is in `damaged` cannot be loaded."""

    def __init__(self, kind: type[LocalEngine] = LocalEngine, is_open: bool = False) -> None:
        self.kind = kind
        self.damaged: set[str] = set()
        self.menu = ModelMenu(self.make, ["first", "second"], is_open=is_open)
        self.runs = Runs(self.menu, menu=self.menu)
        self.handlers, self.session = ModelHandlers(self.runs), Session()

    def make(self, name, make_room) -> LocalEngine:
        def load(progress) -> LoadedModel:
            if name in self.damaged:
                raise ModelDamaged(f"{name} cannot be loaded.")
            return dataclasses.replace(loaded(Parrot()), model_id=name)

        return self.kind(load)

    def look(self, **headers: str) -> list[dict]:
        """Open the page, and give what its header was told."""
        return _told(self.handlers.greet(self.session, {"model": self.session.model}, _request(**headers)))

    def choose(self, name: str, **headers: str) -> list[dict]:
        """Choose a model, and give what the header was told."""
        return _told(self.handlers.choose(self.session, None, gr.EventData(None, {"name": name}), _request(**headers)))

    def close(self) -> None:
        self.runs.close()
        self.menu.close()
        self.runs.store.close()


def _told(about: About) -> list[dict]:
    async def read():
        return [one async for one in about]

    return asyncio.run(asyncio.wait_for(read(), WAIT_S))


def _request(**headers: str) -> gr.Request:
    given = {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return gr.Request(Request({"type": "http", "headers": raw, "client": ("127.0.0.1", 1)}))


@pytest.fixture
def site(request):
    site = Site(*getattr(request, "param", ()))
    yield site
    site.close()


def test_a_page_that_opens_after_its_model_failed_tells_why_and_a_while_later_loads_it(site, monkeypatch):
    site.damaged.add("first")
    assert site.menu.find("second").wait_ready(WAIT_S)
    with pytest.raises(ModelDamaged):
        site.menu.wait_ready(WAIT_S)
    assert [(about["problem"], about["failed"]) for about in site.look()] == [("first cannot be loaded.", True)]
    site.damaged.clear()
    monkeypatch.setattr(menu_model, "RETRY_S", 0.0)
    *loading, last = site.look()
    assert all(about["loading"]["words"] == "Loading the model" for about in loading)
    assert (last["model"], last["problem"], last["loading"]) == ("first", "", None)
    assert site.menu.first.status().state == "ready"


@pytest.mark.parametrize(
    ("site", "note"),
    [((LocalEngine,), ""), ((BatchedEngine,), "This model cannot be batched: requests take turns, a token each.")],
    indirect=["site"],
)
def test_a_model_whose_requests_take_turns_says_so(site, note):
    assert site.menu.wait_ready(WAIT_S)
    assert site.look()[-1]["note"] == note


@pytest.mark.parametrize("site", [(LocalEngine, True)], indirect=True)
def test_a_name_can_be_typed_on_this_machine_but_not_through_what_leads_to_it(site):
    for elsewhere in (
        {"x_forwarded_for": "203.0.113.9"},
        {"via": "1.1 proxy"},
        {"origin": "https://brook.example"},  # a proxy that tells nothing of itself
        {"host": "brook.example", "origin": "http://brook.example"},
    ):
        assert site.look(**elsewhere)[-1]["open"] is False
        last = site.choose("third", **elsewhere)[-1]
        assert "not one of the models" in last["problem"]
        assert site.choose("second", **elsewhere)[-1]["model"] == "second"
    assert [model.name for model in site.menu.models] == ["first", "second"]
    assert site.look()[-1]["open"] is True
    assert site.choose("third")[-1]["model"] == "third"
