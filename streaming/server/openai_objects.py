"""Generations → the objects that OpenAI's clients expect: a whole answer, or one chunk for each event."""

from collections.abc import Sequence
from typing import Any

from streaming.events import FinishEvent, TokenEvent
from streaming.server.streams import Answer


def whole(answer: Answer, hidden_ids: frozenset[int]) -> dict[str, Any]:
    """Give an answer whose choices have all ended; tokens of `hidden_ids` have no text and get no logprobs."""
    choices = []
    for index, run in enumerate(answer.runs):
        events = [event for event in run.log.snapshot() if isinstance(event, TokenEvent)]
        text = "".join(event.text for event in events)
        logprobs = _logprobs(answer, events, hidden_ids, n_chars=0)
        content = {"message": {"role": "assistant", "content": text}} if answer.asked.is_chat else {"text": text}
        finish_reason = None if run.finish is None else run.finish.reason
        choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason})
    return {**_head(answer, is_chunk=False), "choices": choices, "usage": usage(answer)}


def opening_chunk(answer: Answer, choice: int) -> dict[str, Any]:
    """Say whose text the choice's next chunks hold; only chats have it."""
    return _chunk(answer, choice, {"role": "assistant", "content": ""}, None, None)


def token_chunk(
    answer: Answer, choice: int, event: TokenEvent, hidden_ids: frozenset[int], n_chars: int
) -> dict[str, Any] | None:
    """Give a token that comes after `n_chars` characters; None when there is nothing to tell of it yet."""
    logprobs = _logprobs(answer, [event], hidden_ids, n_chars)
    if not event.text and not (logprobs and (logprobs.get("content") or logprobs.get("tokens"))):
        return None
    return _chunk(answer, choice, {"content": event.text}, logprobs, None)


def finish_chunk(answer: Answer, choice: int, finish: FinishEvent) -> dict[str, Any]:
    """Say why a choice ended."""
    return _chunk(answer, choice, {}, None, finish.reason)


def usage_chunk(answer: Answer) -> dict[str, Any]:
    """Give the counts, which come after every choice has ended."""
    return {**_head(answer, is_chunk=True), "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, Any]:
    """Count tokens; the choices of one prompt count it once."""
    finishes = [run.finish for run in answer.runs if run.finish is not None]
    n_prompt = sum(finish.n_prompt_tokens for finish in finishes[:: answer.asked.n])
    n_written = sum(finish.n_generated_tokens for finish in finishes)
    n_reused = sum(finish.n_reused_tokens for finish in finishes[:: answer.asked.n])
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_written,
        "total_tokens": n_prompt + n_written,
        "prompt_tokens_details": {"cached_tokens": n_reused},
    }


def failure(finish: FinishEvent) -> str | None:
    """Say what went wrong with a choice, if it failed or was cancelled."""
    if finish.reason == "error":
        return finish.error or "The model failed; try again."
    if finish.reason == "cancelled":
        return "The generation was cancelled on the server; try again."
    return None


def _head(answer: Answer, *, is_chunk: bool) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if answer.asked.is_chat else "text_completion"
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model_id}


def _chunk(
    answer: Answer, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    content = {"delta": delta} if answer.asked.is_chat else {"text": delta.get("content", "")}
    chunk = {
        **_head(answer, is_chunk=True),
        "choices": [{"index": choice, **content, "logprobs": logprobs, "finish_reason": reason}],
    }
    return chunk | {"usage": None} if answer.asked.has_usage else chunk


def _logprobs(
    answer: Answer, events: Sequence[TokenEvent], hidden_ids: frozenset[int], n_chars: int
) -> dict[str, Any] | None:
    """Tell the tokens' logprobs. Their texts joined are the answer's text, so a part of a character has none."""
    n_top = answer.asked.n_top
    if n_top is None:
        return None
    events = [event for event in events if event.text or event.id not in hidden_ids]
    tops = [[(top.text, top.logprob) for top in (event.top or ())[:n_top]] for event in events]
    if answer.asked.is_chat:
        return {
            "content": [
                {
                    **_token(event.text, event.logprob),
                    "top_logprobs": [_token(text, logprob) for text, logprob in top],
                }
                for event, top in zip(events, tops, strict=True)
            ],
            "refusal": None,
        }
    offsets = [n_chars]
    for event in events:
        offsets.append(offsets[-1] + len(event.text))
    return {
        "tokens": [event.text for event in events],
        "token_logprobs": [event.logprob for event in events],
        "top_logprobs": [dict(top) for top in tops] if n_top else None,
        "text_offset": offsets[:-1],
    }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logprob,
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }
