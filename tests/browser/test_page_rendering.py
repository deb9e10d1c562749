"""What stands in the messages: markdown, formulas, reasoning, every direction, and never anyone's HTML."""

import pytest
from playwright.sync_api import expect

from tests.browser.page_steps import WAIT_MS, ask, last_reply, send

pytestmark = pytest.mark.browser

# Each would run `alert(1)`, fetch something, or draw an element if it were taken for HTML.
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><circle r=9></svg>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "![x](https://example.com/pixel.png)",
    '![x](x"onerror="alert(1))',
    "<b>bold</b><h1>big</h1><style>body{display:none}</style>",
    "<form action=https://example.com><button>go</button></form>",
    "`<img src=x onerror=alert(1)>`",
    "```html\n<img src=x onerror=alert(1)>\n```",
    '```"><img src=x onerror=alert(1)>\ncode\n```',
    "```mermaid\ngraph TD; A[<img src=x onerror=alert(1)>]\n```",
    "$$<img src=x onerror=alert(1)>$$",
    "$\\href{javascript:alert(1)}{x}$ and \\(\\htmlClass{evil}{<b>x</b>}\\)",
    "<think><img src=x onerror=alert(1)></think>${alert(1)} `${alert(1)}` {{constructor.constructor('alert(1)')()}}",
    "&lt;img src=x onerror=alert(1)&gt; <<img src=x onerror=alert(1)//",
    "| a |\n|---|\n| <img src=x onerror=alert(1)> |",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_is_never_html(shared_page, hostile):
    page = shared_page
    page.click("#new-chat")
    expect(page.locator("#chatbot .message")).to_have_count(0, timeout=WAIT_MS)
    ask(page, f"say: {hostile}")
    message = page.locator("#chatbot .message")
    found = page.evaluate(
        """() => [...document.querySelectorAll('#chatbot .message *')].filter((node) =>
            /^(IMG|SCRIPT|IFRAME|FORM|STYLE|B|H1|CIRCLE)$/i.test(node.tagName)
            || [...node.attributes].some((a) => /^on/i.test(a.name))
            || /^\\s*(javascript|data):/i.test(node.getAttribute('href') || '')).map((node) => node.outerHTML)"""
    )
    assert found == []
    assert message.first.inner_text() == f"say: {hostile}"
    assert page.dialogs == []
    assert [r for r in page.requested if "example.com" in r] == []


@pytest.fixture(scope="module")
def shared_page(chromium, url):
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.dialogs, page.requested = [], []
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(url)
    page.wait_for_selector(".conversation")
    yield page
    context.close()


def test_markdown_is_drawn(page):
    ask(page, "say: # Title\n\n- **bold**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\ndef f(): return 1\n```")
    reply = last_reply(page)
    expect(reply.locator("h1")).to_have_text("Title")
    expect(reply.locator("li strong")).to_have_text("bold")
    expect(reply.locator("td").first).to_have_text("1")
    expect(reply.locator("code .hljs-keyword").first).to_have_text("def")


def test_code_has_a_copy_button(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "say: ```python\nprint('<hi>')\n```")
    last_reply(page).locator(".copy-code").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).trim() === \"print('<hi>')\"")


def test_formulas_are_drawn(page):
    ask(page, "say: Roots $\\sqrt{x}$ and\n\n$$\\int_0^1 x\\,dx$$\n\nand \\(a^2\\), but `$x$` and $5 or $10 are not.")
    expect(last_reply(page).locator(".katex")).to_have_count(3, timeout=WAIT_MS)
    expect(last_reply(page)).to_contain_text("$x$ and $5 or $10 are not.")


def test_reasoning_folds_and_fills_while_it_is_written(page):
    send(page, "slow: <think>first this, then that</think>The answer.")
    thought = last_reply(page).locator("details.thought")
    expect(thought).to_have_attribute("open", "", timeout=WAIT_MS)
    expect(thought).to_contain_text("first this", timeout=WAIT_MS)
    expect(thought.locator("summary")).to_have_text("Thinking…")
    expect(last_reply(page)).to_contain_text("The answer.", timeout=WAIT_MS)
    expect(thought).not_to_have_attribute("open", "", timeout=WAIT_MS)
    thought.locator("summary").click()
    expect(thought).to_contain_text("then that")
    assert "<think>" not in last_reply(page).inner_text()


def test_right_to_left_text_begins_at_the_right(page):
    ask(page, "say: مرحبا بالعالم\n\nand back")
    sides = page.evaluate(
        """() => [...document.querySelectorAll('.live .message .block p')].map((p) => getComputedStyle(p).direction)"""
    )
    assert sides == ["rtl", "ltr"]


def test_a_selection_in_a_growing_reply_stays(page):
    send(
        page, "slow: The first paragraph stays as it is.\n\nThe second one is still being written, word by word by word"
    )
    expect(last_reply(page)).to_contain_text("The second", timeout=WAIT_MS)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.live .message p'))")
    expect(last_reply(page)).to_contain_text("word by word by word", timeout=WAIT_MS)
    assert page.evaluate("getSelection().toString()").strip() == "The first paragraph stays as it is."
