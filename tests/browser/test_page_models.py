"""The menu of models: switching with the chat kept, one that cannot be had, and who may choose what."""

import dataclasses
import threading

import pytest
from playwright.sync_api import expect

from streaming.engine.menu import ModelMenu
from streaming.errors import NotACausalLM
from streaming.models.progress import LoadProgress
from streaming.server.runs import Runs
from tests.browser.conftest import serve
from tests.browser.page_steps import WAIT_MS, ask, last_reply
from tests.scripted import N_CONTEXT, ScriptedEngine
from tests.tiny import loaded

pytestmark = pytest.mark.browser


class Served:
    """A page with three models: the second loads once `go` is set, the third cannot be loaded."""

    def __init__(self, *, is_open: bool) -> None:
        self.go, self.loading = threading.Event(), threading.Event()
        self.menu = ModelMenu(self.make, ["ann/first", "ann/second", "ann/broken"], is_open=is_open)
        self.menu.start()
        self.runs = Runs(self.menu, menu=self.menu)
        self.app, self.url = serve(self.menu, self.runs)

    def make(self, name, make_room) -> ScriptedEngine:
        made = threading.Event()

        def load(progress):
            assert made.wait(60)
            if name == "ann/second":
                progress(LoadProgress("download", 30_000_000, 120_000_000))
                self.loading.set()
                assert self.go.wait(60)
            elif name != "ann/first":
                raise NotACausalLM(f"{name} does not continue text token by token; choose a causal language model.")
            return dataclasses.replace(loaded(engine.model, n_context=N_CONTEXT), model_id=name)

        engine = ScriptedEngine(load)
        made.set()
        return engine

    def close(self) -> None:
        self.go.set()
        self.app.close()
        self.runs.close()
        self.menu.close()
        self.runs.store.close()


@pytest.fixture
def served():
    made = []

    def make(**options) -> Served:
        made.append(Served(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pick(page, words: str) -> None:
    page.locator(".model-opener").click()
    page.locator(".model-item", has_text=words).click()


def test_switching_shows_how_far_it_is_and_keeps_the_chat(open_page, served):
    site = served(is_open=False)
    page = open_page(site.url)
    ask(page, "say: by the first")
    pick(page, "second")
    assert site.loading.wait(20)
    bar = page.get_by_role("progressbar", name="Loading the model")
    expect(bar).to_have_attribute("aria-valuenow", "25", timeout=WAIT_MS)
    expect(page.locator(".model-opener")).to_contain_text("first")
    assert ask(page, "say: still by the first") == "still by the first"
    site.go.set()
    expect(page.locator(".model-opener")).to_contain_text("second", timeout=WAIT_MS)
    expect(bar).to_be_hidden()
    assert ask(page, "say: by the second") == "by the second"
    expect(page.locator("#chatbot .message.bot")).to_have_count(3)
    models = site.runs.store._database.run(
        lambda db: [row["model"] for row in db.execute("SELECT model FROM message WHERE role = 'assistant'")]
    )
    assert models == ["ann/first", "ann/first", "ann/second"]
    page.reload()
    expect(page.locator(".model-opener")).to_contain_text("second", timeout=WAIT_MS)


def test_a_model_that_cannot_be_had_says_why_and_the_one_before_stays(open_page, served):
    page = open_page(served(is_open=False).url)
    ask(page, "say: before")
    pick(page, "broken")
    problem = page.get_by_role("alert")
    expect(problem).to_have_text(
        "ann/broken does not continue text token by token; choose a causal language model.", timeout=WAIT_MS
    )
    expect(page.locator(".model-opener")).to_contain_text("first")
    problem.get_by_role("button").click()
    expect(problem).to_have_text("")
    assert ask(page, "say: after") == "after"


def test_where_the_page_is_shared_only_what_is_listed_can_be_chosen(open_page, served):
    site = served(is_open=False)
    page = open_page(site.url)
    page.locator(".model-opener").click()
    expect(page.locator(".model-form")).to_be_hidden()
    expect(page.locator(".model-item")).to_have_count(3)
    page.evaluate(  # someone who writes the form's part for themselves
        """() => { const form = document.querySelector('.model-form'); form.hidden = false;
        form.querySelector('input').value = 'bob/unknown'; form.requestSubmit(); }"""
    )
    expect(page.get_by_role("alert")).to_have_text(
        "bob/unknown is not one of the models that are offered here; choose one of those.", timeout=WAIT_MS
    )
    assert [model.model_id for model in site.menu.models] == ["ann/first", "ann/second", "ann/broken"]


def test_at_home_any_name_can_be_typed_and_a_wrong_one_does_not_stay(open_page, served):
    site = served(is_open=True)
    page = open_page(site.url)
    page.locator(".model-opener").click()
    page.get_by_label("Any other model").fill("bob/unknown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("bob/unknown does not continue text", timeout=WAIT_MS)
    page.locator(".model-opener").click()
    expect(page.locator(".model-item")).to_have_count(3)
    assert [model.model_id for model in site.menu.models] == ["ann/first", "ann/second", "ann/broken"]


def test_what_is_worth_knowing_of_how_a_model_serves_is_told_until_there_is_news(open_page, served):
    site = served(is_open=False)
    assert site.menu.wait_ready(60)
    site.menu.first._engine._detail = "Requests take turns."
    page = open_page(site.url)
    line = page.locator("#status-line")
    expect(line).to_have_text("Requests take turns.", timeout=WAIT_MS)
    expect(line).to_have_attribute("data-state", "idle")
    ask(page, "say: x")
    expect(line).to_contain_text("Finished", timeout=WAIT_MS)


def test_on_a_phone_the_menu_has_room_beside_the_tabs(open_page, served):
    page = open_page(served(is_open=False).url, viewport={"width": 390, "height": 800})
    tab, opener = page.get_by_role("tab", name="Complete"), page.locator(".model-opener")
    assert opener.bounding_box()["x"] >= tab.bounding_box()["x"] + tab.bounding_box()["width"]
    opener.click()
    box = page.locator(".model-panel").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    expect(page.locator(".model-item")).to_have_text(["firstloaded", "second", "broken"])


def test_one_model_is_no_menu(page):
    expect(page.locator(".model-opener")).to_be_disabled()
    expect(last_reply(page)).to_have_count(0)
