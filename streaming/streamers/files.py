"""A streamer that writes files, and the writer behind it, which the command line uses as well."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from streaming.errors import SinkFailed, StreamerMisuse
from streaming.events import Event, FinishEvent, PromptEvent
from streaming.streamers.base import EventStreamer, event_json, event_text

Format = Literal["text", "jsonl"]


class FileWriter:
    """Write to a file so that `tail -f` follows, in UTF-8.

    With `atomic`, what is written gathers in a file beside it and takes its place on `close()`; what was there stays
    until then. With `append`, it is added to what was there.

    Raises:
        SinkFailed: the file cannot be written (a full disk, say); what was written is kept.
    """

    def __init__(self, path: str | os.PathLike[str], *, atomic: bool = False, append: bool = False) -> None:
        self.path = Path(path)
        self._written_to = self.path.with_name(self.path.name + ".part") if atomic else self.path
        self._has_failed = False
        try:
            self._file = self._written_to.open("a" if append else "w", encoding="utf-8", errors="replace", newline="")
        except OSError as error:
            raise self._failed(error) from error

    def write(self, text: str) -> None:
        """Write and flush. Does nothing after a failure."""
        if self._has_failed:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self, *, is_whole: bool = True) -> None:
        """Close the file; an atomic one takes its place only when it is whole."""
        if self._has_failed:
            with contextlib.suppress(OSError):  # it tries once more to write what could not be written
                self._file.close()
            return
        try:
            self._file.close()
            if is_whole and self._written_to != self.path:
                self._written_to.replace(self.path)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> SinkFailed:
        self._has_failed = True
        return SinkFailed(f"{self._written_to} cannot be written ({error.strerror}); what was written before is kept.")


class FileStreamer(EventStreamer):
    """Write the text to a file as it comes, or with `format="jsonl"` the events, one JSON object a line.

    A file begins anew with every `generate()` unless `append`; `atomic` renames it into place at the end of a stream
    that did not fail. A batch goes to one file of JSON lines, which then carry their `row`, or to a text file for each
    row ("out.txt" becomes "out-0.txt", "out-1.txt"). A disk that is full ends the generation with SinkFailed.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: str | os.PathLike[str],
        skip_prompt: bool = False,
        *,
        format: Format = "text",
        atomic: bool = False,
        append: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, eos_token_id=eos_token_id, **decode_kwargs)
        if format not in ("text", "jsonl"):
            raise StreamerMisuse(f'format must be "text" or "jsonl", not {format!r}.')
        if atomic and append:
            raise StreamerMisuse("A file is either atomic or appended to, not both.")
        self.path = Path(path)
        self._format = format
        self._atomic = atomic
        self._append = append
        self._writers: list[FileWriter] = []
        self._is_whole = True

    def on_start(self, n_rows: int) -> None:
        paths = [self.path]
        if n_rows > 1 and self._format == "text":
            paths = [self.path.with_stem(f"{self.path.stem}-{row}") for row in range(n_rows)]
        self._writers = []
        self._is_whole = True
        for path in paths:
            self._writers.append(FileWriter(path, atomic=self._atomic, append=self._append))

    def on_prompt(self, row: int, text: str) -> None:
        self._write(row, text, PromptEvent(text))

    def on_event(self, row: int, event: Event) -> None:
        if isinstance(event, FinishEvent) and event.reason in ("error", "cancelled"):
            self._is_whole = False
        self._write(row, event_text(event), event)

    def on_end(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close(is_whole=self._is_whole)

    def _write(self, row: int, text: str, event: Event | PromptEvent) -> None:
        if not self._writers:
            return  # the file could not be opened; whoever opened it was told
        if self._format == "text":
            self._writers[row].write(text)
        else:
            self._writers[0].write(event_json(event, row if self._n_rows > 1 else None) + "\n")
