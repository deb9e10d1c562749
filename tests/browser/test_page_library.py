"""The sidebar and what a conversation holds: search, names, dates, branches, thumbs, and files out and in."""

import dataclasses
import json
import time

import pytest
from playwright.sync_api import expect

from streaming.conversations.transfer import FORMATS, read_conversations
from streaming.conversations.tree import Conversation, Message
from tests.browser.page_steps import WAIT_MS, act, ask, choose, last_reply, wait_done

pytestmark = pytest.mark.browser

DAY_S = 24 * 3600


def titles(page) -> list[str]:
    return page.locator(".conversation .title").all_inner_texts()


def open_files(page) -> None:
    page.locator(".files-opener").click()
    expect(page.locator("dialog.files")).to_be_visible()


def give(page, name: str, text: str) -> None:
    """Import a file."""
    open_files(page)
    page.locator(".files-choose input").set_input_files(
        {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    )


def take(page, form: str, *, everything: bool = False) -> tuple[str, str]:
    """Export in a format; give the file's name and its text."""
    open_files(page)
    if everything:
        page.get_by_label("All chats").check(force=True)
    with page.expect_download(timeout=WAIT_MS) as download:
        page.locator(f".files-format[data-form={form}]").click()
    page.keyboard.press("Escape")
    return download.value.suggested_filename, download.value.path().read_text()


def old_chat(text: str, days: float) -> Conversation:
    at = time.time() - days * DAY_S
    conversation = Conversation(owner="", created_at=at).add(Message(role="user", content=text, created_at=at))
    reply = Message(role="assistant", content=f"About {text}.", parent=conversation.leaf, reason="stop", created_at=at)
    return dataclasses.replace(conversation.add(reply), updated_at=at)


class TestSidebar:
    def test_conversations_stand_under_their_dates_and_pinned_ones_first(self, page):
        several = [old_chat("rivers", 0), old_chat("lakes", 1), old_chat("seas", 3), old_chat("ponds", 400)]
        give(page, "old.json", FORMATS["json"].write(several))
        expect(page.locator(".files-said")).to_have_text("4 chats were imported.", timeout=WAIT_MS)
        page.keyboard.press("Escape")
        assert titles(page) == ["rivers", "lakes", "seas", "ponds"]
        groups = page.locator(".conversation-group").all_inner_texts()
        assert groups[:3] == ["Today", "Yesterday", "The week before"]
        assert len(groups) == 4
        choose(page, page.locator(".conversation", has_text="ponds"), "Pin")
        expect(page.locator(".conversation .title").first).to_have_text("ponds", timeout=WAIT_MS)
        assert page.locator(".conversation-group").first.inner_text() == "Pinned"

    def test_search_finds_what_was_said_and_shows_where(self, page):
        ask(page, "say: the kingfisher is blue")
        page.click("#new-chat")
        expect(page.locator("#chatbot .message")).to_have_count(0, timeout=WAIT_MS)
        ask(page, "say: the heron is grey")
        page.locator(".conversation-search").fill("kingfish")
        expect(page.locator(".conversation")).to_have_count(1, timeout=WAIT_MS)
        expect(page.locator(".conversation .excerpt")).to_contain_text("kingfisher is blue")
        page.locator(".conversation .open").click()
        expect(last_reply(page)).to_have_text("the kingfisher is blue", timeout=WAIT_MS)
        page.locator(".conversation-search").fill("no such words")
        expect(page.locator(".conversation-none")).to_be_visible(timeout=WAIT_MS)
        page.locator(".conversation-search").press("Escape")
        expect(page.locator(".conversation")).to_have_count(2, timeout=WAIT_MS)

    def test_a_conversation_can_be_renamed_and_the_name_is_text(self, page):
        ask(page, "say: something")
        choose(page, page.locator(".conversation"), "Rename")
        page.locator(".renaming").fill("<b>My</b> rivers")
        page.locator(".renaming").press("Enter")
        expect(page.locator(".conversation .title")).to_have_text("<b>My</b> rivers", timeout=WAIT_MS)
        page.reload()
        expect(page.locator(".conversation .title")).to_have_text("<b>My</b> rivers", timeout=WAIT_MS)
        choose(page, page.locator(".conversation"), "Rename")
        page.locator(".renaming").fill("not kept")
        page.locator(".renaming").press("Escape")
        expect(page.locator(".conversation .title")).to_have_text("<b>My</b> rivers")

    def test_a_deletion_can_be_undone(self, page):
        ask(page, "say: kept after all")
        choose(page, page.locator(".conversation"), "Delete")
        expect(page.locator("#chatbot .message")).to_have_count(0, timeout=WAIT_MS)
        expect(page.locator(".toast")).to_contain_text("was deleted")
        page.locator(".toast button").click()
        expect(last_reply(page)).to_have_text("kept after all", timeout=WAIT_MS)
        assert titles(page) == ["say: kept after all"]

    def test_hundreds_of_conversations_stay_quick(self, page):
        several = [old_chat(f"chat number {i}", i / 10) for i in range(600)]
        give(page, "many.json", FORMATS["json"].write(several))
        expect(page.locator(".files-said")).to_have_text("600 chats were imported.", timeout=WAIT_MS)
        page.keyboard.press("Escape")
        assert page.locator(".conversation").count() == 600
        started = time.monotonic()
        page.locator(".conversation .open").nth(3).click()
        expect(last_reply(page)).to_have_text("About chat number 3.", timeout=WAIT_MS)
        assert time.monotonic() - started < 5, "a machine with other work to do, and still no waiting"
        drawn_ms = page.evaluate(
            """() => { const list = document.querySelector('.conversation-list'); const begun = performance.now();
            list.replaceChildren(...list.children); list.getBoundingClientRect(); return performance.now() - begun; }"""
        )
        assert drawn_ms < 200


class TestBranches:
    def test_arrows_switch_between_the_versions_of_a_reply_and_the_model_goes_on_from_either(self, page):
        ask(page, "slow: one two")
        page.locator("#max-new-tokens input").fill("3")
        act(page, "retry")
        expect(page.locator(".live .branch-switch")).to_have_text("2 / 2", timeout=WAIT_MS)
        wait_done(page)
        expect(last_reply(page)).to_have_text("one")
        act(page, "previous")
        expect(last_reply(page)).to_have_text("one two", timeout=WAIT_MS)
        expect(page.locator(".live .branch-switch")).to_have_text("1 / 2")
        page.locator("#max-new-tokens input").fill("256")
        ask(page, "say: after the first")
        expect(page.locator(".past .message.bot")).to_have_text("one two")
        act(page, "next", ".past .bot-row")
        expect(last_reply(page)).to_have_text("one", timeout=WAIT_MS)
        expect(page.locator("#chatbot .message.bot")).to_have_count(1)
        act(page, "resume")
        expect(last_reply(page)).to_have_text("one two", timeout=WAIT_MS)

    def test_an_edited_question_keeps_the_one_before_and_what_followed_it(self, page):
        ask(page, "say: old answer")
        ask(page, "say: and more")
        act(page, "edit", ".past .user-row >> nth=0")
        page.locator(".editor").fill("say: new answer")
        page.locator(".editor-bar .save").click()
        expect(last_reply(page)).to_have_text("new answer", timeout=WAIT_MS)
        wait_done(page)
        act(page, "previous", ".past .user-row")
        expect(last_reply(page)).to_have_text("and more", timeout=WAIT_MS)
        expect(page.locator("#chatbot .message.user")).to_have_count(2)

    def test_the_tree_shows_every_branch_and_leads_there(self, page):
        expect(page.locator(".fork")).to_be_hidden()
        ask(page, "say: the first branch")
        act(page, "edit", ".past .user-row")
        page.locator(".editor").fill("say: the second branch")
        page.locator(".editor-bar .save").click()
        expect(last_reply(page)).to_have_text("the second branch", timeout=WAIT_MS)
        wait_done(page)
        page.get_by_role("button", name="Branches of this chat").click()
        lines = page.locator(".tree-line")
        texts = ["say: the first branch", "the first branch", "say: the second branch", "the second branch"]
        expect(lines).to_have_text(texts)
        expect(page.locator(".tree-line.shown")).to_have_count(2)
        expect(page.locator(".tree-line[aria-current]")).to_be_focused()
        lines.nth(1).click()
        expect(last_reply(page)).to_have_text("the first branch", timeout=WAIT_MS)
        page.reload()
        expect(last_reply(page)).to_have_text("the first branch", timeout=WAIT_MS)


class TestFeedback:
    def test_thumbs_and_a_note_are_kept_and_can_be_exported(self, page):
        ask(page, "say: well said")
        act(page, "good")
        page.locator(".feedback input").fill("clear & <b>short</b>")
        page.locator(".feedback button").click()
        expect(page.locator(".feedback")).to_have_count(0)
        page.reload()
        expect(page.locator(".action.good")).to_have_attribute("aria-pressed", "true", timeout=WAIT_MS)
        name, text = take(page, "feedback")
        assert name == "say-well-said.feedback.jsonl"
        [line] = [json.loads(line) for line in text.splitlines()]
        assert (line["rating"], line["note"], line["reply"]) == (1, "clear & <b>short</b>", "well said")
        act(page, "good")
        expect(page.locator(".action.good")).to_have_attribute("aria-pressed", "false")
        open_files(page)
        page.locator(".files-format[data-form=feedback]").click()
        expect(page.locator(".files-said")).to_have_text("No reply was rated yet.", timeout=WAIT_MS)


class TestFiles:
    def test_what_is_exported_comes_back_in_another_browser(self, open_page):
        page = open_page()
        ask(page, "say: from here")
        act(page, "retry")
        expect(page.locator(".live .branch-switch")).to_have_text("2 / 2", timeout=WAIT_MS)
        wait_done(page)
        name, text = take(page, "json", everything=True)
        assert name == "brook-conversations.json"
        other = open_page()
        give(other, name, text)
        expect(other.locator(".files-said")).to_have_text("1 chat was imported.", timeout=WAIT_MS)
        other.keyboard.press("Escape")
        expect(last_reply(other)).to_have_text("from here")
        expect(other.locator(".live .branch-switch")).to_have_text("2 / 2")
        _, again = take(other, "json", everything=True)
        [first], [second] = read_conversations(text, "me"), read_conversations(again, "me")
        assert dataclasses.replace(second, id=first.id) == first

    @pytest.mark.parametrize("form", ["markdown", "openai", "sharegpt"])
    def test_what_is_shown_is_exported_in_the_usual_formats(self, page, form):
        ask(page, "say: **bold** é🎉")
        name, text = take(page, form)
        assert name.startswith("say-bold-é.")
        [back] = read_conversations(text, "me")
        assert [m.content for m in back.path()] == ["say: **bold** é🎉", "**bold** é🎉"]

    def test_a_bad_file_is_refused_with_its_line_and_changes_nothing(self, page):
        ask(page, "say: still here")
        give(page, "bad.jsonl", '{"messages": [{"role": "user", "content": "fine"}]}\n{"messages": [{"role": 5}]}\n')
        expect(page.locator(".files-said")).to_have_text(
            "Line 2: 'role' must be text. Nothing was imported.", timeout=WAIT_MS
        )
        page.keyboard.press("Escape")
        assert titles(page) == ["say: still here"]
        expect(last_reply(page)).to_have_text("still here")

    def test_a_chat_becomes_a_page_of_its_own_without_a_script(self, open_page, tmp_path):
        page = open_page(color_scheme="dark")
        hostile = "<img src=x onerror=alert(1)> <script>alert(1)</script> **bold** $x^2$\n\n```python\nprint(1)\n```"
        ask(page, f"say: {hostile}")
        expect(last_reply(page).locator(".katex")).to_have_count(1, timeout=WAIT_MS)
        page.locator(".files-opener").click()
        with page.expect_download(timeout=WAIT_MS) as download:
            page.locator(".files-format[data-form=html]").click()
        file = tmp_path / "chat.html"
        download.value.save_as(file)
        text = file.read_text()
        assert "<script" not in text
        assert "default-src 'none'" in text
        reader = page.context.new_page()
        seen, requested = [], []
        reader.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        reader.on("request", lambda request: requested.append(request.url))
        reader.goto(file.as_uri())
        assert reader.locator(".message.user").inner_text() == f"say: {hostile}"
        assert "<img src=x onerror=alert(1)>" in reader.locator(".message.bot").inner_text()
        expect(reader.locator(".message.bot strong")).to_have_text("bold")
        expect(reader.locator("math")).to_have_count(1)
        expect(reader.locator("button, img, script, input")).to_have_count(0)
        assert (seen, requested) == ([], [file.as_uri()])
        colours = "node => [getComputedStyle(node).backgroundColor, getComputedStyle(node).color]"
        assert reader.locator(".message.user").evaluate(colours) == page.locator(".message.user").evaluate(colours)
