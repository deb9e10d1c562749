"""Streamers: what `generate(streamer=…)` talks to. `put()` brings tokens, `end()` says that no more come.

RowStream turns the tokens of one sequence into events; EventStreamer drives it from `put()` and `end()`; a sink
says where the events go by overriding `on_event`. IteratorStreamer's sink is the log that readers follow.

Source of the protocol: transformers 5.23, `generation.streamers.BaseStreamer` and `GenerationMixin.generate`: the
prompt comes first as `(batch, seq)`, then each step as `(batch,)`; `end()` is not called when generation raises.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from streaming.detokenizer import Detokenizer, StopMatcher
from streaming.errors import GenerationCancelled, GenerationFailed, StreamerMisuse
from streaming.events import Event, FinishEvent, FinishReason, Timings, TokenEvent, TopToken
from streaming.log import EventLog

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
        self._release()
        text = self._stop.feed(self._detokenizer.feed(token_id))
        logprob, top = (None, None) if self._logprobs is None else self._logprobs(token_id)
        event = TokenEvent(self.n_tokens, token_id, text, logprob, top, now_s)
        self.n_tokens += 1
        self.last_id = token_id
        self.last_at_s = now_s
        if self.first_at_s is None:
            self.first_at_s = now_s
        if self._stop.held or self._detokenizer.held:
            self._waiting = event
        else:
            self._emit(event)

    def end(self) -> None:
        """Flush the tail into the last token's event."""
        if self._waiting is None:
            return
        tail = self._stop.feed(self._detokenizer.flush()) + self._stop.flush()
        event, self._waiting = self._waiting, None
        self._emit(TokenEvent(event.index, event.id, event.text + tail, event.logprob, event.top, event.t_s))

    def _release(self) -> None:
        if self._waiting is not None:
            event, self._waiting = self._waiting, None
            self._emit(event)

    def timings(self, queued_s: float = 0.0) -> Timings:
        """Summarise the pace so far."""
        if self.first_at_s is None or self.last_at_s is None:
            return Timings(queued_s=queued_s)
        took_s = self.last_at_s - self.first_at_s
        rate = (self.n_tokens - 1) / took_s if self.n_tokens > 1 and took_s > 0 else None
        return Timings(queued_s=queued_s, ttft_s=self.first_at_s, tokens_per_s=rate)


class EventStreamer(BaseStreamer):
    """Drive a RowStream from `put()` and `end()`; subclasses say where the events go.

    Args:
        tokenizer: the model's tokenizer.
        skip_prompt: leave the prompt's text out.
        decode_kwargs: as for `TextStreamer`; only `skip_special_tokens` changes the text.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self._decode_kwargs = decode_kwargs
        self._row: RowStream | None = None
        self._n_prompt_tokens = 0

    def on_prompt(self, text: str) -> None:
        """Receive the prompt's text, once, before the first token, unless `skip_prompt`."""

    def on_event(self, event: Event) -> None:
        """Receive the next event."""
        raise NotImplementedError

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, `(1, seq)`, then every step's new tokens, `(n,)`."""
        if value.dim() == 2 and self._row is None:
            if value.shape[0] > 1:
                raise StreamerMisuse("This streamer follows one sequence, but the batch has several.")
            prompt_ids = value[0].tolist()
            self._n_prompt_tokens = len(prompt_ids)
            self._row = self._open_row(prompt_ids)
            return
        if self._row is None:
            raise StreamerMisuse("The first put() must bring the prompt, as generate() does.")
        for token_id in value.flatten().tolist():
            self._row.put(token_id)

    def end(self) -> None:
        """Flush the tail and write the FinishEvent."""
        last_id = None if self._row is None else self._row.last_id
        eos = getattr(self.tokenizer, "eos_token_id", None)
        self._finish("stop" if last_id is not None and last_id == eos else "length")

    def fail(self, error: BaseException) -> None:
        """End the stream because generation raised: readers get what came, then the error."""
        self._finish("error", str(error) or type(error).__name__)

    def _open_row(self, prompt_ids: list[int]) -> RowStream:
        context_ids = () if self.skip_prompt else prompt_ids
        skip_special_tokens = bool(self._decode_kwargs.get("skip_special_tokens", False))
        detokenizer = Detokenizer(self.tokenizer, context_ids, skip_special_tokens=skip_special_tokens)
        if not self.skip_prompt:
            self.on_prompt(detokenizer.context_text)
        return RowStream(detokenizer, self.on_event)

    def _finish(self, reason: FinishReason, error: str | None = None) -> None:
        row, self._row = self._row, None
        if row is not None:
            row.end()
        self.on_event(
            FinishEvent(
                reason,
                error,
                n_prompt_tokens=self._n_prompt_tokens,
                n_generated_tokens=0 if row is None else row.n_tokens,
                timings=Timings() if row is None else row.timings(),
            )
        )


class IteratorStreamer(EventStreamer):
    """A stand-in for `TextIteratorStreamer` whose stream is a log: many readers, cancel, errors that arrive.

    Iterate it for text, or follow `events()`. `timeout` bounds, in seconds, how long an iteration waits for the
    next text; it raises StreamTimeout. A failed generation raises GenerationFailed from the iteration.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.log = EventLog()
        self._prompt_text = ""
        self._texts: Iterator[str] | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel()` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Make generation stop within one token: the next `put()` raises GenerationCancelled inside it."""
        self._cancelled = True
        self.log.touch()

    def put(self, value: torch.Tensor) -> None:
        if self._cancelled:
            raise GenerationCancelled("The generation was cancelled.")
        super().put(value)

    def on_prompt(self, text: str) -> None:
        self._prompt_text = text

    def on_event(self, event: Event) -> None:
        self.log.append(event)

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """Follow the stream from offset `after`; see EventLog.events."""
        return self.log.events(after, timeout)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._texts is None:
            self._texts = self._iterate_texts()
        return next(self._texts)

    def _iterate_texts(self) -> Iterator[str]:
        for event in self.events(timeout=self.timeout):
            if self._prompt_text:
                yield self._prompt_text
                self._prompt_text = ""
            if isinstance(event, FinishEvent):
                if event.reason == "error":
                    raise GenerationFailed(event.error)
            elif event.text:
                yield event.text
