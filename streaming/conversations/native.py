"""Brook's own JSON, in which nothing is lost: what is exported and imported again is the same, byte for byte.

    {"format": "brook-conversations", "version": 1, "conversations": [CONVERSATION, …]}

CONVERSATION: `id`, `title`, `pinned`, `created_at`, `updated_at` (seconds since 1970), `leaf` (the id of the last
message that is shown, or null) and `messages`, in the order they were made, each after the one that it answers. A
message has the fields of `streaming.conversations.tree.Message`, which says what they mean. Every message stands in a
line of its own. A later version may add fields; a reader of this one refuses it, so that nothing is lost unseen.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, get_args

from streaming.conversations.json_items import Item
from streaming.conversations.tree import Conversation, Message, Reason, Role

FORMAT = "brook-conversations"
VERSION = 1
_MAX_TOKEN_ID = 2**32 - 1
_MAX_SEED = 2**63 - 1


def write_native(conversations: Iterable[Conversation]) -> str:
    """Write conversations as JSON. A reply that is being written is written as cut off here."""
    parts = []
    for conversation in conversations:
        head = {
            name: getattr(conversation, name) for name in ("id", "title", "pinned", "created_at", "updated_at", "leaf")
        }
        lines = ",\n".join(_dump(_fields(message)) for message in conversation.messages.values())
        parts.append(f'{_dump(head)[:-1]}, "messages": [\n{lines}\n]}}')
    listed = ",\n".join(parts)
    return f'{{"format": {_dump(FORMAT)}, "version": {VERSION}, "conversations": [\n{listed}\n]}}\n'


def read_native(document: Item, owner: str) -> list[Conversation]:
    """Read what `write_native` wrote, for `owner`.

    Raises:
        ImportRefused: something is not as it should be.
    """
    if document.get("version", int) != VERSION:
        raise document.refusal(f"This is version {document.value['version']} of the format; this Brook reads {VERSION}")
    return [_conversation(item, owner) for item in document.items("conversations")]


def _conversation(item: Item, owner: str) -> Conversation:
    messages: dict[str, Message] = {}
    for each in item.items("messages"):
        message = _message(each)
        if message.id in messages:
            raise each.refusal(f"There are two messages with the id {message.id!r}")
        if message.parent is not None and message.parent not in messages:
            raise each.refusal(f"This message answers {message.parent!r}, which does not come before it")
        messages[message.id] = message
    leaf = item.get("leaf", str, "") or None
    if leaf is not None and leaf not in messages:
        raise item.refusal(f"'leaf' is {leaf!r}, but there is no such message")
    return Conversation(
        owner=owner,
        id=item.get("id", str),
        title=item.get("title", str),
        messages=messages,
        leaf=leaf,
        pinned=item.get("pinned", bool),
        created_at=item.get("created_at", float),
        updated_at=item.get("updated_at", float),
    )


def _message(item: Item) -> Message:
    role, reason, rating = item.get("role", str), item.get("reason", str, "") or None, item.get("rating", int)
    token_ids = item.get("token_ids", list)
    if role not in get_args(Role):
        raise item.refusal(f"'role' must be user or assistant, not {role!r}")
    if reason is not None and reason not in get_args(Reason):
        raise item.refusal(f"'reason' must be null or one of {', '.join(get_args(Reason))}, not {reason!r}")
    if rating not in (-1, 0, 1):
        raise item.refusal(f"'rating' must be -1, 0 or 1, not {rating}")
    if not all(type(i) is int and 0 <= i <= _MAX_TOKEN_ID for i in token_ids):
        raise item.refusal("'token_ids' must be a list of token ids")
    seed = item.get("seed", int) if item.value.get("seed") is not None else None
    if seed is not None and not 0 <= seed <= _MAX_SEED:
        raise item.refusal(f"'seed' must be between 0 and {_MAX_SEED}, not {seed}")
    return Message(
        role=role,  # type: ignore[arg-type]
        content=item.get("content", str),
        parent=item.get("parent", str, "") or None,
        id=item.get("id", str),
        created_at=item.get("created_at", float),
        token_ids=tuple(token_ids),
        in_reasoning=item.get("in_reasoning", bool),
        reason=reason,  # type: ignore[arg-type]
        error=item.get("error", str) if item.value.get("error") is not None else None,
        model=item.get("model", str),
        seed=seed,
        settings=item.get("settings", dict),
        stats=item.get("stats", dict),
        rating=rating,
        note=item.get("note", str),
    )


def _fields(message: Message) -> dict[str, Any]:
    if message.role == "assistant" and message.reason is None:
        message = dataclasses.replace(message, reason="interrupted")
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(Message)}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=dict)
