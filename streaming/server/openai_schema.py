"""Bodies of requests as OpenAI defines them → GenerationRequests.

What would change the answer and cannot be done is refused by name, never passed over. What changes nothing
(`HARMLESS`), and a value that asks for what is done anyway (`NEUTRAL`), is accepted. A member that is null counts as
left out, as in OpenAI's API.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streaming.engine.base import LIMITS, GenerationRequest
from streaming.errors import InvalidRequest
from streaming.server.api_errors import ApiError, as_api_error

HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# What clients send back of a reply that they were given; none of it is text to read. A speaker's `name` would be, and
# templates have no place for it.
HARMLESS_IN_MESSAGES = frozenset({"annotations", "reasoning", "reasoning_content", "refusal"})

MAX_CHOICES = 16
MAX_COMPLETION_TOKENS = 16
"""What `/v1/completions` writes when it is not told how much, as at OpenAI."""
MAX_RESUME_S = 60.0

# Names here and in a GenerationRequest. The last two and top_k are not OpenAI's, but vLLM, SGLang and others have them.
_NUMBERS = (
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "min_p",
    "repetition_penalty",
)

N_SEEDS = 2**63
"""OpenAI's seeds are integers of 64 bits with a sign; those below 0 count from the end of these."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for: a request for each choice, and how to tell what comes of them.

    `n` choices belong to each prompt. `n_top` is how many likeliest tokens each token comes with, None without
    logprobs. A stream goes on for `resume_s` seconds without its client.
    """

    requests: tuple[GenerationRequest, ...]
    is_chat: bool
    model: str | None
    n: int = 1
    is_stream: bool = False
    has_usage: bool = False
    n_top: int | None = None
    resume_s: float = 0.0


def parse_chat(body: Any, owner: str) -> Asked:
    """Read the body of `/v1/chat/completions`.

    Raises:
        ApiError: it asks for something that cannot be done.
    """
    members = _Members(body)
    messages = _messages(members.take("messages"))
    length = members.length("max_completion_tokens", "max_tokens", default=int(LIMITS["max_new_tokens"][1]))
    n_top = members.integer("top_logprobs", 0, int(LIMITS["logprobs"][1]))
    if not members.flag("logprobs"):
        if n_top:
            raise _invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
        n_top = None
    else:
        n_top = n_top or 0
    prefix: dict[str, Any] = {}
    if members.flag("continue_final_message"):
        if members.flag("add_generation_prompt"):
            raise _invalid("A message that is continued gets no generation prompt.", "add_generation_prompt")
        if messages[-1]["role"] != "assistant":
            raise _invalid("Only an assistant's message can be continued.", "continue_final_message")
        prefix = {"prefix_text": messages.pop()["content"]}
    return members.asked([{"messages": messages, **prefix}], length, n_top, owner, is_chat=True)


def parse_completion(body: Any, owner: str) -> Asked:
    """Read the body of `/v1/completions`.

    Raises:
        ApiError: it asks for something that cannot be done.
    """
    members = _Members(body)
    prompts = _prompts(members.take("prompt"))
    length = members.length("max_tokens", default=MAX_COMPLETION_TOKENS)
    n_top = members.integer("logprobs", 0, int(LIMITS["logprobs"][1]))
    return members.asked(prompts, length, n_top, owner, is_chat=False)


class _Members:
    """A body's members, taken one by one; what is left at the end is judged by `asked`."""

    def __init__(self, body: Any, where: str = "") -> None:
        if not isinstance(body, dict):
            raise _invalid(f"{where or 'The body'} must be a JSON object.", where or None)
        self._left = {name: value for name, value in body.items() if value is not None}
        self._renamed: dict[str, str] = {"logprobs": "top_logprobs"}

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise _invalid(f"{name} must be true or false.", name)
        return bool(value)

    def number(self, name: str) -> float | None:
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _invalid(f"{name} must be a number.", name)
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.number(name)
        if value is None:
            return None
        if not isinstance(value, int):
            raise _invalid(f"{name} must be a whole number.", name)
        if low is not None and high is not None and not low <= value <= high:
            raise _invalid(f"{name} must be between {low} and {high}, not {reprlib.repr(value)}.", name)
        return value

    def length(self, *names: str, default: int) -> int:
        """Take how many tokens to write at most, which has one or more names."""
        given = {name: value for name in names if (value := self.integer(name)) is not None}
        if len(given) > 1:
            raise _invalid(f"Give {' or '.join(names)}, not both.", names[-1])
        for name, value in given.items():
            self._renamed["max_new_tokens"] = name
            return value
        return default

    def asked(
        self, sources: Sequence[dict[str, Any]], length: int, n_top: int | None, owner: str, *, is_chat: bool
    ) -> Asked:
        """Take what both routes share, refuse what is left, and make a request for each choice."""
        model = self.take("model")
        if model is not None and not isinstance(model, str):
            raise _invalid("model must be a string.", "model")
        is_stream = self.flag("stream")
        has_usage, resume_s = self._stream_options(is_stream)
        n = self.integer("n", 1, MAX_CHOICES) or 1
        if n * len(sources) > MAX_CHOICES:
            raise _invalid(f"A request can have {MAX_CHOICES} choices at most, not {n * len(sources)}.", "n")
        settings: dict[str, Any] = {name: self.number(name) for name in _NUMBERS}
        top_k, seed = self.integer("top_k"), self.integer("seed", -N_SEEDS, N_SEEDS - 1)
        settings["top_k"] = 0 if top_k == -1 else top_k  # as vLLM says that it is off
        settings |= {"stop": self._stop(), "max_new_tokens": length, "owner": owner}
        settings["logprobs"] = 0 if n_top is None else max(1, n_top)
        self._refuse_rest()
        try:
            requests = tuple(
                GenerationRequest(**source, **settings, seed=None if seed is None else (seed + k) % N_SEEDS)
                for source in sources
                for k in range(n)
            )
        except InvalidRequest as error:
            name = self._renamed.get(error.field, error.field)
            raise as_api_error(InvalidRequest(str(error).replace(error.field, name), name)) from error
        return Asked(requests, is_chat, model, n, is_stream, has_usage, n_top, resume_s)

    def _stream_options(self, is_stream: bool) -> tuple[bool, float]:
        options = self.take("stream_options")
        if options is None:
            return False, 0.0
        if not is_stream:
            raise _invalid("stream_options needs stream to be true.", "stream_options")
        members = _Members(options, "stream_options")
        has_usage, resume_s = members.flag("include_usage"), members.number("resume_s") or 0.0
        members.flag("include_obfuscation")  # padding against eavesdroppers, which a client is free not to get
        members._refuse_rest("stream_options.")
        if not 0 <= resume_s <= MAX_RESUME_S:
            raise _invalid(f"resume_s must be between 0 and {MAX_RESUME_S:g}.", "stream_options.resume_s")
        return has_usage, resume_s

    def _stop(self) -> list[str]:
        value = self.take("stop")
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _invalid("stop must be a string or a list of strings.", "stop")
        return [_text(text, "stop") for text in texts]

    def _refuse_rest(self, where: str = "") -> None:
        for name, value in self._left.items():
            if name not in HARMLESS and not any(value == neutral for neutral in NEUTRAL.get(name, ())):
                raise ApiError(
                    400,
                    f"Brook does not support {where}{name} as it was given; leave it out.",
                    param=f"{where}{name}",
                    code="unsupported_parameter",
                )


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _invalid("messages must be a list of at least one message.", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _invalid(f"{where} must be an object with role and content.", where)
    role = "system" if value.get("role") == "developer" else value.get("role")
    if role not in ("system", "user", "assistant"):
        raise _invalid(
            f"{where}.role must be system, developer, user or assistant, not {value.get('role')!r}.", f"{where}.role"
        )
    for name, member in value.items():
        if name not in ("role", "content") and name not in HARMLESS_IN_MESSAGES and member:
            raise ApiError(
                400,
                f"Brook does not support {where}.{name}; leave it out.",
                param=f"{where}.{name}",
                code="unsupported_parameter",
            )
    return {"role": role, "content": _content(value.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _text(value, where)
    if not isinstance(value, list):
        raise _invalid(f"{where} must be a string or a list of text parts.", where)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _invalid(f"{where}[{i}] is not a text part, and text is all that the model reads.", f"{where}[{i}]")
        texts.append(_text(part["text"], f"{where}[{i}].text"))
    return "".join(texts)


def _prompts(value: Any) -> list[dict[str, Any]]:
    """Give what each prompt is: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [{"prompt": _text(value, "prompt")}]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [{"prompt_ids": value}]
        if all(isinstance(item, str) for item in value):
            return [{"prompt": _text(item, "prompt")} for item in value]
        if all(isinstance(item, list) and item and all(type(i) is int for i in item) for item in value):
            return [{"prompt_ids": item} for item in value]
    raise _invalid("prompt must be a string, a list of token ids, or a list of either.", "prompt")


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise _invalid(f"{where} holds half of a character, which is no text.", where) from None
    return value


def _invalid(message: str, param: str | None) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
