"""A streamer that hands everything to several others."""

import contextlib
import logging
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from streaming.errors import GenerationCancelled, SinkFailed

logger = logging.getLogger(__name__)


class TeeStreamer(BaseStreamer):
    """Pass `put()` and `end()` on to several sinks, of this library or any other with these two methods.

    A sink that fails gets nothing more and does not stop the others; `end()` raises SinkFailed for it when the others
    have ended. A sink that was cancelled stops the generation, for all.
    """

    def __init__(self, *sinks: Any) -> None:
        self.sinks = sinks
        self.errors: dict[int, Exception] = {}  # by the sink's place
        self._has_ended = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_ended:
            self.errors, self._has_ended = {}, False
        for place, sink in enumerate(self.sinks):
            if place in self.errors:
                continue
            try:
                sink.put(value)
            except GenerationCancelled as cancelled:
                self.fail(cancelled)
                raise
            except Exception as error:
                self._drop(place, error)

    def end(self) -> None:
        """End every sink.

        Raises:
            SinkFailed: naming each sink that failed on the way; its error is in `errors`.
        """
        for place, sink in enumerate(self.sinks):
            if place not in self.errors:
                try:
                    sink.end()
                except Exception as error:
                    self._drop(place, error)
        self._has_ended = True
        if self.errors:
            names = "; ".join(f"{type(self.sinks[place]).__name__}: {error}" for place, error in self.errors.items())
            raise SinkFailed(f"{len(self.errors)} of {len(self.sinks)} sinks failed: {names}") from next(
                iter(self.errors.values())
            )

    def fail(self, error: BaseException) -> None:
        """End every sink because generation raised `error`; sinks of other libraries just end."""
        self._has_ended = True
        for place, sink in enumerate(self.sinks):
            if place not in self.errors:
                try:
                    sink.fail(error) if hasattr(sink, "fail") else sink.end()
                except Exception as sink_error:
                    self._drop(place, sink_error)

    def _drop(self, place: int, error: Exception) -> None:
        sink = self.sinks[place]
        logger.warning("%s failed and gets nothing more: %s", type(sink).__name__, error)
        self.errors[place] = error
        # Whoever reads from it learns why; it may be past telling.
        with contextlib.suppress(Exception):
            if hasattr(sink, "fail"):
                sink.fail(error)
