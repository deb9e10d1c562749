"""Conversations out to files and back in: which formats there are, and which one a file is in."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streaming.conversations.foreign import read_chatgpt, read_open_webui
from streaming.conversations.json_items import Item, read_json
from streaming.conversations.native import FORMAT, read_native, write_native
from streaming.conversations.plain import (
    BEGIN,
    read_markdown,
    read_messages,
    write_markdown,
    write_openai,
    write_sharegpt,
)
from streaming.conversations.tree import Conversation
from streaming.errors import ImportRefused


@dataclass(frozen=True, slots=True)
class Format:
    """A format that conversations can be written in: how, what files of it are called, and of which kind they are."""

    write: Callable[[Iterable[Conversation]], str]
    suffix: str
    media_type: str


FORMATS: Mapping[str, Format] = {
    "json": Format(write_native, ".json", "application/json"),
    "markdown": Format(write_markdown, ".md", "text/markdown"),
    "openai": Format(write_openai, ".jsonl", "application/jsonl"),
    "sharegpt": Format(write_sharegpt, ".sharegpt.jsonl", "application/jsonl"),
}


def read_conversations(text: str, owner: str) -> list[Conversation]:
    """Read a file in any of FORMATS, or an export of ChatGPT or Open WebUI, as conversations of `owner`.

    Raises:
        ImportRefused: something is not as it should be; the message names the line.
    """
    text = text.removeprefix("\ufeff")
    if text.lstrip().startswith(BEGIN):
        return read_markdown(text.lstrip("\r\n"), owner)
    lines = text.split("\n")
    number, first = next(((i, line) for i, line in enumerate(lines, 1) if line.strip()), (1, ""))
    if not first.strip().startswith(("{", "[")):
        raise ImportRefused("This is none of the files that can be read here", number)
    if _is_json(first) and any(line.strip() for line in lines[number:]):
        return [
            _read_one(Item(read_json(line, i), line, (), i), owner) for i, line in enumerate(lines, 1) if line.strip()
        ]
    document = read_json(text)
    if isinstance(document, dict):
        item = Item(document, text)
        return read_native(item, owner) if document.get("format") == FORMAT else [_read_one(item, owner)]
    return [_read_one(Item(value, text, (i,)), owner) for i, value in enumerate(document)]


def write_feedback(conversations: Iterable[Conversation]) -> str:
    """Write every reply that has a rating or a note as a line of JSON, with what it answered."""
    lines = []
    for conversation in conversations:
        for reply in conversation.messages.values():
            if not reply.rating and not reply.note:
                continue
            asked = [{"role": m.role, "content": m.content} for m in conversation.path(reply.id)[:-1]]
            line: dict[str, Any] = {
                "rating": reply.rating,
                "note": reply.note,
                "messages": asked,
                "reply": reply.content,
                "model": reply.model,
                "seed": reply.seed,
                "settings": dict(reply.settings),
                "conversation": conversation.id,
                "message": reply.id,
                "created_at": reply.created_at,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _read_one(item: Item, owner: str) -> Conversation:
    if "mapping" in item.value:
        return read_chatgpt(item, owner)
    if "chat" in item.value or "history" in item.value:
        return read_open_webui(item, owner)
    if "messages" in item.value or "conversations" in item.value:
        return read_messages(item, owner)
    raise item.refusal("This is no conversation: it has neither 'messages' nor 'conversations', 'mapping' or 'chat'")


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
