"""The terminal on a model that follows a script: what goes where, and how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyte
import pytest

from streaming.cli import main
from streaming.engine import load
from streaming.engine.local import LocalEngine
from streaming.errors import ModelNotFound
from streaming.events import FinishEvent, TokenEvent
from streaming.printing import MarkdownPrinter
from tests.tiny import Parrot, ScriptedModel, byte_tokenizer, loaded

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60


@pytest.fixture
def speak(monkeypatch):
    """Have the terminal's model say a text; give it, and what was asked of the engine."""

    def prepare(text: str, at=None) -> ScriptedModel:
        model = Parrot(byte_tokenizer()(text)["input_ids"], at)
        model.requests = []

        class Engine(LocalEngine):
            def submit(self, request):
                model.requests.append(request)
                return super().submit(request)

        def load_engine(model_id, **options):
            return Engine(lambda progress: loaded(model), "parrot", max_cache_bytes=0)

        monkeypatch.setattr(load, "load_engine", load_engine)
        return model

    return prepare


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


class TestComplete:
    def test_prints_prompt_and_continuation_and_nothing_else(self, speak, capsys):
        speak(" two, drei, 四.")
        assert run(capsys, "complete", "one,") == (0, "one, two, drei, 四.\n", "")

    def test_reads_standard_input(self, speak, capsys, monkeypatch):
        model = speak("!")
        monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
        assert run(capsys, "complete", "-")[1] == "two\nlines!\n"
        assert model.requests[0].prompt == "two\nlines"

    def test_json_prints_the_events(self, speak, capsys):
        speak("né")
        code, out, err = run(capsys, "complete", "x", "--json")
        events = [json.loads(line) for line in out.splitlines()]
        assert "".join(event["text"] for event in events[:-1]) == "né"
        assert (code, err, events[-1]["type"], events[-1]["reason"]) == (0, "", "finish", "stop")

    @pytest.mark.parametrize("flags", [[], ["--json"]])
    def test_tee_writes_what_is_printed(self, speak, capsys, tmp_path, flags):
        speak("né")
        path = tmp_path / "out"
        _, out, _ = run(capsys, "complete", "x", "--tee", str(path), *flags)
        assert path.read_text("utf-8") == out

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    def test_a_tee_that_fails_does_not_stop_the_printing_and_is_told_at_the_end(self, speak, capsys):
        speak(" whole text")
        code, out, err = run(capsys, "complete", "the", "--tee", "/dev/full")
        assert (code, out) == (1, "the whole text\n")
        assert err == "/dev/full cannot be written (No space left on device); what was written before is kept.\n"

    def test_options_reach_the_model(self, speak, capsys):
        model = speak("a STOP b")
        sampling = "--max-new-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --repetition-penalty 1.2"
        code, out, _ = run(capsys, "complete", "x", *sampling.split(), "--seed", "7", "--stop", "no", "STOP")
        request = model.requests[0]
        assert (code, out) == (0, "xa \n")
        assert (request.max_new_tokens, request.temperature, request.top_p, request.top_k) == (9, 0.5, 0.9, 3)
        assert (request.min_p, request.repetition_penalty, request.seed, request.stop) == (0.1, 1.2, 7, ["no", "STOP"])

    def test_a_system_text_is_read_and_not_printed(self, speak, capsys):
        model = speak("!")
        assert run(capsys, "complete", "x", "--system", "Be brief.")[1] == "x!\n"
        assert model.requests[0].prompt == "Be brief.\n\nx"


class TestEndings:
    def test_interrupted_it_keeps_what_was_printed_and_says_130(self, speak, capsys):
        """Ctrl-C while the third token is computed."""
        seen = []

        def interrupt() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + WAIT_S
            while not engine_is_cancelled() and time.monotonic() < deadline:
                time.sleep(0.001)

        def engine_is_cancelled() -> bool:
            return seen[0]._active is not None and seen[0]._active.cancelled

        speak("abcdef", {3: interrupt})
        make = load.load_engine
        load.load_engine = lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[0]
        before = signal.getsignal(signal.SIGINT)
        assert run(capsys, "complete", "x") == (130, "xabc\n", "")
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_pipe_that_nobody_reads_ends_it_quietly(self, speak, capsys, monkeypatch):
        model = speak("abc" * 100)
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert main(["complete", "x", "--max-new-tokens", "300"]) == 0
        assert model.n_forwards < 100
        assert capsys.readouterr().err == ""

    def test_a_model_that_fails_says_why_and_1(self, speak, capsys, caplog):
        def fail():
            raise ValueError("the model broke")

        speak("abc", {1: fail})
        code, out, err = run(capsys, "complete", "x")
        assert (code, out) == (1, "xa\n")
        assert err == "The model stopped with an error (ValueError: the model broke); try again.\n"

    def test_a_model_that_is_not_there(self, monkeypatch, capsys):
        def fail(progress):
            raise ModelNotFound("There is no model of that name.")

        monkeypatch.setattr(load, "load_engine", lambda model, **options: LocalEngine(fail))
        assert run(capsys, "complete", "x") == (2, "", "There is no model of that name.\n")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["complete", "x", "--temperature", "9"], "--temperature: temperature must be between 0 and 5, not 9.0.\n"),
            (["complete", "x", "--top-k", "many"], "--top-k: invalid int value: 'many'\n"),
            (["complete", "x", "--device", "tpu"], "--device: must be auto, cpu, mps, cuda or cuda:N, not 'tpu'\n"),
            (["complete"], "the following arguments are required: PROMPT\n"),
            (["sing"], "complete|chat: invalid choice: 'sing' (choose from 'complete', 'chat')\n"),
        ],
    )
    def test_a_wrong_option_is_one_sentence_and_2_at_once(self, arguments, sentence):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "streaming", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip
        own = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert (done.returncode, done.stdout, "\n".join(own) + "\n") == (2, "", sentence)
        assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


class TestChat:
    def test_prints_the_reply_alone(self, speak, capsys):
        model = speak("Hello **you**.")
        assert run(capsys, "chat", "hi", "--system", "Be kind.") == (0, "Hello **you**.\n", "")
        assert model.requests[0].messages == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi"},
        ]

    def test_an_empty_message_from_a_pipe_is_answered(self, speak, capsys, monkeypatch):
        speak("?")
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert run(capsys, "chat", "-")[:2] == (0, "?\n")


class TestSession:
    def hold(self, speak, capsys, monkeypatch, *lines: str, flags=()):
        """Type lines; give the requests' messages, what was printed and what was said beside it."""
        model = speak("yes")
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code, out, err = run(capsys, "chat", *flags)
        assert code == 0
        told = [[(m["role"], m["content"]) for m in request.messages] for request in model.requests]
        return told, out, err.splitlines(), model.requests

    def test_the_model_is_told_the_history_token_for_token(self, speak, capsys, monkeypatch):
        told, out, err, requests = self.hold(speak, capsys, monkeypatch, "one", "", "two")
        assert out == "yes\nyes\n"
        assert err == []
        assert told == [[("user", "one")], [("user", "one"), ("assistant", "yes"), ("user", "two")]]
        assert requests[1].messages[1]["token_ids"] == [*byte_tokenizer()("yes")["input_ids"], 258]

    def test_retry_and_undo(self, speak, capsys, monkeypatch):
        lines = ("/retry", "/undo", "one", "two", "/retry", "/undo", "/undo", "/undo", "three")
        told, out, err, _ = self.hold(speak, capsys, monkeypatch, *lines)
        assert told[1] == told[2] == [("user", "one"), ("assistant", "yes"), ("user", "two")]
        assert told[3] == [("user", "three")]
        assert out == "yes\n" * 4
        assert err == [
            "There is no reply to write again.", "There is nothing to take back.",
            "Took the last message back; 2 are left.", "Took the last message back; 0 are left.",
            "There is nothing to take back.",
        ]  # fmt: skip

    def test_set_and_system(self, speak, capsys, monkeypatch):
        lines = ("/set temperature 0.5", "/set top-k 9", "/set temperature hot", "/set temperature 9", "/set x 1",
                 "/system Be kind.", "hi", "/system", "/set stop END", "hi", "/set")  # fmt: skip
        told, _, err, requests = self.hold(speak, capsys, monkeypatch, *lines, flags=["--seed", "3"])
        assert (requests[0].temperature, requests[0].top_k, requests[0].seed) == (0.5, 9, 3)
        assert (told[0][0], requests[1].stop) == (("system", "Be kind."), ("END",))
        assert told[1][0] == ("user", "hi")
        assert err[2:5] == [
            "temperature is a number, not 'hot'.", "temperature must be between 0 and 5, not 9.0.",
            "There is no setting x; there are max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, "
            "seed, stop.",
        ]  # fmt: skip
        assert err[-8:] == [
            "max_new_tokens = 256", "temperature = 0.5", "top_p = 1.0", "top_k = 9", "min_p = 0.0",
            "repetition_penalty = 1.0", "seed = 3", "stop = ('END',)",
        ]  # fmt: skip

    def test_save_and_load(self, speak, capsys, monkeypatch, tmp_path):
        path = tmp_path / "talk.json"
        self.hold(speak, capsys, monkeypatch, "/system S", "one", f"/save {path}")
        (tmp_path / "other.json").write_text('{"messages": 7}')
        lines = (f"/load {path}", "two", f"/load {tmp_path / 'other.json'}", "/load nowhere", f"/save {tmp_path}")
        told, _, err, _ = self.hold(speak, capsys, monkeypatch, *lines)
        assert told == [[("system", "S"), ("user", "one"), ("assistant", "yes"), ("user", "two")]]
        assert err == [
            f"Loaded 2 messages from {path}.", f"{tmp_path / 'other.json'} holds no conversation that /save wrote.",
            "nowhere cannot be read (No such file or directory).", f"{tmp_path} cannot be written (Is a directory).",
        ]  # fmt: skip

    def test_stats_help_exit_and_what_is_no_command(self, speak, capsys, monkeypatch):
        _, out, err, _ = self.hold(
            speak, capsys, monkeypatch, "/stats", "hi", "/stats", "/dance", "/help", "/exit", "hi"
        )
        assert out == "yes\n"
        assert err[0] == "There is no reply yet."
        assert err[1].endswith("ended by stop.")
        assert "4 written" in err[1]
        assert err[2] == "There is no command /dance; /help tells those that there are."
        for command in ("/help", "/system", "/set", "/save", "/load", "/retry", "/undo", "/stats", "/exit"):
            assert any(line.startswith(command) for line in err[3:])

    def test_a_message_that_does_not_fit_is_taken_back(self, speak, capsys, monkeypatch):
        told, out, err, _ = self.hold(speak, capsys, monkeypatch, "x" * 2000, "short")
        assert told[-1] == [("user", "short")]
        assert out == "yes\n"
        assert err[0].startswith("The message is 2,0")


class TestMarkdown:
    """On an emulated terminal of 40 columns: what is seen in the end is what rendering it whole would show."""

    TEXT = (
        "# Title\n\nSome *text* that is long enough to wrap over the width of the terminal.\n\n"
        "1. one\n2. two\n   - inner\n\n```python\ndef f():\n\n    return 1\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\nend"
    )

    def show(self, monkeypatch, pieces: list[str], rows: int = 60) -> list[str]:
        file = io.StringIO()
        file.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", file)
        for name, value in {"COLUMNS": "40", "LINES": str(rows), "TERM": "xterm-256color"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("streaming.printing.REFRESH_S", 0)
        printer = MarkdownPrinter(None)
        for index, piece in enumerate(pieces):
            printer.add(TokenEvent(index, 1, piece))
        printer.add(FinishEvent("stop"))
        screen = pyte.HistoryScreen(40, rows, history=1000)
        pyte.Stream(screen).feed(file.getvalue().replace("\n", "\r\n"))
        top = ["".join(line[x].data for x in range(40)).rstrip() for line in screen.history.top]
        return "\n".join([*top, *(line.rstrip() for line in screen.display)]).rstrip().split("\n")

    @pytest.mark.parametrize("size", [1, 5, 40])
    def test_in_pieces_it_looks_as_it_does_whole(self, monkeypatch, size):
        pieces = [self.TEXT[i : i + size] for i in range(0, len(self.TEXT), size)]
        shown = [line for line in self.show(monkeypatch, pieces) if line]
        assert shown == [line for line in self.show(monkeypatch, [self.TEXT]) if line]
        assert sum("Title" in line for line in shown) == 1

    def test_a_reply_longer_than_the_terminal_scrolls_without_doubling(self, monkeypatch):
        text = "\n\n".join(f"paragraph {i}" for i in range(30))
        shown = [line for line in self.show(monkeypatch, [text[i : i + 7] for i in range(0, len(text), 7)], 10) if line]
        assert shown == [f"paragraph {i}" for i in range(30)]
