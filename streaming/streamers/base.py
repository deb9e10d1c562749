"""From what `generate()` hands to a streamer to events, row by row.

Source of the protocol: transformers 5.23, `generation.streamers.BaseStreamer` and `GenerationMixin.generate`: the
prompt comes first as `(batch, seq)`, then each step as `(batch,)`, or `(1, n)` where several tokens were accepted at
once; `end()` is not called when generation raises. tests/contract/test_streamer_api.py states it in full.
"""

import functools
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

from streaming.detokenizer import Detokenizer
from streaming.errors import GenerationCancelled, StreamerMisuse
from streaming.events import Event, FinishEvent, FinishReason, PromptEvent, TokenEvent
from streaming.streamers.row import RowStream

State = Literal["new", "open", "ended"]

_SHAPES = "put() takes token ids: first the prompts, (batch, seq), then at each step (batch,)."


class EventStreamer(BaseStreamer):
    """Turn `put()` and `end()` into events; a subclass says where they go, with the `on_*` methods.

    Every row of a batch is a stream of its own: TokenEvents, then one FinishEvent. A row that ends before the others
    ends at once; the padding that follows, and the padding before a shorter prompt, is never shown. After its end the
    streamer can serve another `generate()`; two at once it refuses.

    Args:
        tokenizer: the model's tokenizer, or its processor.
        skip_prompt: leave the prompt's text out.
        eos_token_id: what ends a row, where the model's differs from the tokenizer's.
        decode_kwargs: as for `TextStreamer`; only `skip_special_tokens` changes the text.

    Raises:
        StreamerMisuse: the tokenizer cannot decode, or a method is called out of turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        **decode_kwargs: Any,
    ) -> None:
        Detokenizer(tokenizer)  # refuses what cannot decode
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self._skip_special_tokens = bool(decode_kwargs.get("skip_special_tokens", False))
        eos = getattr(tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        self._eos_ids = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self._state: State = "new"
        self._n_rows = 1
        self._n_prompt_tokens: list[int] = []
        self._rows: dict[int, RowStream] = {}  # those that have not ended
        self._unfinished: set[int] = set()
        self._put_one: Callable[[int], None] | None = None  # of the one row, where there is one
        self._only_wide_steps = True
        self._thread = threading.current_thread()
        self._lifeline: threading.local | None = None

    # What a subclass overrides

    def on_start(self, n_rows: int) -> None:
        """Learn that a generation of `n_rows` sequences begins."""

    def on_prompt(self, row: int, text: str) -> None:
        """Receive a prompt's text, unless `skip_prompt`."""

    def on_event(self, row: int, event: Event) -> None:
        """Receive a row's next event."""

    def on_end(self) -> None:
        """Learn that every row has ended."""

    def _emitter(self, row: int) -> Callable[[Event], None]:
        """Give what takes a row's events: `on_event`, or something quicker that does the same."""
        return functools.partial(self.on_event, row)

    # What generate() calls

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, `(batch, seq)`, then every step's new tokens, `(batch,)`, or `(1, n)` for one row."""
        try:
            if self._put_one is not None and isinstance(value, torch.Tensor) and value.dim() == 1:
                self._only_wide_steps = False  # the quick way of _take() for nearly every call
                for token_id in value.tolist():
                    self._put_one(token_id)
            else:
                self._take(value)
        except BaseException as error:
            # It unwinds generate(), which will not call end().
            if self._state == "new" or self._thread is threading.current_thread():
                self.fail(error)
            raise

    def end(self) -> None:
        """Flush what is held and end every row that has not ended."""
        self._finish(lambda last_id: "stop" if last_id is None or last_id in self._eos_ids else "length")

    def fail(self, error: BaseException) -> None:
        """End every row because generation raised `error`: readers get what came, then why it ended.

        GenerationCancelled ends them as cancelled. Does nothing after the end.
        """
        is_cancel = isinstance(error, GenerationCancelled)
        self._finish(lambda _: "cancelled" if is_cancel else "error", None if is_cancel else describe(error))

    def run(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `generate(*args, streamer=self, **kwargs)`, and end the stream also when it raises.

        Gives what `generate` gives, or None when it was cancelled; every other exception goes on to the caller.
        """
        kwargs.setdefault("streamer", self)
        try:
            _refuse_beams(generate, kwargs)
            return generate(*args, **kwargs)
        except BaseException as error:
            self.fail(error)
            if isinstance(error, GenerationCancelled):
                return None
            raise

    # Rows

    def _take(self, value: torch.Tensor) -> None:
        n_dims = value.dim() if isinstance(value, torch.Tensor) else 0
        if n_dims not in (1, 2):
            raise StreamerMisuse(_SHAPES)
        if n_dims == 1 or self._is_wide_step(value):
            self._put_step(value)
        else:
            self._refuse_if_busy()
            self._open(value)

    def _is_wide_step(self, value: torch.Tensor) -> bool:
        """Whether a 2-D tensor is a step of assisted decoding, where all steps are, and no new prompt."""
        return (
            self._state == "open"
            and self._n_rows == 1
            and value.shape[0] == 1
            and self._only_wide_steps
            and self._thread is threading.current_thread()
        )

    def _refuse_if_busy(self) -> None:
        if self._state != "open":
            return
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            raise StreamerMisuse("This streamer follows a generate() already; give each call a streamer of its own.")
        self.fail(StreamerMisuse("generate() went away without ending its stream."))

    def _open(self, prompts: torch.Tensor) -> None:
        if prompts.is_floating_point() or prompts.shape[0] == 0:
            raise StreamerMisuse(_SHAPES)
        rows = prompts.tolist()
        if len(rows) > 1:
            rows = [_without_padding(ids, getattr(self.tokenizer, "pad_token_id", None)) for ids in rows]
        self._begin([len(ids) for ids in rows])
        for row, ids in enumerate(rows):
            context_ids = () if self.skip_prompt else ids
            detokenizer = Detokenizer(self.tokenizer, context_ids, skip_special_tokens=self._skip_special_tokens)
            self._rows[row] = RowStream(detokenizer, self._emitter(row))
            if not self.skip_prompt:
                self.on_prompt(row, detokenizer.context_text)
        self._put_one = self._rows[0].put if len(rows) == 1 else None

    def _begin(self, n_prompt_tokens: list[int]) -> None:
        self._state = "open"
        self._n_rows = len(n_prompt_tokens)
        self._n_prompt_tokens = n_prompt_tokens
        self._rows = {}
        self._unfinished = set(range(self._n_rows))
        self._only_wide_steps = True
        self._watch_thread()
        self.on_start(self._n_rows)

    def _put_step(self, value: torch.Tensor) -> None:
        if self._state == "new":
            raise StreamerMisuse("The first put() must bring the prompt, (batch, seq), as generate() does.")
        if self._state == "ended":
            raise StreamerMisuse("put() came after the end; a new generation begins with its prompt, (batch, seq).")
        if self._put_one is not None:
            for token_id in value[0].tolist():
                self._put_one(token_id)
            return
        if value.shape[0] != self._n_rows:
            raise StreamerMisuse(f"put() got tokens for {value.shape[0]} rows, but the prompt had {self._n_rows}.")
        for row, token_id in enumerate(value.tolist()):
            if row in self._rows:
                self._put_in_batch(row, token_id)

    def _put_in_batch(self, row: int, token_id: int) -> None:
        is_eos = token_id in self._eos_ids
        # generate() fills rows that have ended with padding, also those that ended with a token unknown here.
        if is_eos or token_id != getattr(self.tokenizer, "pad_token_id", None):
            self._rows[row].put(token_id)
            if not is_eos:
                return
        self._end_row(row, "stop")

    def _finish(self, reason_of: Callable[[int | None], FinishReason], error: str | None = None) -> None:
        """End what has not ended, each row for the reason that its last id gives."""
        if self._state == "ended":
            return
        if self._state == "new":
            self._begin([0])
        try:
            for row in sorted(self._unfinished):
                self._end_row(row, reason_of(self._rows[row].last_id if row in self._rows else None), error)
        finally:
            self._state = "ended"
            self._put_one = None
            self._lifeline = None
            self.on_end()

    def _end_row(self, row: int, reason: FinishReason, error: str | None = None) -> None:
        self._unfinished.discard(row)
        stream = self._rows.pop(row, None)
        if stream is None:  # it failed before its prompt was read
            self.on_event(row, FinishEvent(reason, error))
        else:
            self.on_event(row, stream.finish(reason, error, n_prompt_tokens=self._n_prompt_tokens[row]))

    # The thread that generates

    def _watch_thread(self) -> None:
        """Fail the stream when this thread ends without ending it, as a bare Thread(target=generate) does that raised.

        What a thread has in its local storage dies with it, and that is told at once.
        """
        self._thread = threading.current_thread()
        self._lifeline = lifeline = threading.local()
        lifeline.held = held = _Held()
        weakref.finalize(held, _fail_if_open, weakref.ref(self), weakref.ref(lifeline)).atexit = False


class _Held:
    """Something that can be told when it is gone."""


def _fail_if_open(streamer: "weakref.ref[EventStreamer]", lifeline: "weakref.ref[threading.local]") -> None:
    alive = streamer()
    if alive is not None and alive._lifeline is not None and alive._lifeline is lifeline():
        alive.fail(StreamerMisuse("generate() raised, and its thread ended; what it printed says why."))


def describe(error: BaseException) -> str:
    """Say what went wrong in one line."""
    first_line = str(error).strip().split("\n")[0]
    return first_line if isinstance(error, StreamerMisuse) else f"{type(error).__name__}: {first_line}".rstrip(": ")


def event_json(event: Event | PromptEvent, row: int | None = None) -> str:
    """Give an event as one line of JSON, with its `row` where there are several."""
    fields = event.to_dict()
    return json.dumps(fields if row is None else {**fields, "row": row}, ensure_ascii=False)


def event_text(event: Event) -> str:
    """Give what an event adds to the text."""
    return event.text if isinstance(event, TokenEvent) else ""


def _without_padding(ids: list[int], pad_id: int | None) -> list[int]:
    """Leave out the padding on the left of a prompt."""
    return ids[next((i for i, token_id in enumerate(ids) if token_id != pad_id), len(ids)) :]


def _refuse_beams(generate: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    own = getattr(getattr(generate, "__self__", None), "generation_config", None)
    configs = (kwargs.get("generation_config"), own)
    n_beams = kwargs.get("num_beams") or next((n for c in configs if (n := getattr(c, "num_beams", None))), 1)
    if n_beams > 1:
        raise StreamerMisuse(
            f"Beam search (num_beams={n_beams}) cannot be streamed: until the end it may drop the beam that was shown; "
            "set num_beams=1."
        )
