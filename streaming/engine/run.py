"""One request on its way through the worker: encoded, then streamed into its log."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from streaming.chat import encode_chat, encode_text
from streaming.detokenizer import Detokenizer
from streaming.engine.base import Generation, GenerationRequest, Progress, SamplingDefaults
from streaming.engine.sampling import LogprobRecorder, build_processors
from streaming.errors import GenerationCancelled, InvalidRequest, PromptTooLong
from streaming.events import FinishReason
from streaming.log import EventLog
from streaming.models.loading import LoadedModel
from streaming.streamers import RowStream


class StopStringMet(Exception):
    """Raised inside `generate()` where the text has met a stop string."""


class GiveWay(Exception):
    """Raised inside `generate()` where others wait and the run can go on beside them."""


class Run(BaseStreamer):
    """The streamer that `generate()` writes to for one request, and its Generation.

    The worker writes the end of the log itself, once `generate()` has let go of the model, however it did. `cache`
    is what the model has read for the run, which the worker sets; `processors` draw its tokens.
    """

    generation: Generation
    processors: LogitsProcessorList

    def __init__(
        self,
        request: GenerationRequest,
        sampling: SamplingDefaults,
        tokenizer: Any,
        detokenizer: Detokenizer,
    ) -> None:
        self.log = EventLog()
        self.cancelled = False
        self.must_give_way = False
        self.cache: Cache | None = None
        self._has_prompt = False
        self.sampling = sampling
        self.recorder = LogprobRecorder(tokenizer, request.logprobs) if request.logprobs else None
        self.submitted_at = time.perf_counter()
        self.queued_s = 0.0
        self.token_ids: list[int] = []
        self.n_reused_tokens = 0
        self._n_seen_tokens = 0
        self.row = RowStream(
            detokenizer,
            self.log.append,
            stop=request.stop,
            logprobs=None if self.recorder is None else self.recorder.of,
            started_at=self.submitted_at,
        )

    def cancel(self) -> None:
        """Make generation stop within one token, or before the next chunk of the prompt."""
        self.cancelled = True

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.add(value.flatten().tolist())  # (1,), or (1, n) of assisted decoding
        self._has_prompt = True
        if self.must_give_way:
            raise GiveWay

    def add(self, token_ids: Sequence[int]) -> None:
        """Write tokens into the log.

        Raises:
            GenerationCancelled, StopStringMet: generation ends here.
        """
        if self.cancelled:
            raise GenerationCancelled("The generation was cancelled.")
        if self.row.n_tokens == 0:
            self.generation.progress = dataclasses.replace(
                self.generation.progress, state="writing", n_read=len(self.generation.prompt_ids)
            )
        for token_id in token_ids:
            self.row.put(token_id)
            self.token_ids.append(token_id)
        if self.row.stop_string is not None:
            raise StopStringMet

    def end(self) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """Tell the readers where the run is."""
        self.generation.progress = progress
        self.log.touch()

    def before_forward(self, n_tokens: int) -> None:
        """Take note that the model is about to read `n_tokens` more; called by the model itself."""
        if self.cancelled:
            raise GenerationCancelled
        if self.row.n_tokens == 0:
            n_to_read = len(self.generation.prompt_ids)
            self.show(Progress("reading", min(self.n_reused_tokens + self._n_seen_tokens, n_to_read), n_to_read))
            self._n_seen_tokens += n_tokens
        if self.must_give_way:
            raise GiveWay

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the log."""
        last = self.row.finish(
            reason,
            error,
            n_prompt_tokens=len(self.generation.prompt_ids),
            n_reused_tokens=self.n_reused_tokens,
            queued_s=self.queued_s,
        )
        self.generation.progress = dataclasses.replace(self.generation.progress, state="done", n_ahead=0)
        self.log.append(last)


def build_run(
    request: GenerationRequest,
    defaults: SamplingDefaults,
    loaded: LoadedModel,
    cancel: Callable[[Generation], None],
) -> Run:
    """Encode a request and fit it into the model's context."""
    tokenizer = loaded.tokenizer
    if request.prefix_text:
        ids = tokenizer.encode(request.prefix_text, add_special_tokens=False, split_special_tokens=True)
        request = dataclasses.replace(request, prefix_ids=ids, prefix_text="")
    sampling = _resolve(request, defaults)
    n_reserved = min(sampling.max_new_tokens, max(1, loaded.n_context // 4))
    n_room = loaded.n_context - n_reserved - len(request.prefix_ids)
    n_dropped = 0
    context_ids: Sequence[int] = ()
    if request.messages is not None:
        chat = encode_chat(tokenizer, _with_known_ids(request.messages, loaded), n_room)
        ids, n_dropped = chat.ids, chat.n_dropped_messages
        _check_ids(ids, loaded, "messages")
    else:
        if request.prompt is not None:
            ids = encode_text(tokenizer, request.prompt, n_room)
        else:
            ids = tuple(request.prompt_ids or ())
            _check_ids(ids, loaded, "prompt_ids")
            if not ids:
                raise InvalidRequest("prompt_ids must hold at least one token id.", field="prompt_ids")
            if len(ids) > n_room:
                raise PromptTooLong(len(ids), n_room)
        context_ids = ids
    _check_ids(request.prefix_ids, loaded, "prefix_ids")
    detokenizer = Detokenizer(tokenizer, context_ids, skip_special_tokens=True)
    prefix_text = "".join(detokenizer.feed(token_id) for token_id in request.prefix_ids)
    run = Run(request, sampling, tokenizer, detokenizer)
    run.generation = Generation(
        request,
        (*ids, *request.prefix_ids),
        log=run.log,
        seed=secrets.randbelow(2**31 - 1) + 1 if request.seed is None else request.seed,
        cancel=cancel,
        prefix_text=prefix_text,
        n_dropped_messages=n_dropped,
    )
    run.processors = build_processors(
        sampling, run.generation.seed, loaded.model.device, run.recorder, n_prompt=len(ids)
    )
    return run


def _with_known_ids(messages: Sequence[Mapping[str, Any]], loaded: LoadedModel) -> list[Mapping[str, Any]]:
    """Leave out the ids of replies that are not all the model's, as an imported file may say: their text counts."""
    known = range(_n_vocab(loaded))
    return [
        message if all(i in known for i in message.get("token_ids") or ()) else {**message, "token_ids": ()}
        for message in messages
    ]


def _n_vocab(loaded: LoadedModel) -> int:
    model: Any = loaded.model
    n_vocab: int = model.get_input_embeddings().num_embeddings
    return n_vocab


def _check_ids(ids: Sequence[int], loaded: LoadedModel, field: str) -> None:
    n_vocab = _n_vocab(loaded)
    wrong = next((i for i in ids if not 0 <= i < n_vocab), None)
    if wrong is not None:
        raise InvalidRequest(f"{field} holds {wrong}, but the model's token ids go from 0 to {n_vocab - 1}.", field)


def _resolve(request: GenerationRequest, defaults: SamplingDefaults) -> SamplingDefaults:
    """Fill what a request leaves open from the model's defaults."""
    return SamplingDefaults(
        **{
            field.name: getattr(request if getattr(request, field.name) is not None else defaults, field.name)
            for field in dataclasses.fields(SamplingDefaults)
        }
    )
