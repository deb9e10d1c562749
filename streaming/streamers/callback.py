"""A streamer that calls a function, sync or async, with every event."""

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from streaming.errors import StreamerMisuse, StreamTimeout
from streaming.events import Event, PromptEvent
from streaming.streamers.base import EventStreamer


class CallbackStreamer(EventStreamer):
    """Call `callback(event)` for every event in order, or `callback(event, row)` in a batch of several.

    Unless `skip_prompt`, the first event is a PromptEvent. What the callback raises ends the generation.

    A coroutine function runs in the event loop that the streamer was made in, one call after the other; `generate()`
    waits for each, at most `timeout` seconds, in a thread of its own (`asyncio.to_thread(model.generate, ...)`).
    """

    def __init__(
        self,
        tokenizer: Any,
        callback: Callable[..., Any],
        skip_prompt: bool = False,
        timeout: float = 30.0,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, eos_token_id=eos_token_id, **decode_kwargs)
        self._callback = callback
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._n_rows_told = 1
        if inspect.iscoroutinefunction(callback):
            try:
                self._loop = asyncio.get_running_loop()
            except RuntimeError:
                raise StreamerMisuse("Make the streamer inside the event loop that its callback runs in.") from None

    def on_start(self, n_rows: int) -> None:
        self._n_rows_told = n_rows

    def on_prompt(self, row: int, text: str) -> None:
        self._call(row, PromptEvent(text))

    def on_event(self, row: int, event: Event) -> None:
        self._call(row, event)

    def _call(self, row: int, event: Event | PromptEvent) -> None:
        args = (event,) if self._n_rows_told == 1 else (event, row)
        if self._loop is None:
            self._callback(*args)
            return
        self._refuse_own_loop()
        if self._loop.is_closed():
            raise StreamerMisuse("The event loop that the callback runs in was closed.")
        called = asyncio.run_coroutine_threadsafe(self._callback(*args), self._loop)
        try:
            called.result(self._timeout)
        except concurrent.futures.TimeoutError as error:
            if called.done():
                raise  # the callback's own
            called.cancel()
            raise StreamTimeout(f"The callback took longer than {self._timeout:g} s.") from error

    def _refuse_own_loop(self) -> None:
        try:
            is_own = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return
        if is_own:
            raise StreamerMisuse(
                "generate() blocks the event loop that the callback needs; call it in a thread, "
                "with asyncio.to_thread(model.generate, ...)."
            )
