"""What a stream is made of: TokenEvents, then exactly one FinishEvent. Frozen values, no behaviour."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

NO_ID = -1
"""The id of a token from a server that gives text alone."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the likeliest tokens at a position, with its natural-log probability."""

    id: int
    text: str
    logprob: float


class TokenEvent(NamedTuple):
    """One generated token. (A tuple, because one is made for every token, and a frozen dataclass takes 2 µs to make.)

    `id` is NO_ID where a remote server made the token; such a server may also send several tokens as one event.
    `text` is what the token adds to the text. It is empty while the bytes of a character are incomplete or
    while the text may be the beginning of a stop string; the texts of all events joined equal the full decode.
    `logprob` and `top` are natural logarithms under the model's own distribution, before sampling settings.
    `t_s` counts seconds from submission.
    """

    index: int  # type: ignore[assignment]  # it hides tuple.index
    id: int
    text: str
    logprob: float | None = None
    top: tuple[TopToken, ...] | None = None
    t_s: float = 0.0

    @property
    def type(self) -> Literal["token"]:
        """The kind of event."""
        return "token"

    def to_dict(self) -> dict[str, Any]:
        """Give the event as `--json` prints it."""
        return {
            "type": self.type,
            "index": self.index,
            "id": self.id,
            "text": self.text,
            "logprob": self.logprob,
            "top": None if self.top is None else [[t.id, t.text, t.logprob] for t in self.top],
            "t_s": round(self.t_s, 6),
        }


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the parts of a generation took.

    `queued_s` and `ttft_s` (time to first token) count seconds from submission; `tokens_per_s` is the pace after
    the first token. None where too few tokens were made to tell.
    """

    queued_s: float = 0.0
    ttft_s: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The last event of every stream: why it ended, what went wrong, how much it did and how fast.

    `n_reused_tokens` of the prompt were not read for this request: its owner's earlier ones had them, or every chat.
    """

    reason: FinishReason
    error: str | None = None
    n_prompt_tokens: int = 0
    n_reused_tokens: int = 0
    n_generated_tokens: int = 0
    timings: Timings = Timings()
    type: Literal["finish"] = field(default="finish", init=False)

    def to_dict(self) -> dict[str, Any]:
        """Give the event as `--json` prints it."""
        return {
            "type": self.type,
            "reason": self.reason,
            "error": self.error,
            "n_prompt_tokens": self.n_prompt_tokens,
            "n_reused_tokens": self.n_reused_tokens,
            "n_generated_tokens": self.n_generated_tokens,
            "queued_s": self.timings.queued_s,
            "ttft_s": self.timings.ttft_s,
            "tokens_per_s": self.timings.tokens_per_s,
        }


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The text of the prompt, for sinks that show it before the first token. It is no part of a log."""

    text: str
    type: Literal["prompt"] = field(default="prompt", init=False)

    def to_dict(self) -> dict[str, Any]:
        """Give the event as sinks write it."""
        return {"type": self.type, "text": self.text}


Event = TokenEvent | FinishEvent
