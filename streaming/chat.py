"""Messages → token ids: the model's template, text from people kept text, turns kept token-exact, old turns left out.

Source: transformers 5.23, `apply_chat_template(sanitize_control_tokens=True)`: control tokens inside messages are
encoded as ordinary text, each on its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from streaming.errors import InvalidRequest, PromptTooLong

Message = Mapping[str, Any]  # {"role", "content"} and, for replies, "token_ids": what the model wrote

ROLES = ("system", "user", "assistant")

# For models that ship no template: plain turns that a base model can follow.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% else %}{{ message.role.capitalize() + ': ' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """What the model is given for a conversation, and how many of the oldest messages were left out to fit."""

    ids: tuple[int, ...]
    n_dropped_messages: int = 0


def encode_chat(tokenizer: Any, messages: Sequence[Message], max_prompt_tokens: int) -> EncodedChat:
    """Encode a conversation, ready for the model to write the next reply.

    When it is longer than `max_prompt_tokens`, the oldest turns are left out, whole exchanges at a time; the system
    prompt and the last message always stay.

    Raises:
        InvalidRequest: no messages, or one with an unknown role or without text.
        PromptTooLong: the last message alone does not fit.
    """
    _check(messages)
    try:
        return _fit(tokenizer, messages, max_prompt_tokens)
    except TemplateError as error:
        if messages[0]["role"] == "system" and len(messages) > 1:
            # Some models know no system role; what it says still has to reach them.
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return encode_chat(tokenizer, [first, *messages[2:]], max_prompt_tokens)
        raise InvalidRequest(
            f"The model's chat template refuses this conversation ({error}); start a new chat.", field="messages"
        ) from error


def _fit(tokenizer: Any, messages: Sequence[Message], max_prompt_tokens: int) -> EncodedChat:
    n_system = 1 if messages[0]["role"] == "system" else 0
    head, turns = messages[:n_system], messages[n_system:]
    # A conversation goes on from a person's message: templates may insist on it.
    starts = [0, *(i for i, m in enumerate(turns) if i > 0 and m["role"] == "user")]
    if starts == [0] and len(turns) > 1:
        starts.append(len(turns) - 1)
    # Encoding takes seconds for a million characters: what has too many of them is not tried.
    n_chars, low, high = _n_chars(messages), 0, len(starts) - 1
    while low < high and _least_tokens(tokenizer, n_chars) > max_prompt_tokens:
        n_chars -= _n_chars(turns[starts[low] : starts[low + 1]])
        low += 1
    _require_fit(tokenizer, n_chars, max_prompt_tokens)
    ids, start = _encode(tokenizer, [*head, *turns[starts[low] :]]), starts[low]
    if len(ids) > max_prompt_tokens and low < high:
        low += 1
        while low < high:  # the fewest turns left out that fit; each encoding is O(length)
            middle = (low + high) // 2
            if len(_encode(tokenizer, [*head, *turns[starts[middle] :]])) <= max_prompt_tokens:
                high = middle
            else:
                low = middle + 1
        ids, start = _encode(tokenizer, [*head, *turns[starts[low] :]]), starts[low]
    if len(ids) > max_prompt_tokens:
        raise PromptTooLong(len(ids), max_prompt_tokens)
    return EncodedChat(tuple(ids), n_dropped_messages=start)


def _n_chars(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


_longest_tokens: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""The characters of each tokenizer's longest token."""


def _least_tokens(tokenizer: Any, n_chars: int) -> int:
    """Return how many tokens `n_chars` characters are at least: as if all were the vocabulary's longest."""
    if tokenizer not in _longest_tokens:
        _longest_tokens[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return n_chars // _longest_tokens[tokenizer]


def _require_fit(tokenizer: Any, n_chars: int, max_prompt_tokens: int) -> None:
    n_least = _least_tokens(tokenizer, n_chars)
    if n_least > max_prompt_tokens:
        raise PromptTooLong(n_least, max_prompt_tokens, at_least=True)


def encode_opening(tokenizer: Any, messages: Sequence[Message], max_prompt_tokens: int) -> tuple[int, ...]:
    """Return the ids that every chat begins with which goes on from `messages` with words of a person.

    Without messages these are the template's own, where a chat has no system prompt.
    """
    chats = [
        encode_chat(tokenizer, [*messages, {"role": "user", "content": text}], max_prompt_tokens).ids for text in "ab"
    ]
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*chats, strict=False)))


def encode_text(tokenizer: Any, text: str, max_prompt_tokens: int) -> tuple[int, ...]:
    """Encode a plain prompt, as `tokenizer(text)` does but with control tokens in it kept text.

    Raises:
        PromptTooLong: it does not fit; a plain prompt has no turns to leave out.
    """
    _require_fit(tokenizer, len(text), max_prompt_tokens)
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    if not ids:
        # Models need one token to start from; the empty prompt is the beginning of a text.
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = [] if start is None else [start]
    if len(ids) > max_prompt_tokens:
        raise PromptTooLong(len(ids), max_prompt_tokens)
    return tuple(ids)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("A chat needs at least one message.", field="messages")
    for message in messages:
        if message.get("role") not in ROLES:
            raise InvalidRequest(
                f"A message has the role {message.get('role')!r}; it must be one of {', '.join(ROLES)}.",
                field="messages",
            )
        if not isinstance(message.get("content"), str):
            raise InvalidRequest("A message's content must be text.", field="messages")


def _encode(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Encode messages with replies spliced in as the ids that were generated, where the template allows it.

    In their place the template gets a marker: so many control tokens in a row as the chat has nowhere. Sanitizing
    encodes each of them as text, on its own, so that the marker can be found again among the ids, and nothing that a
    person writes can be mistaken for it.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    replies = {i: list(m["token_ids"]) for i, m in enumerate(messages) if m.get("token_ids")}
    token = tokenizer.eos_token
    if replies and token:
        rendered = _render(tokenizer, plain)
        n = 2
        while token * n in rendered:
            n += 1
        marked = [{**m, "content": token * n} if i in replies else m for i, m in enumerate(plain)]
        texts = _render(tokenizer, marked).split(token * n)
        marker_ids = tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True) * n
        pieces = _split(_apply_template(tokenizer, marked), marker_ids)
        # Some templates strip replies or leave earlier reasoning out: what they make of the text then counts.
        if len(texts) == len(pieces) == len(replies) + 1 and rendered == _join(
            texts, [plain[i]["content"] for i in replies]
        ):
            ids = pieces[0]
            for reply_ids, piece in zip(replies.values(), pieces[1:], strict=True):
                ids += reply_ids + piece
            return ids
    return _apply_template(tokenizer, plain)


def _apply_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages,
        chat_template=_template(tokenizer),
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return ids


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=_template(tokenizer), add_generation_prompt=True, tokenize=False
    )
    return text


def _template(tokenizer: Any) -> str | None:
    return None if tokenizer.chat_template else PLAIN_TEMPLATE


def _join(pieces: list[str], between: list[str]) -> str:
    return pieces[0] + "".join(text + piece for text, piece in zip(between, pieces[1:], strict=True))


def _split(ids: list[int], separator: list[int]) -> list[list[int]]:
    pieces, start, at, n = [], 0, 0, len(separator)
    while at <= len(ids) - n:
        if ids[at : at + n] == separator:
            pieces.append(ids[start:at])
            at = start = at + n
        else:
            at += 1
    return [*pieces, ids[start:]]
