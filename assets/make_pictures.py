"""Make the README's pictures from the real page with the real model: `python assets/make_pictures.py`.

Needs requirements-dev.txt and Debian's chromium. Starts the app on a free loopback port and stops it at the end.
"""

import contextlib
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

ASSETS = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
START_TIMEOUT_S = 180
REPLY_TIMEOUT_MS = 180_000
FRAME_S = 0.12
QUESTION = "Write a Python function that counts the words in a text, and explain it in a few sentences."


@contextlib.contextmanager
def running_app() -> Iterator[str]:
    """Serve the app for the time of a block; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=ASSETS.parent)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def open_page(browser: Browser, url: str, scheme: str, width: int, height: int) -> Page:
    """Open the page in a context of its own, and wait for the model."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=2 if width < 500 else 1,
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#composer textarea")).to_be_visible(timeout=60_000)
    return page


def ask(page: Page, text: str) -> None:
    page.locator("#composer textarea").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible(timeout=REPLY_TIMEOUT_MS)


def wait_for_end(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("tokens/s", timeout=REPLY_TIMEOUT_MS)
    expect(page.locator("#stop")).to_be_hidden(timeout=REPLY_TIMEOUT_MS)


def record(page: Page, path: Path) -> None:
    """Film a whole reply, from the empty page to its last word."""
    frames: list[tuple[Image.Image, int]] = []

    def shoot(hold_ms: int) -> None:
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        frames.append((picture, hold_ms))

    shoot(900)
    composer = page.locator("#composer textarea")
    for end in range(4, len(QUESTION) + 4, 4):
        composer.fill(QUESTION[:end])
        shoot(40)
    page.keyboard.press("Enter")
    deadline = time.monotonic() + REPLY_TIMEOUT_MS / 1000
    expect(page.locator("#stop")).to_be_visible(timeout=REPLY_TIMEOUT_MS)
    while page.locator("#stop").is_visible() and time.monotonic() < deadline:
        started = time.monotonic()
        shoot(int(FRAME_S * 1000))
        time.sleep(max(0.0, FRAME_S - (time.monotonic() - started)))
    shoot(2500)
    first, *rest = [picture for picture, _ in frames]
    first.save(path, save_all=True, append_images=rest, duration=[ms for _, ms in frames], loop=0, quality=70, method=4)


def main() -> None:
    with running_app() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        record(open_page(browser, url, "light", 1100, 720), ASSETS / "streaming.webp")
        for name, scheme, width, height in [
            ("light", "light", 1280, 800),
            ("dark", "dark", 1280, 800),
            ("phone", "light", 390, 844),
        ]:
            page = open_page(browser, url, scheme, width, height)
            ask(page, QUESTION)
            wait_for_end(page)
            page.screenshot(path=ASSETS / f"{name}.png")
            page.context.close()
        browser.close()


if __name__ == "__main__":
    main()
