"""The API's live answers: who reads them, when a deserted one is cancelled, and how a lost reader finds its own again.

Used from the server's event loop only.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from streaming.engine.base import Generation
from streaming.events import Event
from streaming.server.openai_schema import Asked

KEEP_S = 60.0
"""How long an answer that has ended can still be read from the beginning, after its last reader has left."""
MAX_KEPT = 64
"""How many such answers are kept; the oldest leave first."""


@dataclass(eq=False)
class Answer:
    """What one request gets: a generation for each choice. `created` is in seconds since 1970.

    While nobody reads it, `timer` runs: what happens to it if nobody comes back.
    """

    id: str
    owner: str
    model_id: str
    asked: Asked
    runs: Sequence[Generation]
    created: int = field(default_factory=lambda: int(time.time()))
    n_readers: int = 0
    timer: asyncio.TimerHandle | None = None

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(run.finish is not None for run in self.runs)

    def cancel(self) -> None:
        """End every choice that has not ended."""
        for run in self.runs:
            if run.finish is None:
                run.cancel()


class Answers:
    """The answers that are being given, and for a while those that were."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}  # of those that ended, the one left first comes first

    def add(self, answer: Answer) -> None:
        """Keep an answer from now on."""
        self._answers[answer.id] = answer

    def find(self, id: str, owner: str) -> Answer | None:
        """Give an owner's answer, while it is kept."""
        answer = self._answers.get(id)
        return answer if answer is not None and answer.owner == owner else None

    @contextmanager
    def reading(self, answer: Answer) -> Iterator[None]:
        """Be a reader of an answer; when its last one leaves, it is cancelled at once, or after its `resume_s`."""
        answer.n_readers += 1
        if answer.timer is not None:
            answer.timer.cancel()
        try:
            yield
        finally:
            answer.n_readers -= 1
            if not answer.n_readers:
                patience_s = 0.0 if answer.is_done else answer.asked.resume_s
                answer.timer = asyncio.get_running_loop().call_later(patience_s, self._end, answer)

    def _end(self, answer: Answer) -> None:
        """Cancel an answer to which nobody came back, and forget it in a while; beyond MAX_KEPT, the one left first."""
        answer.cancel()
        answer.timer = asyncio.get_running_loop().call_later(KEEP_S, self._forget, answer)
        self._answers.pop(answer.id, None)
        self._answers[answer.id] = answer
        ended = [one for one in self._answers.values() if one.is_done and not one.n_readers]
        for one in ended[:-MAX_KEPT]:
            self._forget(one)

    def _forget(self, answer: Answer) -> None:
        self._answers.pop(answer.id, None)
        if answer.timer is not None:
            answer.timer.cancel()


async def follow(
    runs: Sequence[Generation], after: Sequence[int], heartbeat_s: float
) -> AsyncGenerator[tuple[int, Event] | None, None]:
    """Follow several logs as one, from an offset in each: (choice, event), or None after `heartbeat_s` without any."""
    n_read, told_at = list(after), time.monotonic()
    while True:
        for choice, run in enumerate(runs):
            for event in run.log.snapshot(n_read[choice]):
                n_read[choice] += 1
                yield choice, event
                told_at = time.monotonic()
        rest = [(run, n) for run, n in zip(runs, n_read, strict=True) if run.finish is None or n < len(run.log)]
        if not rest:
            return
        left_s = told_at + heartbeat_s - time.monotonic()
        if left_s <= 0:
            yield None
            told_at = time.monotonic()
            continue
        waiting = [asyncio.ensure_future(run.log.wait_async(n, left_s)) for run, n in rest]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
