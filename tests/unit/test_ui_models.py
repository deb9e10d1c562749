"""What the header is told of the models: without a page."""

import asyncio
import dataclasses

import pytest

from streaming.engine import menu_model
from streaming.engine.batched import BatchedEngine
from streaming.engine.local import LocalEngine
from streaming.engine.menu import ModelMenu
from streaming.errors import ModelDamaged
from streaming.models.loading import LoadedModel
from streaming.server.runs import Runs
from streaming.ui.models import ModelHandlers
from streaming.ui.session import Session
from tests.serving import WAIT_S
from tests.tiny import Parrot, loaded


class Site:
    """A menu of two models, and a tab of its page; what is in `damaged` cannot be loaded."""

    def __init__(self, kind: type[LocalEngine] = LocalEngine) -> None:
        self.kind = kind
        self.damaged: set[str] = set()
        self.menu = ModelMenu(self.make, ["first", "second"])
        self.runs = Runs(self.menu, menu=self.menu)
        self.handlers, self.session = ModelHandlers(self.runs), Session()

    def make(self, name, make_room) -> LocalEngine:
        def load(progress) -> LoadedModel:
            if name in self.damaged:
                raise ModelDamaged(f"{name} cannot be loaded.")
            return dataclasses.replace(loaded(Parrot()), model_id=name)

        return self.kind(load)

    def look(self) -> list[dict]:
        """Open the page, and give what its header was told."""

        async def look():
            return [about async for about in self.handlers.greet(self.session, {"model": self.session.model})]

        return asyncio.run(asyncio.wait_for(look(), WAIT_S))

    def close(self) -> None:
        self.runs.close()
        self.menu.close()
        self.runs.store.close()


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
