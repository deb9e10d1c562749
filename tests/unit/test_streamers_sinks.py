"""Where streams go: the console, files, server-sent events, sockets, callbacks, and several at once."""

import asyncio
import errno
import io
import json
import logging
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyte
import pytest
import torch
from transformers import TextStreamer

from streaming import (
    CallbackStreamer,
    ConsoleStreamer,
    FileStreamer,
    IteratorStreamer,
    SocketStreamer,
    SSEStreamer,
    TeeStreamer,
)
from streaming.errors import GenerationCancelled, SinkFailed, StreamerMisuse, StreamTimeout
from streaming.events import FinishEvent, PromptEvent, TokenEvent
from streaming.log import EventLog
from streaming.streamers.console import ConsoleWriter
from streaming.streamers.sse import HEARTBEAT, SSEFrames, sse_frame
from tests.tiny import ScriptedModel, byte_tokenizer

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 30
EOS = 258


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def feed(streamer, text: str = "né 日", prompt_text: str = "Q:", end: bool = True) -> None:
    streamer.put(torch.tensor([ids_of(prompt_text)]))
    for token_id in ids_of(text):
        streamer.put(torch.tensor([token_id]))
    if end:
        streamer.end()


def feed_batch(streamer) -> None:
    """Two rows, the second of which ends first."""
    streamer.put(torch.tensor([ids_of("A"), ids_of("B")]))
    for first, second in zip(ids_of("one"), [*ids_of("x"), EOS, EOS], strict=True):
        streamer.put(torch.tensor([first, second]))
    streamer.end()


class TestConsole:
    @pytest.mark.parametrize("skip_prompt", [False, True])
    def test_prints_what_text_streamer_prints(self, capsys, skip_prompt):
        for kind in (TextStreamer, ConsoleStreamer):
            feed(kind(byte_tokenizer(), skip_prompt), "two words\nand 日本 lines ")
        printed = capsys.readouterr().out
        assert printed == 2 * (("" if skip_prompt else "Q:") + "two words\nand 日本 lines \n")

    def test_each_character_as_soon_as_it_is_whole(self):
        file = io.StringIO()
        streamer = ConsoleStreamer(byte_tokenizer(), skip_prompt=True, file=file)
        streamer.put(torch.tensor([[1]]))
        shown = []
        for token_id in ids_of("日本x"):
            streamer.put(torch.tensor([token_id]))
            shown.append(file.getvalue())
        assert shown == ["", "", "日", "日", "日", "日本", "日本x"]

    def test_twice_in_a_row(self):
        file = io.StringIO()
        streamer = ConsoleStreamer(byte_tokenizer(), file=file)
        feed(streamer, "a")
        feed(streamer, "b")
        assert file.getvalue() == "Q:a\nQ:b\n"

    def test_the_rows_of_a_batch_one_under_the_other(self):
        file = io.StringIO()
        feed_batch(ConsoleStreamer(byte_tokenizer(), file=file, skip_special_tokens=True))
        assert file.getvalue() == "Aone\nBx\n"

    def test_a_character_that_the_encoding_lacks(self):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, "ascii")
        feed(ConsoleStreamer(byte_tokenizer(), file=file), "né 日")
        assert raw.getvalue() == b"Q:n? ?\n"

    def test_a_closed_pipe_raises_nothing_not_even_at_exit(self):
        """`python ... | head -c 1`."""
        code = (
            "import sys, torch\n"
            "from streaming import ConsoleStreamer\n"
            "from tests.tiny import byte_tokenizer\n"
            "s = ConsoleStreamer(byte_tokenizer())\n"
            "s.put(torch.tensor([[40]]))\n"
            "sys.stdin.readline()\n"
            "for i in range(40, 60): s.put(torch.tensor([i]))\n"
            "s.end()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout.read(1) == b"I"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(WAIT_S) == 0
        process.stderr.close()

    def test_a_closed_file_raises_nothing(self):
        file = io.StringIO()
        file.close()
        feed(ConsoleStreamer(byte_tokenizer(), file=file))


class TestWrapping:
    """On a real pseudo-terminal, as an emulator of one would show it."""

    def show(self, pieces: list[str], columns: int) -> list[str]:
        """Give the lines of a terminal of that width after these pieces were written."""
        main, side = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(side, "w", encoding="utf-8") as file:
            writer = ConsoleWriter(file)
            for piece in pieces:
                writer.write(piece)
        raw = b""
        while chunk := read_pty(main):
            raw += chunk
        os.close(main)
        return render(raw.decode(), columns)

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
    def test_words_stay_whole_however_they_arrive(self, size):
        text = "The quick brown fox jumps over the lazy dog.\nAnd then it rests, contented."
        shown = self.show([text[i : i + size] for i in range(0, len(text), size)], 20)
        assert shown == ["The quick brown fox", "jumps over the lazy", "dog.", "And then it rests,", "contented."]

    def test_a_word_longer_than_a_line_is_cut(self):
        assert self.show(list("x" * 25), 11) == ["x" * 10, "x" * 10, "x" * 5]

    def test_wide_characters_break_anywhere_and_count_twice(self):
        assert self.show(list("日本語のテキスト"), 11) == ["日本語のテ", "キスト"]

    def test_control_characters_of_a_model_do_nothing_to_the_terminal(self):
        assert self.show(["a\x1b[2Jb\x07\rc"], 40) == ["a[2Jbc"]

    def test_random_texts_never_break_a_word_that_fits(self):
        import random

        for seed in range(50):
            chance = random.Random(seed)
            words = ["".join(chance.choices("abcdef", k=chance.randint(1, 9))) for _ in range(40)]
            text, columns = " ".join(words), chance.randint(12, 40)
            pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
            lines = self.show(pieces, columns)
            assert " ".join(line.strip() for line in lines).split() == words
            assert all(len(line) < columns for line in lines)


def read_pty(main: int) -> bytes:
    try:
        return os.read(main, 100_000)
    except OSError:  # Linux says so at the end
        return b""


def render(raw: str, columns: int) -> list[str]:
    """Give the lines that a terminal shows, up to the last that is not empty; nothing is in its last column."""
    screen = pyte.Screen(columns, 100)
    pyte.Stream(screen).feed(raw)
    assert all(line[-1] == " " for line in screen.display)
    return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")


class TestFile:
    def test_text_as_it_comes_then_whole(self, tmp_path):
        path = tmp_path / "out.txt"
        streamer = FileStreamer(byte_tokenizer(), path)
        feed(streamer, "né 日", end=False)
        assert path.read_text("utf-8") == "Q:né 日"
        streamer.put(torch.tensor([ids_of("日")[0]]))
        streamer.end()
        assert path.read_text("utf-8") == "Q:né 日\ufffd"

    def test_tail_follows(self, tmp_path):
        path = tmp_path / "out.txt"
        path.touch()
        tail = subprocess.Popen(
            ["tail", "-F", "-n", "+1", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            streamer = FileStreamer(byte_tokenizer(), path, append=True)
            feed(streamer, "first", end=False)
            assert os.read(tail.stdout.fileno(), 100).startswith(b"Q:f")
            streamer.end()
        finally:
            tail.terminate()
            tail.wait(WAIT_S)
            tail.stdout.close()

    def test_json_lines_are_the_events(self, tmp_path):
        path = tmp_path / "out.jsonl"
        reference = IteratorStreamer(byte_tokenizer())
        feed(TeeStreamer(FileStreamer(byte_tokenizer(), path, format="jsonl"), reference))
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert lines[0] == {"type": "prompt", "text": "Q:"}
        assert [line["text"] for line in lines[1:-1]] == [event.text for event in list(reference.events())[:-1]]
        assert (lines[-1]["type"], lines[-1]["reason"]) == ("finish", "length")

    def test_a_batch_has_a_text_file_for_each_row_or_a_row_in_each_line(self, tmp_path):
        feed_batch(FileStreamer(byte_tokenizer(), tmp_path / "out.txt", skip_special_tokens=True))
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"out-0.txt": "Aone", "out-1.txt": "Bx"}
        feed_batch(FileStreamer(byte_tokenizer(), tmp_path / "out.jsonl", skip_prompt=True, format="jsonl"))
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [line["text"] for line in lines if line["type"] == "token" and line["row"] == 0] == ["o", "n", "e"]
        assert [line["row"] for line in lines if line["type"] == "finish"] == [1, 0]

    @pytest.mark.parametrize(("append", "text"), [(False, "Q:b"), (True, "Q:aQ:b")])
    def test_twice_in_a_row_begins_anew_or_appends(self, tmp_path, append, text):
        streamer = FileStreamer(byte_tokenizer(), tmp_path / "out", append=append)
        feed(streamer, "a")
        feed(streamer, "b")
        assert (tmp_path / "out").read_text() == text

    def test_an_atomic_file_takes_its_place_at_the_end(self, tmp_path):
        path = tmp_path / "out.txt"
        path.write_text("before")
        streamer = FileStreamer(byte_tokenizer(), path, atomic=True)
        feed(streamer, "new", end=False)
        assert path.read_text() == "before"
        streamer.end()
        assert path.read_text() == "Q:new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [ValueError("boom"), GenerationCancelled("stop")])
    def test_an_atomic_file_that_is_not_whole_stays_beside(self, tmp_path, error):
        path = tmp_path / "out.txt"
        path.write_text("before")
        streamer = FileStreamer(byte_tokenizer(), path, atomic=True)
        feed(streamer, "new", end=False)
        streamer.fail(error)
        assert path.read_text() == "before"
        assert (tmp_path / "out.txt.part").read_text() == "Q:new"

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    def test_a_full_disk_ends_generation_with_a_clear_error(self):
        streamer = FileStreamer(byte_tokenizer(), "/dev/full", skip_prompt=True)
        model = ScriptedModel(ids_of("abcdef"))
        model.expect(1)
        with pytest.raises(SinkFailed, match=r"/dev/full cannot be written \(No space left on device\)") as caught:
            model.generate(
                torch.tensor([[1]]), attention_mask=torch.ones(1, 1).long(), streamer=streamer, max_new_tokens=9
            )
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert model.n_forwards == 1

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(SinkFailed, match="No such file or directory"):
            feed(FileStreamer(byte_tokenizer(), tmp_path / "no" / "out.txt"))

    @pytest.mark.parametrize("options", [{"format": "xml"}, {"atomic": True, "append": True}])
    def test_options_that_make_no_sense(self, options):
        with pytest.raises(StreamerMisuse):
            FileStreamer(byte_tokenizer(), "out.txt", **options)


def parse_frame(frame: str) -> tuple[int | None, dict]:
    fields = dict(line.split(": ", 1) for line in frame.strip().split("\n"))
    return (int(fields["id"]) if "id" in fields else None), json.loads(fields["data"])


class TestSSE:
    def test_a_frame_is_as_the_standard_says(self):
        assert sse_frame("a\nb", id=3, event="token") == "id: 3\nevent: token\ndata: a\ndata: b\n\n"
        assert sse_frame("x") == "data: x\n\n"

    def test_iterating_gives_every_event_with_its_offset(self):
        streamer = SSEStreamer(byte_tokenizer())
        feed(streamer)
        frames = [parse_frame(frame) for frame in streamer]
        assert frames[0] == (None, {"type": "prompt", "text": "Q:"})
        assert [offset for offset, _ in frames[1:]] == list(range(len(frames) - 1))
        assert [data for _, data in frames[1:]] == [json.loads(json.dumps(e.to_dict())) for e in streamer.events()]

    def test_async_as_well(self):
        async def read() -> list[str]:
            streamer = SSEStreamer(byte_tokenizer(), skip_prompt=True)
            feed(streamer)
            return [frame async for frame in streamer]

        streamer = SSEStreamer(byte_tokenizer(), skip_prompt=True)
        feed(streamer)
        times = {"t_s", "ttft_s", "tokens_per_s"}

        def timeless(frames):
            return [{k: v for k, v in parse_frame(frame)[1].items() if k not in times} for frame in frames]

        assert timeless(asyncio.run(read())) == timeless(streamer.frames())

    @pytest.mark.parametrize(("last_event_id", "first"), [("2", 3), ("0", 1), (None, 0), ("", 0), ("x", 0), ("-1", 0)])
    def test_resumes_after_the_last_event_that_arrived(self, last_event_id, first):
        streamer = SSEStreamer(byte_tokenizer(), skip_prompt=True)
        feed(streamer, "abcdef")
        offsets = [parse_frame(frame)[0] for frame in streamer.frames(last_event_id)]
        assert offsets == list(range(first, 7))

    def test_a_heartbeat_comes_while_nothing_else_does(self):
        streamer = SSEStreamer(byte_tokenizer(), skip_prompt=True, heartbeat_s=0.02)
        frames = streamer.frames()
        assert next(frames) == next(frames) == HEARTBEAT
        feed(streamer, "a")
        assert [parse_frame(frame)[0] for frame in frames if frame != HEARTBEAT] == [0, 1]

    def test_async_a_heartbeat_comes_while_nothing_else_does(self):
        async def read() -> list[str]:
            log = EventLog()
            frames = SSEFrames(log, heartbeat_s=0.02)
            beats = [await anext(frames), await anext(frames)]
            log.append(FinishEvent("stop"))
            return beats + [frame async for frame in frames]

        assert asyncio.run(read())[:2] == [HEARTBEAT] * 2

    def test_a_failure_is_the_last_frame(self):
        streamer = SSEStreamer(byte_tokenizer(), skip_prompt=True)
        feed(streamer, "a", end=False)
        streamer.fail(ValueError("boom"))
        assert parse_frame(list(streamer)[-1])[1]["error"] == "ValueError: boom"

    def test_twice_in_a_row(self):
        streamer = SSEStreamer(byte_tokenizer(), skip_prompt=True)
        for text in ("a", "bc"):
            feed(streamer, text)
            assert len(list(streamer)) == len(text) + 1


class Peer:
    """Listens and keeps the lines that it gets; `is_slow` accepts and reads nothing."""

    def __init__(self, address=None, is_slow: bool = False) -> None:
        kind = socket.AF_INET if address is None else socket.AF_UNIX
        self.server = socket.socket(kind)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.server.bind(("127.0.0.1", 0) if address is None else address)
        self.server.listen()
        self.address = self.server.getsockname()
        self.lines: list[list[dict]] = []
        self.is_slow = is_slow
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._serve, name="brook-test-peer")
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection, connection.makefile("r", encoding="utf-8") as file:
                if self.is_slow:
                    assert self.done.wait(WAIT_S)
                else:
                    self.lines.append([json.loads(line) for line in file])

    def close(self) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.server.shutdown(socket.SHUT_RDWR)
        self.thread.join(WAIT_S)
        self.server.close()


@pytest.fixture
def peer():
    peers = []

    def make(*args, **kwargs) -> Peer:
        peers.append(Peer(*args, **kwargs))
        return peers[-1]

    yield make
    for one in peers:
        one.close()


class TestSocket:
    @pytest.mark.parametrize("kind", ["tcp", "unix"])
    def test_events_arrive_as_json_lines_one_connection_a_generation(self, peer, kind, tmp_path):
        one = peer(None if kind == "tcp" else str(tmp_path / "socket"))
        streamer = SocketStreamer(byte_tokenizer(), one.address)
        for text in ("né", "日本"):
            feed(streamer, text)
        one.close()
        assert [[line["type"] for line in lines] for lines in one.lines] == [
            ["prompt", *["token"] * len(text.encode()), "finish"] for text in ("né", "日本")
        ]
        assert ["".join(line["text"] for line in lines[1:-1]) for lines in one.lines] == ["né", "日本"]
        assert streamer.dropped is None

    def test_a_batch_says_its_rows(self, peer):
        one = peer()
        feed_batch(SocketStreamer(byte_tokenizer(), one.address, skip_prompt=True, skip_special_tokens=True))
        one.close()
        assert "".join(line["text"] for line in one.lines[0] if line["row"] == 0 and "text" in line) == "one"

    def test_nobody_listens(self, caplog):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = probe.getsockname()
        streamer = SocketStreamer(byte_tokenizer(), address)
        with caplog.at_level(logging.WARNING):
            feed(streamer)
        assert "refused" in streamer.dropped
        assert "was dropped" in caplog.text

    def test_a_peer_that_goes_away_is_dropped(self, peer):
        with socket.create_server(("127.0.0.1", 0)) as server:
            streamer = SocketStreamer(byte_tokenizer(), server.getsockname())
            streamer.put(torch.tensor([[1]]))
            connection, _ = server.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
            deadline = time.monotonic() + WAIT_S
            while streamer.dropped is None and time.monotonic() < deadline:
                streamer.put(torch.tensor([65]))
            streamer.end()
        assert streamer.dropped is not None

    def test_a_slow_peer_never_holds_generation_up(self, peer):
        one = peer(is_slow=True)
        streamer = SocketStreamer(byte_tokenizer(), one.address, timeout=0.2, n_buffered=64)
        streamer.put(torch.tensor([[1]]))
        slowest_s = 0.0
        for _ in range(100_000):
            began = time.perf_counter()
            streamer.put(torch.tensor([65]))
            slowest_s = max(slowest_s, time.perf_counter() - began)
            if streamer.dropped is not None:
                break
        assert slowest_s < 0.15  # less than one timeout of the socket
        streamer.end()
        assert "behind" in streamer.dropped or "timed out" in streamer.dropped

    def test_the_end_waits_for_a_slow_peer_only_so_long(self, peer):
        one = peer(is_slow=True)
        streamer = SocketStreamer(byte_tokenizer(), one.address, timeout=0.2, n_buffered=100_000)
        streamer.put(torch.tensor([[1]]))
        streamer.put(torch.tensor([65] * 50_000))
        began = time.monotonic()
        streamer.end()
        assert time.monotonic() - began < 5
        assert streamer.dropped is not None


class TestCallback:
    def test_every_event_in_order(self):
        seen = []
        feed(CallbackStreamer(byte_tokenizer(), seen.append))
        assert seen[0] == PromptEvent("Q:")
        assert "".join(event.text for event in seen[1:-1]) == "né 日"
        assert isinstance(seen[-1], FinishEvent)

    def test_a_batch_says_its_rows(self):
        seen = []
        feed_batch(CallbackStreamer(byte_tokenizer(), lambda event, row: seen.append((row, event)), skip_prompt=True))
        assert "".join(event.text for row, event in seen if row == 0 and isinstance(event, TokenEvent)) == "one"

    def test_what_it_raises_ends_the_generation(self):
        def refuse(event) -> None:
            if event.type == "token" and event.text == "c":
                raise ValueError("enough")

        model = ScriptedModel(ids_of("abcdef"))
        model.expect(1)
        streamer = CallbackStreamer(byte_tokenizer(), refuse)
        with pytest.raises(ValueError, match="enough"):
            model.generate(
                torch.tensor([[1]]), attention_mask=torch.ones(1, 1).long(), streamer=streamer, max_new_tokens=9
            )
        assert model.n_forwards == 3
        streamer.end()

    def test_a_coroutine_function_is_awaited_in_its_loop_in_order(self):
        async def main() -> list:
            seen = []

            async def callback(event) -> None:
                await asyncio.sleep(0.002 if len(seen) % 2 else 0)
                seen.append(event)

            streamer = CallbackStreamer(byte_tokenizer(), callback, skip_prompt=True)
            await asyncio.to_thread(feed, streamer, "abc")
            return seen

        seen = asyncio.run(main())
        assert [event.text for event in seen[:-1]] == ["a", "b", "c"]

    def test_one_that_takes_too_long_or_blocks_its_own_loop_is_an_error(self):
        async def main() -> None:
            async def callback(event) -> None:
                await asyncio.sleep(WAIT_S)

            with pytest.raises(StreamTimeout, match="took longer than"):
                await asyncio.to_thread(feed, CallbackStreamer(byte_tokenizer(), callback, timeout=0.05))
            with pytest.raises(StreamerMisuse, match="call it in a thread"):
                feed(CallbackStreamer(byte_tokenizer(), callback))

        asyncio.run(main())

    def test_a_coroutine_function_needs_a_loop(self):
        async def callback(event) -> None: ...

        with pytest.raises(StreamerMisuse, match="inside the event loop"):
            CallbackStreamer(byte_tokenizer(), callback)


class TestTee:
    def test_every_sink_gets_everything_also_those_of_transformers(self, capsys):
        first, second = IteratorStreamer(byte_tokenizer()), IteratorStreamer(byte_tokenizer(), skip_prompt=True)
        tee = TeeStreamer(first, TextStreamer(byte_tokenizer()), second)
        for text in ("a", "b"):
            feed(tee, text)
            assert (first.log.text(), second.log.text()) == (text, text)
        assert capsys.readouterr().out == "Q:a\nQ:b\n"

    def test_one_that_fails_does_not_stop_the_others_and_is_told_at_the_end(self, tmp_path):
        kept = IteratorStreamer(byte_tokenizer())
        tee = TeeStreamer(FileStreamer(byte_tokenizer(), tmp_path / "no" / "x"), kept)
        feed(tee, "abc", end=False)
        with pytest.raises(SinkFailed, match=r"1 of 2 sinks failed: FileStreamer: .*No such file") as caught:
            tee.end()
        assert kept.log.text() == "abc"
        assert isinstance(caught.value.__cause__, SinkFailed)

    def test_cancelling_one_stops_the_generation_and_ends_all(self):
        first, second = IteratorStreamer(byte_tokenizer()), IteratorStreamer(byte_tokenizer())
        tee = TeeStreamer(first, second)
        feed(tee, "ab", end=False)
        second.cancel()
        with pytest.raises(GenerationCancelled):
            tee.put(torch.tensor([1]))
        assert [one.log.finish.reason for one in (first, second)] == ["cancelled"] * 2

    def test_a_failure_reaches_the_readers_of_all(self):
        first, second = IteratorStreamer(byte_tokenizer()), IteratorStreamer(byte_tokenizer())
        tee = TeeStreamer(first, second)
        feed(tee, "ab", end=False)
        tee.fail(ValueError("boom"))
        assert [one.log.finish.error for one in (first, second)] == ["ValueError: boom"] * 2
