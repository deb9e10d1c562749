"""OpenAI's API from the asking side: requests → calls, chunks → events, errors → words."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from streaming.detokenizer import StopMatcher
from streaming.engine.base import LIMITS, GenerationRequest
from streaming.errors import BrookError, GenerationFailed, InvalidRequest, ModelUnavailable
from streaming.events import NO_ID, FinishEvent, FinishReason, Timings, TokenEvent, TopToken

# Reasoning comes in a field of its own (`reasoning_content`: DeepSeek, SGLang, llama.cpp; `reasoning`: vLLM, Ollama,
# OpenRouter). In the log it stands where such models write it, between tags.
REASONING_FIELDS = ("reasoning_content", "reasoning")
BEFORE_REASONING = "<think>\n"
AFTER_REASONING = "\n</think>\n\n"

MAX_SERVER_WORDS = 300

Token = tuple[str, float | None, Sequence[tuple[str, float]]]  # text, logprob, the likeliest texts and theirs


class ReplyCutOff(GenerationFailed):
    """A stream that ended without telling why."""


def to_call(request: GenerationRequest, model: str, seed: int) -> dict[str, Any]:
    """Give the arguments of the client's `create`; those of a chat have `messages`.

    Raises:
        InvalidRequest: the request continues token ids, which mean nothing to another machine's tokenizer.
    """
    if request.prefix_ids:
        raise InvalidRequest("A remote model continues text, not token ids; give prefix_text.", field="prefix_ids")
    call: dict[str, Any] = {
        "model": model,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "seed": seed,
        "stop": list(request.stop) or None,
        "max_tokens": request.max_new_tokens if request.max_new_tokens != LIMITS["max_new_tokens"][1] else None,
    }
    call = {name: value for name, value in call.items() if value is not None}
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    extra = {name: value for name in neutral if (value := getattr(request, name)) not in (None, neutral[name])}
    if request.messages is not None:
        call["messages"] = [{"role": m["role"], "content": m["content"]} for m in request.messages]
        if request.prefix_text:
            call["messages"].append({"role": "assistant", "content": request.prefix_text})
            # vLLM's and SGLang's names, and Brook's; llama.cpp continues a final assistant message without being asked.
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        if request.logprobs:
            call |= {"logprobs": True, "top_logprobs": request.logprobs}
    else:
        if request.prompt_ids is not None and request.prefix_text:
            raise InvalidRequest("prompt_ids are continued by ids alone; leave prefix_text out.", field="prefix_text")
        text = f"{request.prompt}{request.prefix_text}"
        call["prompt"] = text if request.prompt_ids is None else list(request.prompt_ids)
        if request.logprobs:
            call["logprobs"] = request.logprobs
    return call | {"stream": True, "stream_options": {"include_usage": True}, "extra_body": extra}


class ReplyReader:
    """Chunks of one reply → its events, up to the first stop string. `submitted_at` is a `time.perf_counter()`.

    Servers are told of the stop strings too, but some (`transformers serve` 5.23) let them be seen.
    """

    def __init__(self, submitted_at: float, stop: Sequence[str] = ()) -> None:
        self.n_tokens = 0
        self.has_begun = False  # whether anything of the reply came, which a stop string may hold back from the events
        self.finish_reason: str | None = None
        self._submitted_at = submitted_at
        self._queued_s = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0
        self._is_reasoning = False
        self._stop = StopMatcher(stop)
        self._usage: Any = None

    @property
    def has_met_stop(self) -> bool:
        """Whether the text has met a stop string: nothing more is wanted of the server."""
        return self._stop.matched is not None

    def leave_queue(self) -> None:
        """Take note that the request waits no longer."""
        self._queued_s = time.perf_counter() - self._submitted_at

    def read(self, chunk: Any) -> Iterator[TokenEvent]:
        """Give the events of a ChatCompletionChunk or a Completion."""
        self._usage = getattr(chunk, "usage", None) or self._usage
        for choice in (chunk.choices or ())[:1]:
            delta = getattr(choice, "delta", None)
            extra = getattr(delta, "model_extra", None) or {}
            reasoning = next((extra[name] for name in REASONING_FIELDS if isinstance(extra.get(name), str)), "")
            text = (getattr(choice, "text", None) if delta is None else delta.content) or ""
            if reasoning:
                opening = "" if self._is_reasoning else BEFORE_REASONING
                self._is_reasoning = True
                yield from self._events((opening + reasoning, None, ()))
            tokens = list(_tokens(choice.logprobs, text))
            if text and self._is_reasoning:
                self._is_reasoning = False
                tokens[0] = (AFTER_REASONING + tokens[0][0].lstrip("\n"), *tokens[0][1:])
            self.has_begun = self.has_begun or bool(reasoning or tokens or choice.finish_reason)
            for token in tokens:
                yield from self._events(token)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def finish(self, reason: FinishReason, error: str | None) -> FinishEvent:
        """Give the last event: the server's counts where it told them, else what was seen."""
        details = getattr(self._usage, "prompt_tokens_details", None)
        n_generated = getattr(self._usage, "completion_tokens", None) or self.n_tokens
        pace_s = 0.0 if self._first_s is None else self._last_s - self._first_s
        return FinishEvent(
            reason,
            error,
            n_prompt_tokens=getattr(self._usage, "prompt_tokens", None) or 0,
            n_reused_tokens=getattr(details, "cached_tokens", None) or 0,
            n_generated_tokens=n_generated,
            timings=Timings(
                queued_s=self._queued_s,
                ttft_s=self._first_s,
                tokens_per_s=(n_generated - 1) / pace_s if n_generated > 1 and pace_s > 0 else None,
            ),
        )

    def flush(self) -> Iterator[TokenEvent]:
        """Give the text that might have become a stop string, because no more comes."""
        if tail := self._stop.flush():
            yield self._event(tail, None, ())

    def _events(self, token: Token) -> Iterator[TokenEvent]:
        if self.has_met_stop:
            return
        text, logprob, top = token
        text = self._stop.feed(text)
        if text or logprob is not None:
            yield self._event(text, logprob, top)

    def _event(self, text: str, logprob: float | None, top: Sequence[tuple[str, float]]) -> TokenEvent:
        self._last_s = time.perf_counter() - self._submitted_at
        if self._first_s is None:
            self._first_s = self._last_s
        self.n_tokens += 1
        top_tokens = None if logprob is None else tuple(TopToken(NO_ID, *likely) for likely in top)
        return TokenEvent(self.n_tokens - 1, NO_ID, text, logprob, top_tokens, self._last_s)


def _tokens(logprobs: Any, text: str) -> list[Token]:
    """Give a chunk's tokens one by one where its logprobs tell them, else its text as one."""
    tokens: list[Token] = []
    if getattr(logprobs, "content", None):
        tokens = [
            (t.token, t.logprob, [(top.token, top.logprob) for top in t.top_logprobs or ()]) for t in logprobs.content
        ]
    elif getattr(logprobs, "tokens", None):
        tops = logprobs.top_logprobs or [{}] * len(logprobs.tokens)
        tokens = [
            (token, logprob, list((top or {}).items()))
            for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
        ]
    if "".join(token[0] for token in tokens) == text:
        return tokens
    # Servers that hold text back, for a stop string or half a character, tell of other tokens than they send.
    _, logprob, top = tokens[0] if len(tokens) == 1 else ("", None, ())
    return [(text, logprob, top)] if text else []


def is_worth_retrying(error: Exception) -> bool:
    """Whether the same request may fare better: nobody answered, or the server was busy or broken."""
    if isinstance(error, openai.APITimeoutError):
        return False  # it took the request and may still be at it
    worth = ReplyCutOff | openai.APIConnectionError | openai.RateLimitError | openai.InternalServerError
    return isinstance(error, worth)


def asked_pause_s(error: Exception) -> float:
    """Give how long the server wants to be left alone (Retry-After: seconds, or a date); 0 where it does not say."""
    if not isinstance(error, openai.APIStatusError):
        return 0.0
    asked = error.response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(asked))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    return 0.0


def as_unavailable(error: Exception, host: str, read_timeout_s: float) -> ModelUnavailable:
    """Give what went wrong while the server was asked for its models."""
    words = explain(error, host, read_timeout_s)
    if isinstance(error, openai.APIConnectionError):
        words = f"{words.removesuffix('; try again.')}; check --base-url."
    return ModelUnavailable(words)


def explain(error: BaseException, host: str, read_timeout_s: float) -> str:
    """Say in one sentence what went wrong and what to do."""
    server = f"The server at {host}"
    match error:
        case BrookError():
            return str(error)
        case openai.APITimeoutError():
            return f"{server} did not answer, or sent nothing for {read_timeout_s:g} s; try again."
        case openai.APIConnectionError():
            return f"{server} cannot be reached, or the connection broke ({_cause(error)}); try again."
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return f"{server} wants another API key; name the variable that holds it with --api-key-env."
        case openai.NotFoundError():
            return f"{server} does not have that ({_words(error)}); check --base-url and --model."
        case openai.RateLimitError():
            return f"{server} is busy ({_words(error)}); wait a moment and try again."
        case openai.InternalServerError():
            return f"{server} failed ({_words(error)}); try again."
        case openai.APIStatusError():
            return f"{server} refused the request: {_words(error)}"
        case openai.APIError():  # an error event in the stream
            return f"{server} stopped with an error ({_words(error)}); try again."
    return f"{server} sent something that cannot be read ({type(error).__name__}); try again."


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    return _one_line(str(cause)) or type(cause).__name__


def _words(error: openai.APIError) -> str:
    """Give the server's own words, wherever it put them; the advice to try again is the sentence's around them."""
    body = error.body
    words = body or error.message
    if isinstance(body, dict):
        words = body.get("message") or body.get("detail") or body.get("error") or body
        if isinstance(words, dict):
            words = words.get("message") or words
    return _one_line(str(words)).removesuffix("; try again.")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SERVER_WORDS else f"{line[:MAX_SERVER_WORDS]}…"
