"""A streamer whose stream is a log: the stand-in for `TextIteratorStreamer` and `AsyncTextIteratorStreamer`."""

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import torch

from streaming.errors import GenerationCancelled, GenerationFailed, StreamerMisuse, StreamTimeout
from streaming.events import Event, FinishEvent
from streaming.log import EventLog
from streaming.streamers.base import EventStreamer, event_text


class Stream:
    """What one generate() writes: a log and a prompt's text for every row. Readers may come before the writer."""

    def __init__(self) -> None:
        self.n_rows: int | None = None
        self.prompt_texts: dict[int, str] = {}
        self.error: BaseException | None = None
        self._logs: dict[int, EventLog] = {}
        self._lock = threading.Lock()

    def log(self, row: int) -> EventLog:
        with self._lock:
            if row not in self._logs:
                self._logs[row] = log = EventLog()
                if self.n_rows is not None and row >= self.n_rows:
                    log.append(_no_such_row(self.n_rows))
            return self._logs[row]

    def start(self, n_rows: int) -> None:
        with self._lock:
            self.n_rows = n_rows
            for row, log in self._logs.items():
                if row >= n_rows:
                    log.append(_no_such_row(n_rows))


class IteratorStreamer(EventStreamer):
    """A stand-in for `TextIteratorStreamer` and, with `async for`, for `AsyncTextIteratorStreamer`.

    Iterate it for text as with those, or follow `events()`: any number of readers, each from any offset, of every
    row. `cancel()` stops the generation; its failure raises GenerationFailed in whoever iterates.

    Errors reach readers also from a bare `Thread(target=model.generate, ...)` once it has called the streamer; with
    `Thread(target=streamer.run, args=(model.generate,), ...)` always, with their cause, and nothing is printed.

    Iterating raises StreamTimeout (which is a `queue.Empty` and a `TimeoutError`, as those raise) when no token came
    for `timeout` seconds. Methods may be called from any thread.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, eos_token_id=eos_token_id, **decode_kwargs)
        self.timeout = timeout
        self._stream = Stream()
        self._next_stream = Stream()  # for readers who iterate again before the next generate() has begun
        self._read_stream: Stream | None = None
        self._logs: list[EventLog] = []  # of the rows being written
        self._reader: Any = None  # of whoever iterates the streamer itself
        self._reader_stream = self._stream
        self._cancelled = False

    @property
    def log(self) -> EventLog:
        """The log of the first row, of the latest generation."""
        return self._stream.log(0)

    @property
    def cancelled(self) -> bool:
        """Whether the latest generation was cancelled."""
        return self._cancelled

    def cancel(self) -> None:
        """Make generation stop within one token: the next `put()` raises GenerationCancelled inside it.

        A `Thread(target=model.generate)` then ends without a traceback. Does nothing after the end.
        """
        if self._state != "ended":
            _hush_cancelled_threads()
            self._cancelled = True

    def events(self, after: int = 0, timeout: float | None = None, *, row: int = 0) -> Iterator[Event]:
        """Follow a row of the latest generation from offset `after`; see EventLog.events."""
        return self._stream.log(row).events(after, timeout)

    def aevents(self, after: int = 0, timeout: float | None = None, *, row: int = 0) -> AsyncIterator[Event]:
        """Follow a row in an event loop, as `events()` does."""
        return self._stream.log(row).aevents(after, timeout)

    # What generate() calls

    def put(self, value: torch.Tensor) -> None:
        if self._cancelled:
            if self._state != "ended" or value.dim() == 1:
                cancelled = GenerationCancelled("The generation was cancelled.")
                self.fail(cancelled)
                raise cancelled
            self._cancelled = False
        super().put(value)

    def fail(self, error: BaseException) -> None:
        if self._state != "ended":
            self._stream.error = error
        super().fail(error)

    def run(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `generate(*args, streamer=self, **kwargs)`, for a thread: what it raises reaches the readers instead."""
        try:
            return super().run(generate, *args, **kwargs)
        except Exception:
            return None

    def on_start(self, n_rows: int) -> None:
        if self._stream.n_rows is not None:
            self._stream, self._next_stream = self._next_stream, Stream()
        self._stream.start(n_rows)
        self._logs = [self._stream.log(row) for row in range(n_rows)]

    def on_prompt(self, row: int, text: str) -> None:
        self._stream.prompt_texts[row] = text

    def on_event(self, row: int, event: Event) -> None:
        self._logs[row].append(event)

    def _emitter(self, row: int) -> Callable[[Event], None]:
        return self._logs[row].append

    # Iterating

    def texts(self, row: int = 0) -> "TextReader":
        """Follow a row's text from the start, the prompt's first unless it is skipped; with `for` or `async for`."""
        return TextReader(self._stream, row, self.timeout)

    def __iter__(self) -> Iterator[str]:
        return self

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    def __next__(self) -> str:
        try:
            text: str = next(self._own_reader())
        except (StopIteration, GenerationFailed):
            self._forget_reader()
            raise
        return text

    async def __anext__(self) -> str:
        try:
            text: str = await anext(self._own_reader())
        except (StopAsyncIteration, GenerationFailed):
            self._forget_reader()
            raise
        return text

    def _own_reader(self) -> Any:
        if self._reader is None:
            self._reader_stream = self._next_stream if self._stream is self._read_stream else self._stream
            self._reader = self._read(self._reader_stream)
        return self._reader

    def _forget_reader(self) -> None:
        self._reader, self._read_stream = None, self._reader_stream

    def _read(self, stream: Stream) -> Any:
        """Give what iterating the streamer gives."""
        return TextReader(stream, None, self.timeout)


class TextReader:
    """One reader of a row's text. After a StreamTimeout it goes on where it was."""

    def __init__(self, stream: Stream, row: int | None, timeout: float | None) -> None:
        self._stream = stream
        self._row = row  # None where no row was asked for, which only a batch of one can answer
        self._log = stream.log(row or 0)
        self._timeout = timeout
        self._n_read = 0
        self._ready: deque[str] = deque()
        self._failure: GenerationFailed | None = None
        self._events: Iterator[Event] | None = None
        self._aevents: AsyncIterator[Event] | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    def __next__(self) -> str:
        while not self._ready:
            self._raise_failure()
            self._events = self._events or self._log.events(self._n_read, self._timeout)
            try:
                self._take(next(self._events))
            except StreamTimeout:
                self._events = None
                raise
        return self._ready.popleft()

    async def __anext__(self) -> str:
        while not self._ready:
            self._raise_failure()
            self._aevents = self._aevents or self._log.aevents(self._n_read, self._timeout)
            try:
                self._take(await anext(self._aevents))
            except StreamTimeout:
                self._aevents = None
                raise
        return self._ready.popleft()

    def _take(self, event: Event) -> None:
        stream = self._stream
        if self._row is None and stream.n_rows != 1:
            raise StreamerMisuse(f"The batch has {stream.n_rows} rows; follow each with texts(row) or events(row=row).")
        texts = [stream.prompt_texts.get(self._row or 0, "") if self._n_read == 0 else "", event_text(event)]
        self._n_read += 1
        self._ready += [text for text in texts if text]
        if isinstance(event, FinishEvent) and event.reason == "error":
            self._failure = GenerationFailed(event.error)
            self._failure.__cause__ = stream.error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _no_such_row(n_rows: int) -> FinishEvent:
    return FinishEvent("error", f"The batch has {n_rows} rows only.")


_hush = threading.Lock()
_is_hushed = False


def _hush_cancelled_threads() -> None:
    """Let a thread that `cancel()` has ended end quietly, as one that raises SystemExit does."""
    global _is_hushed
    with _hush:
        if _is_hushed:
            return
        _is_hushed = True
        before = threading.excepthook

        def hook(args: threading.ExceptHookArgs, /) -> None:
            if not issubclass(args.exc_type, GenerationCancelled):
                before(args)

        threading.excepthook = hook
