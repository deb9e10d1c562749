"""Every example runs, as it is, on a model that follows a script."""

import json
import runpy
import socket
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn

from streaming.models import loading
from tests.conftest import skip_or_fail
from tests.tiny import Parrot, byte_tokenizer, loaded, tiny_llama

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CHROMIUM = Path("/usr/bin/chromium")
WAIT_S = 60
PROMPT, SCRIPT = "An increasing sequence: one,", " two, drei, 四, five, six."


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example in a folder of its own; give its globals."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str, model=None, run_name: str = "__main__") -> dict:
        tokenizer = byte_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        model = model or Parrot(tokenizer(SCRIPT)["input_ids"])
        monkeypatch.setattr(loading, "load_model", lambda: loaded(model, tokenizer))
        monkeypatch.setattr("sys.argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)

    return run_example


def spoken(n: int = 20) -> str:
    """What the script says in n tokens."""
    tokenizer = byte_tokenizer()
    return tokenizer.decode(tokenizer(SCRIPT)["input_ids"][:n])


def test_print_text(run, capsys):
    run("print_text")
    assert capsys.readouterr().out == PROMPT + spoken() + "\n"


def test_write_file(run, tmp_path):
    run("write_file")
    assert (tmp_path / "text.txt").read_text("utf-8") == PROMPT + spoken()
    *tokens, finish = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text("utf-8").splitlines()]
    assert "".join(token["text"] for token in tokens) == spoken()
    assert finish["reason"] == "length"


def test_tee(run, tmp_path, capsys):
    run("tee")
    assert capsys.readouterr().out == PROMPT + spoken() + "\n20 tokens\n"
    assert (tmp_path / "text.txt").read_text("utf-8") == PROMPT + spoken()


def test_socket_lines(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        lines: list[dict] = []

        def listen() -> None:
            connection, _ = server.accept()
            with connection, connection.makefile("r", encoding="utf-8") as file:
                lines.extend(json.loads(line) for line in file)

        listener = threading.Thread(target=listen, name="brook-test-listener")
        listener.start()
        run("socket_lines", str(server.getsockname()[1]))
        listener.join(WAIT_S)
    assert lines[0] == {"type": "prompt", "text": PROMPT}
    assert "".join(line["text"] for line in lines[1:-1]) == spoken()
    assert capsys.readouterr().out == ""


def test_batch(run, capsys):
    variables = run("batch", model=tiny_llama())
    prompts = variables["PROMPTS"]
    printed = capsys.readouterr().out
    at = [printed.index(f"{row}: {prompt}") for row, prompt in enumerate(prompts)]
    assert at == sorted(at)
    assert all(variables["streamer"].events(row=row) for row in range(3))
    assert "<|" not in printed


def test_async_iterate(run, capsys):
    run("async_iterate")
    printed = capsys.readouterr().out
    assert printed.startswith(SCRIPT[:15])
    assert printed.endswith((" (cancelled)\n", " (stop)\n"))  # whichever of reader and model was faster


def test_replace_text_iterator_streamer(run, capsys):
    run("replace_text_iterator_streamer")
    assert capsys.readouterr().out == spoken() + "\n"


class TestSsePage:
    @pytest.fixture
    def url(self, run):
        app = run("sse_page", run_name="examples.sse_page")["app"]
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            thread = threading.Thread(target=server.run, args=([listening],), name="brook-test-server")
            thread.start()
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            server.should_exit = True
            thread.join(WAIT_S)

    def test_it_is_short(self):
        assert len((EXAMPLES / "sse_page.py").read_text().splitlines()) <= 42

    def test_a_reader_resumes_where_it_was(self, url):
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            name = client.post("/start", params={"prompt": PROMPT}).json()
            whole = client.get(f"/stream/{name}")
            assert whole.headers["content-type"].startswith("text/event-stream")
            frames = [json.loads(line[6:]) for line in whole.text.splitlines() if line.startswith("data: ")]
            assert "".join(frame.get("text", "") for frame in frames) == PROMPT + SCRIPT
            rest = client.get(f"/stream/{name}", headers={"Last-Event-ID": "3"}).text
            assert rest.startswith("id: 4\n")
            assert whole.text.endswith(rest)

    @pytest.mark.browser
    def test_it_streams_in_a_browser(self, url):
        if not CHROMIUM.exists():
            skip_or_fail("chromium is not here")
        from playwright.sync_api import expect, sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(url)
            page.get_by_role("button", name="Go on").click()
            expect(page.locator("#text")).to_have_text(PROMPT + SCRIPT, timeout=WAIT_S * 1000)
            browser.close()
