"""The page itself: it loads quietly, from here alone, says how far the model is, and fits every screen."""

import io
import threading
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.browser.conftest import serve
from tests.browser.page_steps import WAIT_MS, ask, last_reply, send
from tests.scripted import N_CONTEXT, ScriptedEngine
from tests.tiny import loaded

pytestmark = pytest.mark.browser


def test_it_loads_without_an_error_and_offers_examples(page):
    expect(page.locator(".welcome h1")).to_be_visible()
    assert page.seen_errors == []
    page.locator(".example").first.click()
    expect(page.locator("#chatbot .message.user")).to_have_count(1, timeout=WAIT_MS)
    expect(last_reply(page)).not_to_be_empty(timeout=WAIT_MS)
    expect(page.locator(".welcome")).to_be_hidden()


def test_it_asks_nothing_of_any_other_origin(page, url):
    ask(page, "say: A formula $x^2$ and `code` and ![a picture](https://example.com/a.png)")
    expect(last_reply(page).locator(".katex")).to_have_count(1, timeout=WAIT_MS)
    page.get_by_role("tab", name="Complete").click()
    own = urlsplit(url).netloc
    asked = {urlsplit(r).netloc for r in page.requested if urlsplit(r).scheme in ("http", "https", "ws", "wss")}
    assert asked == {own}
    assert page.seen_errors == []


def test_the_browser_is_told_to_load_from_here_alone(page, url):
    policy = page.request.get(url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_it_comes_up_while_the_model_loads_and_says_so(open_page):
    ready = threading.Event()

    def load(progress):
        ready.wait(60)
        return loaded(engine.model, n_context=N_CONTEXT)

    engine = ScriptedEngine(load)
    app, url = serve(engine)
    try:
        page = open_page(url)
        expect(page.locator("#status-line")).to_contain_text("Loading the model", timeout=WAIT_MS)
        send(page, "say: too early")
        expect(page.locator("#stop")).to_be_visible(timeout=WAIT_MS)
        page.click("#stop")
        expect(page.locator("#status-line")).to_contain_text("Stopped before it began", timeout=WAIT_MS)
        send(page, "say: patient")
        expect(page.locator("#status-line")).to_contain_text("Loading the model", timeout=WAIT_MS)
        ready.set()
        expect(last_reply(page)).to_have_text("patient", timeout=WAIT_MS)
    finally:
        ready.set()
        app.close()
        engine.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_and_used_at_every_size(open_page, scheme, width):
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    ask(page, "say: A line that is long enough to need more than one row on the screen of a phone, as they often are.")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for part in ("#composer textarea", "#send", "#status-line"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 800
    image = Image.open(io.BytesIO(page.screenshot())).convert("L")
    histogram = image.histogram()
    commonest = max(range(256), key=lambda i: histogram[i])
    assert (commonest > 200) == (scheme == "light")
    assert sum(1 for n in histogram if n) > 30


def test_light_and_dark_can_be_switched_and_stay_switched(open_page):
    page = open_page(color_scheme="light")
    page.get_by_label("Light or dark").click()
    expect(page.locator("body.dark")).to_have_count(1)
    page.reload()
    page.wait_for_selector(".conversation")
    expect(page.locator("body.dark")).to_have_count(1)


def test_on_a_phone_the_sides_are_drawers(open_page):
    page = open_page(viewport={"width": 390, "height": 800})
    expect(page.locator("#settings")).not_to_be_in_viewport()
    page.locator("#header").get_by_label("Settings").click()
    expect(page.locator("#temperature input")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_in_viewport()
    page.locator("#header").get_by_label("Conversations").click()
    expect(page.locator("#new-chat")).to_be_in_viewport()


def test_scrolling_up_is_left_alone_and_the_end_is_one_press_away(page):
    send(page, "slow: " + "\n\n".join(f"line {i}" for i in range(30)))
    expect(last_reply(page)).to_contain_text("line 22", timeout=WAIT_MS)
    box = page.locator("#chatbot")
    box.hover()
    page.mouse.wheel(0, -3000)
    expect(page.locator(".to-end")).to_be_visible(timeout=WAIT_MS)
    top = box.evaluate("node => node.scrollTop")
    expect(last_reply(page)).to_contain_text("line 27", timeout=WAIT_MS)
    assert box.evaluate("node => node.scrollTop") == top
    page.locator(".to-end").click()
    page.wait_for_function("b => b.scrollHeight - b.scrollTop < b.clientHeight + 4", arg=box.element_handle())


def test_complete_goes_on_with_the_text(page):
    page.get_by_role("tab", name="Complete").click()
    text = page.locator("#complete-text textarea")
    expect(text).to_have_value("An increasing sequence: one,")
    page.locator("#complete-go").click()
    expect(text).to_have_value("An increasing sequence: one,and so on", timeout=WAIT_MS)
    expect(page.locator("#complete-go")).to_be_visible(timeout=WAIT_MS)
    text.fill("Edited,")
    page.locator("#complete-go").click()
    expect(text).to_have_value("Edited,and so on", timeout=WAIT_MS)


def test_whoever_chats_and_completes_is_one_person(page, open_page, engine, monkeypatch):
    owners, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: owners.append(request.owner) or submit(request))
    for tab in (page, open_page()):
        ask(tab, "say: a word")
        tab.get_by_role("tab", name="Complete").click()
        text = tab.locator("#complete-text textarea")
        for begun in ("One", "Two"):
            text.fill(begun)
            tab.locator("#complete-go").click()
            expect(text).to_have_value(f"{begun}and so on", timeout=WAIT_MS)
            expect(tab.locator("#complete-go")).to_be_visible(timeout=WAIT_MS)
    first, other = owners[0], owners[3]
    assert owners == [first] * 3 + [other] * 3
    assert first != other
