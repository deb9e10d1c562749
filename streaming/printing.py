"""How the terminal shows a reply: plainly, as JSON lines, or as Markdown that is rendered while it comes."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from streaming.engine.base import Generation
from streaming.errors import SinkFailed
from streaming.events import Event, FinishEvent
from streaming.streamers.base import event_json, event_text
from streaming.streamers.console import ConsoleWriter, without_controls
from streaming.streamers.files import FileWriter

REFRESH_S = 0.08  # how often Markdown is rendered again


@dataclass(frozen=True, slots=True)
class Reply:
    """How a generation that was followed ended."""

    finish: FinishEvent
    is_interrupted: bool


def follow(generation: Generation, printer: "Printer") -> Reply:
    """Print a generation to its end. Ctrl-C cancels it, and so does a pipe that nobody reads any more."""
    with _interrupting(generation) as interrupts:
        for event in generation.events():
            printer.add(event)
            if printer.is_closed:
                generation.cancel()
    finish = generation.finish
    assert finish is not None  # events() ends with it
    return Reply(finish, bool(interrupts))


@contextlib.contextmanager
def _interrupting(generation: Generation) -> Iterator[list[int]]:
    """Have Ctrl-C cancel the generation; give a list that has an item for each time."""
    interrupts: list[int] = []

    def cancel(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt
        generation.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


class Printer(Protocol):
    """Prints one reply after another."""

    @property
    def is_closed(self) -> bool:
        """Whether nobody reads any more."""

    def show_prompt(self, text: str) -> None:
        """Print what the coming text continues."""

    def add(self, event: Event) -> None:
        """Print the next event."""

    def close(self) -> SinkFailed | None:
        """Let go of what was opened; give what went wrong with the file of --tee, if anything."""


class _Teeing:
    """What every printer does for --tee; a file that fails does not stop the printing."""

    def __init__(self, tee: FileWriter | None) -> None:
        self._file = tee
        self._failure: SinkFailed | None = None

    def _tee(self, text: str) -> None:
        if self._file is not None and self._failure is None:
            try:
                self._file.write(text)
            except SinkFailed as failure:
                self._failure = failure

    def close(self) -> SinkFailed | None:
        if self._file is not None:
            self._file.close()
        return self._failure


class PlainPrinter(_Teeing):
    """Text as it comes, then a newline: what a pipe gets."""

    def __init__(self, tee: FileWriter | None) -> None:
        super().__init__(tee)
        self._writer = ConsoleWriter()

    @property
    def is_closed(self) -> bool:
        return self._writer.is_closed

    def show_prompt(self, text: str) -> None:
        self._write(text)

    def add(self, event: Event) -> None:
        self._write("\n" if isinstance(event, FinishEvent) else event_text(event))

    def _write(self, text: str) -> None:
        self._writer.write(text)
        self._tee(text)


class JsonPrinter(_Teeing):
    """Events, one JSON object a line."""

    def __init__(self, tee: FileWriter | None) -> None:
        super().__init__(tee)
        self.is_closed = False
        self._writer = ConsoleWriter(wraps=False)

    def show_prompt(self, text: str) -> None:
        """Print nothing: the prompt is no event."""

    def add(self, event: Event) -> None:
        line = event_json(event) + "\n"
        self._writer.write(line)
        self.is_closed = self._writer.is_closed
        self._tee(line)


class MarkdownPrinter(_Teeing):
    """Markdown, rendered while it comes; blocks that are complete stay as they are and scroll away."""

    is_closed = False

    def __init__(self, tee: FileWriter | None) -> None:
        super().__init__(tee)
        from markdown_it import MarkdownIt
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._parser = MarkdownIt().enable("table")
        self._live_type = Live
        self._live: Live | None = None
        self._text = ""  # of the block that is being written
        self._rendered_s = 0.0

    def show_prompt(self, text: str) -> None:
        self._text = text

    def add(self, event: Event) -> None:
        self._text += without_controls(event_text(event))
        self._tee("\n" if isinstance(event, FinishEvent) else event_text(event))
        is_last = isinstance(event, FinishEvent)
        if is_last or time.monotonic() - self._rendered_s > REFRESH_S:
            self._render(is_last)
            self._rendered_s = time.monotonic()

    def _render(self, is_last: bool) -> None:
        from rich.markdown import Markdown

        if self._live is None:
            self._live = self._live_type(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        done, self._text = (self._text, "") if is_last else self._split_last_block(self._text)
        self._live.update(Markdown(self._text), refresh=not done)
        if done:
            self._console.print(Markdown(done))
            self._live.refresh()
        if is_last:
            self._live.stop()
            self._live = None

    def _split_last_block(self, text: str) -> tuple[str, str]:
        """Cut before the last block, the only one that more text can change."""
        starts = [
            token.map[0] for token in self._parser.parse(text) if token.level == 0 and token.map and token.nesting >= 0
        ]
        lines = text.splitlines(keepends=True)
        cut = starts[-1] if len(starts) > 1 else 0
        return "".join(lines[:cut]), "".join(lines[cut:])


def build_printer(*, is_json: bool, is_markdown: bool, tee: str | None) -> Printer:
    """Choose how to print: Markdown only to a terminal.

    Raises:
        SinkFailed: the file of --tee cannot be opened.
    """
    file = None if tee is None else FileWriter(tee)
    if is_json:
        return JsonPrinter(file)
    return MarkdownPrinter(file) if is_markdown and sys.stdout.isatty() else PlainPrinter(file)
