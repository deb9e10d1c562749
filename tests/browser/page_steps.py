"""What people do on the page, for the tests: each step waits for what it leads to."""

import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

WAIT_MS = 60_000

# Notes every text that the last reply has shown, from before the page's own scripts run.
_WATCH = """
    window.shown = [];
    new MutationObserver(() => {
        const reply = document.querySelector('.live .message.bot');
        if (reply && window.shown.at(-1) !== reply.innerText) window.shown.push(reply.innerText);
    }).observe(document, {childList: true, subtree: true, characterData: true});
"""


def send(page: Any, text: str) -> None:
    """Send a message with the Enter key."""
    page.locator("#composer textarea").fill(text)
    page.locator("#composer textarea").press("Enter")


def wait_done(page: Any) -> None:
    """Wait for the reply's end."""
    expect(page.locator("#status-line")).to_have_attribute("data-state", "done", timeout=WAIT_MS)


def ask(page: Any, text: str) -> str:
    """Send a message and wait for the whole reply; give its text."""
    send(page, text)
    expect(page.locator("#chatbot .message.user").last).to_have_text(text.strip(), timeout=WAIT_MS)
    wait_done(page)
    return str(last_reply(page).inner_text())


def wait_until(page: Any, holds: Callable[[], bool]) -> None:
    """Wait for something on the server's side, while the browser goes on."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not holds():
        assert time.monotonic() < deadline
        page.wait_for_timeout(10)


def last_reply(page: Any) -> Any:
    """Find the last reply."""
    return page.locator("#chatbot .message.bot").last


def watch(page: Any) -> None:
    """Note from now on what the last reply shows, for `shown`."""
    page.context.add_init_script(_WATCH)
    page.evaluate(_WATCH)


def shown(page: Any) -> list[str]:
    """Give every text that the last reply has shown since `watch`."""
    return [text.strip() for text in page.evaluate("window.shown") if text.strip()]


def act(page: Any, name: str, row: str = ".live .bot-row") -> None:
    """Press one of the buttons under a message."""
    locator = page.locator(row).last
    locator.hover()
    locator.locator(f".action.{name}").click()


def choose(page: Any, conversation: Any, words: str) -> None:
    """Choose from the menu of a conversation in the sidebar."""
    conversation.hover()
    conversation.locator(".more").click()
    page.get_by_role("menuitem", name=words).click()
