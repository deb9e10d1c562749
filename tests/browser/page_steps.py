"""What people do on the page, for the tests: each step waits for what it leads to."""

import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

WAIT_MS = 60_000


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


def act(page: Any, name: str, row: str = ".live .bot-row") -> None:
    """Press one of the buttons under a message."""
    locator = page.locator(row).last
    locator.hover()
    locator.locator(f".action.{name}").click()
