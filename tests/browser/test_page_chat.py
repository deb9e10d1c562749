"""The chat as people use it: send, watch, stop, edit, regenerate, continue, undo, switch."""

import pytest
from playwright.sync_api import expect

from tests.browser.page_steps import WAIT_MS, act, ask, last_reply, send, wait_done, wait_until

pytestmark = pytest.mark.browser


def test_a_reply_grows_on_the_page_and_the_status_tells_how_it_went(page):
    page.evaluate(
        """() => { window.states = new Set(); new MutationObserver(() => {
            const reply = document.querySelector('.live .message.bot'); if (reply) window.states.add(reply.innerText);
        }).observe(document.querySelector('#chatbot'), {childList: true, subtree: true, characterData: true}); }"""
    )
    send(page, "slow: one two three four five")
    expect(page.locator("#status-line")).to_contain_text("Writing", timeout=WAIT_MS)
    wait_done(page)
    expect(last_reply(page)).to_have_text("one two three four five")
    states = page.evaluate("[...window.states]")
    assert len([s for s in states if "one two three four five".startswith(s.strip()) and s.strip()]) >= 5
    status = page.locator("#status").inner_text()
    assert "Finished · 24 tokens" in status
    assert "tokens/s" in status
    assert "first after" in status
    assert "seed" in status


def test_stop_ends_the_reply_and_keeps_what_is_there_and_continue_goes_on(page):
    send(page, "slow: " + "abcdefghij" * 8)
    expect(last_reply(page)).to_contain_text("abc", timeout=WAIT_MS)
    page.click("#stop")
    expect(page.locator("#status-line")).to_contain_text("Stopped", timeout=WAIT_MS)
    part = last_reply(page).inner_text().strip()
    assert "abc" in part
    assert len(part) < 80
    act(page, "resume")
    expect(last_reply(page)).to_have_text("abcdefghij" * 8, timeout=WAIT_MS)
    expect(page.locator("#send")).to_be_visible()


@pytest.fixture
def held_engine(engine):
    """The engine, whose `hold:` replies wait from their first chunk on until `go` is set."""
    engine.held.clear()
    engine.go.clear()
    yield engine
    engine.go.set()


def test_escape_stops_before_the_first_token(page, held_engine):
    send(page, "hold: never seen")
    assert held_engine.held.wait(20)
    run = held_engine._active
    expect(page.locator("#stop")).to_be_visible(timeout=WAIT_MS)
    page.keyboard.press("Escape")
    wait_until(page, lambda: run.cancelled)
    held_engine.go.set()
    expect(page.locator("#status-line")).to_contain_text("Stopped", timeout=WAIT_MS)
    expect(page.locator(".live .bot-row")).to_have_class("message-row bot-row empty")
    assert ask(page, "say: after that") == "after that"


def test_stop_while_the_prompt_is_read_ends_it_within_one_chunk(page, held_engine):
    send(page, "hold: " + "a long prompt " * 100)
    assert held_engine.held.wait(20)
    run, n_forwards = held_engine._active, held_engine.model.n_forwards
    expect(page.locator("#status-line")).to_contain_text("Reading the prompt · 0 %", timeout=WAIT_MS)
    page.click("#stop")
    wait_until(page, lambda: run.cancelled)
    held_engine.go.set()
    expect(page.locator("#status-line")).to_contain_text("Stopped · 0 tokens", timeout=WAIT_MS)
    assert len(run.generation.prompt_ids) > 1400
    assert held_engine.model.n_forwards == n_forwards
    assert run.log.finish.reason == "cancelled"
    assert ask(page, "say: after that") == "after that"


def test_stop_while_queued_leaves_the_queue_at_once(open_page, held_engine):
    ada, bob = open_page(), open_page()
    send(ada, "hold: ada first")
    assert held_engine.held.wait(20)
    send(bob, "say: never seen")
    expect(bob.locator("#status-line")).to_contain_text("1 ahead", timeout=WAIT_MS)
    bob.click("#stop")
    expect(bob.locator("#status-line")).to_contain_text("Stopped · 0 tokens", timeout=WAIT_MS)
    assert held_engine.status().n_queued == 0
    assert not held_engine.go.is_set()
    held_engine.go.set()
    expect(last_reply(ada)).to_have_text("ada first", timeout=WAIT_MS)
    expect(bob.locator(".live .bot-row")).to_have_class("message-row bot-row empty")
    assert ask(bob, "say: after that") == "after that"


def test_regenerate_replaces_the_last_reply(page):
    ask(page, "say: the same")
    first = page.locator(".live .bot-row .message").element_handle()
    act(page, "retry")
    page.wait_for_function("old => !old.isConnected", arg=first)
    wait_done(page)
    expect(page.locator("#chatbot .message.bot")).to_have_count(1)
    assert last_reply(page).inner_text() == "the same"


def test_editing_a_question_asks_it_again_and_drops_what_came_after(page):
    ask(page, "say: first answer")
    ask(page, "say: second answer")
    act(page, "edit", ".past .user-row >> nth=0")
    page.locator(".editor").fill("say: another answer")
    page.locator(".editor-bar .save").click()
    expect(last_reply(page)).to_have_text("another answer", timeout=WAIT_MS)
    expect(page.locator("#chatbot .message.user")).to_have_count(1)
    expect(page.locator("#chatbot .message.bot")).to_have_count(1)


def test_an_edited_reply_reads_as_edited_and_can_be_gone_on_with(page):
    ask(page, "say: one two three")
    act(page, "edit")
    page.locator(".editor").fill("one two")
    page.locator(".editor-bar .save").click()
    expect(last_reply(page)).to_have_text("one two", timeout=WAIT_MS)
    act(page, "resume")
    expect(last_reply(page)).to_have_text("one two three", timeout=WAIT_MS)


def test_undo_takes_the_exchange_back_into_the_composer(page):
    ask(page, "say: kept")
    ask(page, "say: taken back")
    act(page, "undo")
    expect(page.locator("#composer textarea")).to_have_value("say: taken back", timeout=WAIT_MS)
    expect(page.locator("#chatbot .message.user")).to_have_count(1)
    assert last_reply(page).inner_text() == "kept"


def test_copy_gives_the_text_as_it_was_written(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "say: **bold** and <b>this</b> & that")
    act(page, "copy")
    page.wait_for_function("async () => (await navigator.clipboard.readText()) === '**bold** and <b>this</b> & that'")


def test_a_failure_leaves_the_part_and_offers_a_retry_that_works(page):
    send(page, "fail: half a reply")
    expect(page.locator(".live .notice")).to_contain_text("the scripted failure", timeout=WAIT_MS)
    expect(last_reply(page)).to_have_text("half a reply")
    page.locator(".retry-error").click()
    expect(page.locator("#status-line")).to_contain_text("Finished", timeout=WAIT_MS)
    expect(page.locator(".retry-error")).to_have_count(0)
    assert last_reply(page).inner_text() == "half a reply"


def test_a_refused_message_comes_back_to_the_composer_with_the_reason(page):
    ask(page, "say: before")
    text = "say: " + "long " * 1200
    send(page, text)
    expect(page.locator("#status-line")).to_contain_text("tokens long but the model can read at most", timeout=WAIT_MS)
    expect(page.locator("#composer textarea")).to_have_value(text)
    expect(page.locator("#chatbot .message.user")).to_have_count(1)
    assert ask(page, "say: after") == "after"


def test_a_value_out_of_range_is_told_at_its_field_and_the_message_stays(page):
    page.locator("#temperature input").fill("9")
    send(page, "say: not sent")
    expect(page.locator("#temperature")).to_contain_text("Between 0 and 5", timeout=WAIT_MS)
    expect(page.locator("#composer textarea")).to_have_value("say: not sent")
    expect(page.locator("#chatbot .message.user")).to_have_count(0)
    page.locator("#temperature input").fill("0")
    page.locator("#composer textarea").press("Enter")
    expect(last_reply(page)).to_have_text("not sent", timeout=WAIT_MS)


def test_a_value_out_of_range_is_told_on_leaving_its_field(page):
    page.locator("#top-p input").fill("2")
    page.locator("#top-p input").press("Tab")
    expect(page.locator("#top-p")).to_contain_text("Between 0 and 1", timeout=WAIT_MS)
    page.locator("#top-p input").fill("1")
    page.locator("#top-p input").press("Tab")
    expect(page.locator("#top-p")).not_to_contain_text("Between 0 and 1", timeout=WAIT_MS)


def test_what_was_typed_and_not_sent_outlives_a_reload(page):
    page.locator("#composer textarea").fill("half a thought\nin two lines")
    page.reload()
    expect(page.locator("#composer textarea")).to_have_value("half a thought\nin two lines", timeout=WAIT_MS)
    ask(page, "say: sent")
    page.reload()
    page.wait_for_selector(".conversation")
    expect(page.locator("#composer textarea")).to_have_value("")


def test_settings_reach_the_model(page, engine):
    page.locator("#max-new-tokens input").fill("3")
    page.locator("#seed input").fill("42")
    page.locator("#system-prompt textarea").fill("Be brief.")
    assert ask(page, "say: abcdef") == "abc"
    expect(page.locator("#status-line")).to_contain_text("Stopped at the length limit · 3 tokens")
    expect(page.locator("#status-line")).to_contain_text("seed 42")
    expect(page.locator("#seed")).to_contain_text("last used 42", timeout=WAIT_MS)


def test_presets_fill_the_fields_and_own_values_are_kept_in_the_browser(open_page):
    page = open_page()
    page.get_by_label("Creative").check()
    expect(page.locator("#temperature input")).to_have_value("1.1", timeout=WAIT_MS)
    page.locator("#temperature input").fill("0.4")
    expect(page.get_by_label("Yours")).to_be_checked(timeout=WAIT_MS)
    page.get_by_label("Precise").check()
    expect(page.locator("#temperature input")).to_have_value("0", timeout=WAIT_MS)
    page.reload()
    page.wait_for_selector(".conversation")
    page.get_by_label("Yours").check()
    expect(page.locator("#temperature input")).to_have_value("0.4", timeout=WAIT_MS)


def test_conversations_can_be_begun_switched_and_deleted(page):
    ask(page, "say: in the first")
    page.click("#new-chat")
    expect(page.locator("#chatbot .message")).to_have_count(0, timeout=WAIT_MS)
    ask(page, "say: in the second")
    expect(page.locator(".conversation")).to_have_count(2)
    page.locator(".conversation .open", has_text="in the first").click()
    expect(last_reply(page)).to_have_text("in the first", timeout=WAIT_MS)
    page.locator(".conversation.active").hover()
    page.locator(".conversation.active .remove").click()
    expect(page.locator(".conversation")).to_have_count(1, timeout=WAIT_MS)
    expect(last_reply(page)).to_have_text("in the second", timeout=WAIT_MS)


def test_a_reply_goes_on_while_another_conversation_is_shown(page):
    text = "it goes on and on until it ends"
    send(page, f"slow: {text}")
    expect(last_reply(page)).to_contain_text("it", timeout=WAIT_MS)
    page.click("#new-chat")
    expect(page.locator("#chatbot .message")).to_have_count(0, timeout=WAIT_MS)
    page.locator(".conversation .open", has_text="slow").click()
    expect(last_reply(page)).to_have_text(text, timeout=WAIT_MS)
    expect(page.locator(".conversation.busy")).to_have_count(0, timeout=WAIT_MS)


def test_two_people_at_once_do_not_mix(open_page):
    ada, bob = open_page(), open_page()
    send(ada, "slow: this is for Ada alone")
    send(bob, "slow: this is for Bob alone")
    expect(last_reply(ada)).to_have_text("this is for Ada alone", timeout=WAIT_MS)
    expect(last_reply(bob)).to_have_text("this is for Bob alone", timeout=WAIT_MS)
    assert "Bob" not in ada.locator("body").inner_text()
    assert "Ada" not in bob.locator("body").inner_text()


def test_closing_the_browser_frees_the_model(open_page, engine):
    page = open_page()
    send(page, "slow: " + "x" * 200)
    expect(last_reply(page)).to_contain_text("x", timeout=WAIT_MS)
    run = engine._active.generation
    page.context.close()
    finish = run.log.wait_finish(20)
    assert finish is not None
    assert finish.reason == "cancelled"


def test_keys(page):
    composer = page.locator("#composer textarea")
    page.locator("#chatbot").click()
    page.keyboard.press("/")
    expect(composer).to_be_focused()
    page.keyboard.type("say: two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    expect(composer).to_have_value("say: two\nlines")
    page.keyboard.press("Enter")
    expect(last_reply(page)).to_contain_text("two", timeout=WAIT_MS)
    expect(composer).to_have_value("")
