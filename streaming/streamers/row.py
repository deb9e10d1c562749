"""One sequence of a batch: token ids in, TokenEvents out."""

import time
from collections.abc import Callable, Sequence

from streaming.detokenizer import Detokenizer, StopMatcher
from streaming.events import FinishEvent, FinishReason, Timings, TokenEvent, TopToken

LogprobSource = Callable[[int], tuple[float | None, tuple[TopToken, ...] | None]]


class RowStream:
    """The tokens of one sequence, as TokenEvents.

    The newest event waits for its successor (or the end) as long as text is held back with it, so that the last
    token can carry the tail and the texts of the token events alone join to the full decode.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        emit: Callable[[TokenEvent], None],
        *,
        stop: Sequence[str] = (),
        logprobs: LogprobSource | None = None,
        started_at: float | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stop)
        self._has_stop = bool(stop)
        self._emit = emit
        self._logprobs = logprobs
        self._started_at = time.perf_counter() if started_at is None else started_at
        self._waiting: TokenEvent | None = None
        self.n_tokens = 0
        self.last_id: int | None = None
        self.first_at_s: float | None = None
        self.last_at_s: float | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met, if any."""
        return self._stop.matched

    def put(self, token_id: int) -> None:
        """Add one token."""
        now_s = time.perf_counter() - self._started_at
        text = self._detokenizer.feed(token_id)
        if self._has_stop:
            text = self._stop.feed(text)
        logprob, top = (None, None) if self._logprobs is None else self._logprobs(token_id)
        event = TokenEvent(self.n_tokens, token_id, text, logprob, top, now_s)
        self.n_tokens += 1
        self.last_id = token_id
        self.last_at_s = now_s
        if self.first_at_s is None:
            self.first_at_s = now_s
        if self._waiting is not None:
            self._release("")
        if self._detokenizer.held or self._stop.held:
            self._waiting = event
        else:
            self._emit(event)

    def end(self) -> None:
        """Flush the tail into the last token's event."""
        self._release(self._stop.feed(self._detokenizer.flush()) + self._stop.flush())

    def _release(self, tail: str) -> None:
        event, self._waiting = self._waiting, None
        if event is None:
            return
        if tail:
            event = TokenEvent(event.index, event.id, event.text + tail, event.logprob, event.top, event.t_s)
        self._emit(event)

    def finish(
        self,
        reason: FinishReason,
        error: str | None = None,
        *,
        n_prompt_tokens: int = 0,
        n_reused_tokens: int = 0,
        queued_s: float = 0.0,
    ) -> FinishEvent:
        """Flush the tail; give the event that sums the row up."""
        self.end()
        return FinishEvent(
            reason,
            error,
            n_prompt_tokens=n_prompt_tokens,
            n_reused_tokens=n_reused_tokens,
            n_generated_tokens=self.n_tokens,
            timings=self._timings(queued_s),
        )

    def _timings(self, queued_s: float) -> Timings:
        if self.first_at_s is None or self.last_at_s is None:
            return Timings(queued_s=queued_s)
        took_s = self.last_at_s - self.first_at_s
        rate = (self.n_tokens - 1) / took_s if self.n_tokens > 1 and took_s > 0 else None
        return Timings(queued_s=queued_s, ttft_s=self.first_at_s, tokens_per_s=rate)
