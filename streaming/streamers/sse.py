"""Server-sent events: frames with the log's offsets as ids, heartbeats, resuming with `Last-Event-ID`.

Format: WHATWG HTML, "Server-sent events", section 9.2.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from streaming.errors import StreamTimeout
from streaming.events import Event, PromptEvent
from streaming.log import EventLog
from streaming.streamers.base import event_json
from streaming.streamers.iterator import IteratorStreamer, Stream

HEARTBEAT = ": keep-alive\n"
"""A comment: it keeps a proxy from closing, or holding back, a stream that says nothing for a while.

No empty line ends it: after an event with an id, OpenAI's client (3.54, SSEDecoder.decode) takes that for the end of an
event without data, and fails.
"""


def sse_frame(data: str, *, id: int | str | None = None, event: str | None = None) -> str:
    """Give one event as it goes over the wire; data of several lines stays whole."""
    head = ("" if id is None else f"id: {id}\n") + ("" if event is None else f"event: {event}\n")
    return head + "".join(f"data: {line}\n" for line in data.split("\n")) + "\n"


class SSEFrames:
    """Follow any log as frames, with `for` or `async for`, from after the event whose id a reader had last.

    A heartbeat comes when nothing else did for `heartbeat_s` seconds. `prompt_text` is asked once, at the start of a
    whole stream, for a first frame without an id.
    """

    def __init__(
        self,
        log: EventLog,
        last_event_id: str | None = None,
        heartbeat_s: float = 15.0,
        prompt_text: Callable[[], str] = str,
    ) -> None:
        self._log = log
        # An id that is none of ours comes from elsewhere: the reader has nothing yet.
        is_ours = last_event_id is not None and last_event_id.isdecimal()
        self._after = int(last_event_id or 0) + 1 if is_ours else 0
        self._heartbeat_s = heartbeat_s
        self._prompt_text = prompt_text
        self._ready: list[str] = []
        self._events: Iterator[Event] | None = None
        self._aevents: AsyncIterator[Event] | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    def __next__(self) -> str:
        if not self._ready:
            self._events = self._events or self._log.events(self._after, self._heartbeat_s)
            try:
                self._take(next(self._events))
            except StreamTimeout:
                self._events = None
                return HEARTBEAT
        return self._ready.pop(0)

    async def __anext__(self) -> str:
        if not self._ready:
            self._aevents = self._aevents or self._log.aevents(self._after, self._heartbeat_s)
            try:
                self._take(await anext(self._aevents))
            except StreamTimeout:
                self._aevents = None
                return HEARTBEAT
        return self._ready.pop(0)

    def _take(self, event: Event) -> None:
        if self._after == 0 and (text := self._prompt_text()):
            self._ready.append(sse_frame(event_json(PromptEvent(text))))
        self._ready.append(sse_frame(event_json(event), id=self._after))
        self._after += 1


class SSEStreamer(IteratorStreamer):
    """An IteratorStreamer of server-sent events: iterate it, or take `frames()` for each reader.

    Each frame's data is an event as JSON and its id the event's offset, so that a browser's EventSource that lost its
    connection goes on where it was: give its `Last-Event-ID` header to `frames()`.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        heartbeat_s: float = 15.0,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, eos_token_id=eos_token_id, **decode_kwargs)
        self.heartbeat_s = heartbeat_s

    def frames(self, last_event_id: str | None = None, *, row: int = 0) -> SSEFrames:
        """Follow a row of the latest generation, with `for` or `async for`."""
        return self._frames(self._stream, last_event_id, row)

    def _read(self, stream: Stream) -> SSEFrames:
        return self._frames(stream, None, 0)

    def _frames(self, stream: Stream, last_event_id: str | None, row: int) -> SSEFrames:
        return SSEFrames(stream.log(row), last_event_id, self.heartbeat_s, lambda: stream.prompt_texts.get(row, ""))
