"""The one idea: a stream is a log, not a queue.

A writer appends TokenEvents, then exactly one FinishEvent. Any number of readers, in threads or in event loops,
follow from any offset; reading takes nothing away and a late reader misses nothing.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

from streaming.errors import StreamerMisuse, StreamTimeout
from streaming.events import Event, FinishEvent, TokenEvent


class EventLog:
    """An append-only list of events that readers can wait on. Safe to use from any thread."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._finish: FinishEvent | None = None
        self._n_waiting = 0  # readers to notify: with none, an append costs half
        self._listeners: tuple[Callable[[], None], ...] = ()

    def append(self, event: Event) -> None:
        """Add one event and wake the readers.

        Raises:
            StreamerMisuse: after the FinishEvent.
        """
        with self._changed:
            if self._finish is not None:
                raise StreamerMisuse("The stream has already ended; nothing can be added to it.")
            self._events.append(event)
            if isinstance(event, FinishEvent):
                self._finish = event
            if self._n_waiting:
                self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def touch(self) -> None:
        """Wake the readers without a new event, because something beside the log changed (progress, say)."""
        with self._changed:
            self._changed.notify_all()
        for listener in self._listeners:
            listener()

    @property
    def finish(self) -> FinishEvent | None:
        """The last event once the stream has ended, else None."""
        return self._finish

    def __len__(self) -> int:
        return len(self._events)

    def snapshot(self, after: int = 0) -> list[Event]:
        """Give the events from offset `after` that are there now, without waiting."""
        return self._events[after:]

    def token_ids(self) -> list[int]:
        """Give the ids of all tokens so far."""
        return [event.id for event in self.snapshot() if isinstance(event, TokenEvent)]

    def text(self) -> str:
        """Give the text so far."""
        return "".join(event.text for event in self.snapshot() if isinstance(event, TokenEvent))

    def wait(self, after: int, timeout: float | None = None) -> list[Event]:
        """Wait until there are events from offset `after`, a `touch()`, or `timeout` seconds; give what is there."""
        with self._changed:
            if len(self._events) <= after and self.finish is None:
                with self._waiting():
                    self._changed.wait(timeout)
            return self._events[after:]

    async def wait_async(self, after: int, timeout: float | None = None) -> list[Event]:
        """Wait as `wait()` does, in an event loop, without a thread."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            # A loop that was closed, perhaps in this moment, has no reader left to wake: no matter of the writer's.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            if len(self._events) > after or self.finish is not None:
                return self._events[after:]
            self._listeners = (*self._listeners, wake)
        try:
            await asyncio.wait_for(changed.wait(), timeout)
        except TimeoutError:
            pass
        finally:
            with self._changed:
                self._listeners = tuple(listener for listener in self._listeners if listener is not wake)
        return self._events[after:]

    def wait_finish(self, timeout: float | None = None) -> FinishEvent | None:
        """Wait for the FinishEvent, at most `timeout` seconds; None when it has not come."""
        with self._changed:
            with self._waiting():
                self._changed.wait_for(lambda: self.finish is not None, timeout)
            return self.finish

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Be counted among those to notify; the lock is held."""
        self._n_waiting += 1
        try:
            yield
        finally:
            self._n_waiting -= 1

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Follow the log from offset `after` to its FinishEvent.

        Raises:
            StreamTimeout: when nothing was added for `timeout` seconds.
        """
        while not self._is_read(after):
            deadline = _deadline(timeout)
            while not (batch := self.wait(after, _left(deadline))) and not self._is_read(after):
                _check(deadline, timeout)
            yield from batch
            after += len(batch)

    async def aevents(self, after: int = 0, timeout: float | None = None) -> AsyncIterator[Event]:
        """Follow the log from offset `after` as `events()` does, in an event loop, without a thread."""
        while not self._is_read(after):
            deadline = _deadline(timeout)
            while not (batch := await self.wait_async(after, _left(deadline))) and not self._is_read(after):
                _check(deadline, timeout)
            for event in batch:
                yield event
            after += len(batch)

    def _is_read(self, after: int) -> bool:
        return self._finish is not None and len(self._events) <= after


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _check(deadline: float | None, timeout: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise StreamTimeout(f"No token came for {timeout:g} s; generation may be stuck.")
