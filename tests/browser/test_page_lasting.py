"""What outlives a tab: replies that go on, are followed from anywhere, and are there when people come back."""

import itertools
import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from streaming.conversations.store import Store
from streaming.server.runs import Runs
from streaming.settings import Settings
from streaming.ui.build import build_app, launch_app
from tests.browser.conftest import serve
from tests.browser.page_steps import WAIT_MS, ask, last_reply, send, shown, wait_done, watch
from tests.cutoff import cable

pytestmark = pytest.mark.browser

LONG = "from the first character to the last, none doubled and none missing, whatever happens to the page meanwhile"


def second_tab(page, url):
    tab = page.context.new_page()
    tab.goto(url)
    tab.wait_for_selector(".conversation", state="attached")
    return tab


def test_after_a_reload_the_reply_grows_on_from_what_was_there(page):
    watch(page)
    ask(page, "say: before")
    send(page, f"slow: {LONG}")
    expect(last_reply(page)).to_contain_text("character", timeout=WAIT_MS)
    before = last_reply(page).inner_text().strip()
    page.reload()
    expect(last_reply(page)).to_have_text(LONG, timeout=WAIT_MS)
    wait_done(page)
    texts = shown(page)
    assert texts[0].startswith(before)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == LONG
    assert len(texts) > 3
    assert page.locator("#chatbot .message").all_inner_texts() == ["say: before", "before", f"slow: {LONG}", LONG]
    page.reload()
    expect(page.locator("#chatbot .message")).to_have_count(4, timeout=WAIT_MS)
    assert last_reply(page).inner_text() == LONG


def test_a_second_tab_shows_the_reply_that_is_being_written_and_stops_it_for_both(page, url):
    watch(page)
    send(page, "slow: " + "abcdefghij" * 20)
    expect(last_reply(page)).to_contain_text("abc", timeout=WAIT_MS)
    tab = second_tab(page, url)
    expect(last_reply(tab)).to_contain_text("abcdefghijabc", timeout=WAIT_MS)
    tab.click("#stop")
    for each in (page, tab):
        expect(each.locator("#status-line")).to_contain_text("Stopped", timeout=WAIT_MS)
    text = last_reply(page).inner_text()
    assert last_reply(tab).inner_text() == text
    assert len(text) < 200
    assert all(text.startswith(earlier) for earlier in shown(tab))


def test_a_tab_that_stands_beside_follows_what_is_asked_in_another(page, url):
    ask(page, "say: before")
    tab = second_tab(page, url)
    tab.locator(".conversation .open", has_text="before").click()
    expect(last_reply(tab)).to_have_text("before", timeout=WAIT_MS)
    page.bring_to_front()
    send(page, f"slow: {LONG}")
    expect(last_reply(tab)).to_have_text(LONG, timeout=WAIT_MS)
    wait_done(tab)
    send(tab, "say: and back")
    expect(last_reply(page)).to_have_text("and back", timeout=WAIT_MS)
    assert page.locator("#chatbot .message").all_inner_texts() == tab.locator("#chatbot .message").all_inner_texts()


def test_what_nobody_watches_is_stopped_kept_and_gone_on_with(page, url, engine, short_grace):
    send(page, "slow: " + "x" * 200)
    expect(last_reply(page)).to_contain_text("x", timeout=WAIT_MS)
    run = engine._active
    context = page.context
    page.close()
    assert run.log.wait_finish(20).reason == "cancelled"
    part = run.log.text()
    assert 0 < len(part) < 200
    tab = context.new_page()
    tab.goto(url)
    tab.locator(".conversation .open", has_text="slow").click()
    expect(last_reply(tab)).to_have_text(part, timeout=WAIT_MS)
    expect(tab.locator(".live .notice")).to_contain_text("Stopped: nobody was watching.")
    tab.locator(".resume-notice").click()
    expect(last_reply(tab)).to_have_text("x" * 200, timeout=WAIT_MS)
    wait_done(tab)
    expect(tab.locator(".live .notice")).to_be_empty()


@pytest.mark.parametrize("way", ["the browser is offline", "the cable is pulled"])
def test_a_network_that_is_gone_for_a_while_costs_nothing(open_page, url, way):
    with cable(urlsplit(url).port) as line:
        page = open_page(line.url)
        watch(page)
        page.locator("#max-new-tokens input").fill("1000")
        send(page, f"slow: {LONG * 4}")
        expect(last_reply(page)).to_contain_text("character", timeout=WAIT_MS)
        page.locator("#composer textarea").fill("a draft")
        if way == "the cable is pulled":
            line.cut()
        else:
            page.context.set_offline(True)
        page.wait_for_timeout(10_000)
        line.mend()
        page.context.set_offline(False)
        expect(last_reply(page)).to_have_text(LONG * 4, timeout=WAIT_MS)
        wait_done(page)
        texts = shown(page)
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        expect(page.locator("#composer textarea")).to_have_value("a draft")
        page.context.close()


def test_a_tab_has_one_stream_of_events_which_is_never_closed(page):
    for text in ("one", "two"):
        page.locator("#top-p input").fill("1")
        page.locator("#top-p input").press("Tab")
        ask(page, f"say: {text}")
    assert len([r for r in page.requested if "queue/data" in r]) == 1


def test_another_person_gets_nothing_by_an_id(open_page):
    ada, bob = open_page(), open_page()
    ask(ada, "say: for Ada alone")
    stolen = ada.evaluate("sessionStorage.getItem('brook-conversation')")
    bob.evaluate("id => sessionStorage.setItem('brook-conversation', id)", stolen)
    bob.reload()
    bob.wait_for_selector(".conversation")
    ask(bob, "say: Bob's own")
    assert "Ada" not in bob.locator("body").inner_text()
    assert bob.evaluate("sessionStorage.getItem('brook-conversation')") != stolen
    ada.reload()
    expect(last_reply(ada)).to_have_text("for Ada alone", timeout=WAIT_MS)


def test_the_browsers_secret_is_long_and_its_own(open_page):
    one, other = open_page(), open_page()
    secrets = [page.evaluate("localStorage.getItem('brook-browser')") for page in (one, other)]
    assert secrets[0] != secrets[1]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{32}", secret) for secret in secrets)
    one.reload()
    one.wait_for_selector(".conversation")
    assert one.evaluate("localStorage.getItem('brook-browser')") == secrets[0]


def test_a_connection_that_dies_without_a_word_is_noticed(open_page, url):
    with cable(urlsplit(url).port) as line:
        page = open_page(line.url)
        watch(page)
        page.locator("#max-new-tokens input").fill("1000")
        send(page, f"slow: {LONG * 6}")
        expect(last_reply(page)).to_contain_text("character", timeout=WAIT_MS)
        line.silence()
        expect(last_reply(page)).to_have_text(LONG * 6, timeout=WAIT_MS)
        texts = shown(page)
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        page.context.close()


@pytest.fixture
def url_with_accounts(engine):
    runs = Runs(engine)
    app = build_app(engine, runs)
    address, _ = launch_app(app, engine, Settings(port=0, auth=(("ada", "pa55"), ("bob", "pa55"))))
    yield address
    app.close()
    runs.close()
    runs.store.close()


def test_an_account_sees_its_own_from_every_device_and_nobody_elses(chromium, url_with_accounts):
    contexts = []

    def sign_in(name):
        contexts.append(chromium.new_context())
        page = contexts[-1].new_page()
        page.goto(url_with_accounts)
        page.get_by_label("username").fill(name)
        page.get_by_label("password").fill("pa55")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector(".conversation", state="attached", timeout=WAIT_MS)
        return page

    laptop = sign_in("ada")
    lasting = f"{LONG}, {LONG}"  # as long as a reply may be: on a slow machine it takes seconds to sign in
    send(laptop, f"slow: {lasting}")
    expect(last_reply(laptop)).to_contain_text("character", timeout=WAIT_MS)
    phone, bob = sign_in("ada"), sign_in("bob")
    expect(last_reply(phone)).to_have_text(lasting, timeout=WAIT_MS)
    wait_done(laptop)
    expect(bob.locator(".conversation")).to_have_count(1)
    expect(bob.locator("#chatbot .message")).to_have_count(0)
    assert "character" not in bob.locator("body").inner_text()
    for context in contexts:
        context.close()


def test_where_conversations_cannot_be_kept_the_page_says_so_and_goes_on(open_page, engine, tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    runs = Runs(engine, second)
    app, address = serve(engine, runs)
    page = open_page(address)
    expect(page.get_by_text("conversations are kept only until Brook ends")).to_be_visible(timeout=WAIT_MS)
    assert ask(page, "say: it goes on") == "it goes on"
    page.reload()
    expect(last_reply(page)).to_have_text("it goes on", timeout=WAIT_MS)
    page.close()
    app.close()
    runs.close()
    for store in (first, second):
        store.close()
