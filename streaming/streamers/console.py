"""A streamer that prints, as `TextStreamer` does, and the writer behind it, which the command line uses as well."""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from streaming.events import Event, FinishEvent
from streaming.streamers.base import EventStreamer, event_text

_TAB = 8
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ConsoleWriter:
    """Write text to a terminal, wrapped between words, or to anything else, as it is.

    Nothing that it is given makes it raise: characters that the encoding lacks become "?", and once nobody reads the
    other end of a pipe `is_closed` is true and the rest goes nowhere. `file` None is standard output; with `wraps`
    false nothing is wrapped.
    """

    def __init__(self, file: TextIO | None = None, *, wraps: bool = True) -> None:
        self._file = sys.stdout if file is None else file
        self._wrapper = _Wrapper(self._file) if wraps and _is_terminal(self._file) else None
        self.is_closed = False

    def write(self, text: str) -> None:
        """Write and flush."""
        if self._wrapper is not None:
            text = self._wrapper.wrap(text)
        if not text or self.is_closed:
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        try:
            self._file.write(text.encode(encoding, "replace").decode(encoding))
            self._file.flush()
        except (BrokenPipeError, ValueError):  # ValueError: the file was closed
            self.is_closed = True
            _point_to_nowhere(self._file)


class ConsoleStreamer(EventStreamer):
    """Print the prompt and the text as it comes, then a newline; see ConsoleWriter.

    The rows of a batch are printed one under the other: the first as it comes, the next ones after it.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        file: TextIO | None = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, eos_token_id=eos_token_id, **decode_kwargs)
        self._file = file
        self._texts: list[str] = []  # of each row, what is not printed yet
        self._has_finished: list[bool] = []
        self._row = 0  # the one that is printed as it comes

    def on_start(self, n_rows: int) -> None:
        self._writer = ConsoleWriter(self._file)
        self._texts = [""] * n_rows
        self._has_finished = [False] * n_rows
        self._row = 0

    def on_prompt(self, row: int, text: str) -> None:
        self._add(row, text)

    def on_event(self, row: int, event: Event) -> None:
        self._has_finished[row] = isinstance(event, FinishEvent)
        self._add(row, event_text(event))

    def _add(self, row: int, text: str) -> None:
        self._texts[row] += text
        while self._row < len(self._texts):
            self._writer.write(self._texts[self._row])
            self._texts[self._row] = ""
            if not self._has_finished[self._row]:
                return
            self._writer.write("\n")
            self._row += 1


class _Wrapper:
    """Break lines between words at a terminal's width, although a word may come in pieces.

    A word that turns out too long for its line is taken back from it and written on the next.
    """

    def __init__(self, file: TextIO) -> None:
        from rich.cells import cell_len  # here, because only terminals need it

        self._cell_len = cell_len
        self._file = file
        self._column = 0
        self._word = ""
        self._word_column = 0  # where it begins

    def wrap(self, text: str) -> str:
        """Give what to write so that `text` appears wrapped."""
        # A terminal that is written to its last column does not say on which line its cursor is.
        width = max(2, os.get_terminal_size(self._file.fileno()).columns - 1)
        return "".join(self._place(character, width) for character in without_controls(text))

    def _place(self, character: str, width: int) -> str:
        if character == "\n":
            return self._start_line()
        if character == "\t":
            character = " " * (_TAB - self._column % _TAB)
        n_cells = self._cell_len(character)
        if self._column + n_cells > width:
            return self._break(character, n_cells)
        self._column += n_cells
        # Scripts written without spaces, whose characters are two cells wide, break anywhere.
        self._end_word() if character.isspace() or n_cells > 1 else self._extend_word(character)
        return character

    def _break(self, character: str, n_cells: int) -> str:
        if character.isspace():
            return self._start_line()
        word, n_back = self._word, self._column - self._word_column
        if not word or n_back == self._column or n_cells > 1:
            word, n_back = "", 0  # nothing to take back, or nothing that fits the next line better
        erase = f"\x1b[{n_back}D\x1b[K" if n_back else ""
        newline = self._start_line()
        self._column = self._cell_len(word) + n_cells
        self._word = word + character if n_cells == 1 else ""
        self._word_column = 0 if self._word else self._column
        return erase + newline + word + character

    def _extend_word(self, character: str) -> None:
        self._word += character

    def _end_word(self) -> None:
        self._word, self._word_column = "", self._column

    def _start_line(self) -> str:
        self._column = 0
        self._end_word()
        return "\n"


def without_controls(text: str) -> str:
    """Leave out what would steer a terminal: a model has no business there."""
    return _CONTROLS.sub("", text)


def _is_terminal(file: TextIO) -> bool:
    try:
        return file.isatty() and os.get_terminal_size(file.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _point_to_nowhere(file: TextIO) -> None:
    """Keep Python from complaining at exit about a pipe that nobody reads (its docs, "Note on SIGPIPE")."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return
