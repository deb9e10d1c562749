"""Conversations as others write them, as they are shown: Markdown, OpenAI's messages, ShareGPT."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from streaming.conversations.json_items import Item
from streaming.conversations.tree import Conversation, Message, Role
from streaming.errors import ImportRefused

BEGIN = "<!-- Brook: a conversation -->"
_HEADINGS: dict[str, Role] = {"## You": "user", "## Assistant": "assistant"}
_MARKS = (BEGIN, *_HEADINGS)
_ESCAPED = re.compile(rf"\\+(?:{'|'.join(re.escape(mark) for mark in _MARKS)})")

_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant",
                           "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}  # fmt: skip
_SYSTEM = ("system", "developer")
_UNSHOWN = ("tool", "function", "observation", "function_call")


def write_markdown(conversations: Iterable[Conversation]) -> str:
    """Write what each conversation shows. A line of a message that reads as a mark of ours gets a backslash."""
    headings = {role: heading for heading, role in _HEADINGS.items()}
    parts = []
    for conversation in conversations:
        parts.append(f"{BEGIN}\n# {' '.join(conversation.title.split())}\n\n")
        for message in conversation.path():
            lines = (_escape(line) for line in message.content.split("\n"))
            parts.append("\n".join((headings[message.role], "", *lines, "", "")))
    return "".join(parts)


def read_markdown(text: str, owner: str) -> list[Conversation]:
    """Read what `write_markdown` wrote.

    Raises:
        ImportRefused: something is not as it should be.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    marks = [i for i, line in enumerate(lines) if line in _MARKS]
    if marks[:1] != [0]:
        raise ImportRefused(f"Here must be {BEGIN!r} and nothing else", 1)
    conversations: list[Conversation] = []
    turns: list[tuple[Role, str]] = []
    title = ""
    for i, end in zip(marks, [*marks[1:], len(lines)], strict=True):
        if lines[i] != BEGIN:
            body = lines[i + 1 : end]
            body = body[1:] if body and body[0] == "" else body
            body = body[:-1] if body and body[-1] == "" else body
            turns.append((_HEADINGS[lines[i]], "\n".join(_unescape(line) for line in body)))
            continue
        if i:
            conversations.append(_chain(turns, owner, title))
        if not lines[i + 1 : i + 2] or not lines[i + 1].startswith("# "):
            raise ImportRefused("Here must be a title, after '# '", i + 2)
        title, turns = lines[i + 1].removeprefix("# "), []
    return [*conversations, _chain(turns, owner, title)]


def write_openai(conversations: Iterable[Conversation]) -> str:
    """Write what each conversation shows as a line of JSON, as OpenAI's fine-tuning takes it."""
    return "".join(_line({"messages": _messages(conversation, "role", "content")}) for conversation in conversations)


def write_sharegpt(conversations: Iterable[Conversation]) -> str:
    """Write what each conversation shows as a line of JSON, in ShareGPT's words."""
    words = {"user": "human", "assistant": "gpt", "system": "system"}
    return "".join(
        _line({"id": c.id, "conversations": [
            {**message, "from": words[message["from"]]} for message in _messages(c, "from", "value")
        ]})
        for c in conversations
    )  # fmt: skip


def read_messages(item: Item, owner: str) -> Conversation:
    """Read one conversation of OpenAI's messages or of ShareGPT's.

    Raises:
        ImportRefused: something is not as it should be.
    """
    of_openai = "messages" in item.value
    role_key, text_key = ("role", "content") if of_openai else ("from", "value")
    turns: list[tuple[Role, str]] = []
    system: list[str] = []
    for message in item.items("messages" if of_openai else "conversations"):
        role = message.get(role_key, str)
        if role in _UNSHOWN:
            continue
        if role not in _ROLES and role not in _SYSTEM:
            raise message.refusal(f"{role_key!r} must be one of {', '.join((*_ROLES, *_SYSTEM))}, not {role!r}")
        text = _text(message, text_key)
        if role in _SYSTEM:
            system.append(text)
        else:
            turns.append((_ROLES[role], text))
    return _chain(turns, owner, item.get("title", str, ""), "\n\n".join(system))


def _text(message: Item, key: str) -> str:
    """Give a message's text, which may come in parts."""
    if not isinstance(message.value.get(key), list):
        return message.get(key, str, "")
    return "".join(part.get("text", str, "") for part in message.items(key))


def _chain(turns: Sequence[tuple[Role, str]], owner: str, title: str, system: str = "") -> Conversation:
    conversation = Conversation(owner=owner)
    settings = {"system_prompt": system} if system else {}
    for role, text in turns:
        reply: dict[str, Any] = {"reason": "stop", "settings": settings} if role == "assistant" else {}
        conversation = conversation.add(Message(role=role, content=text, parent=conversation.leaf, **reply))
    return dataclasses.replace(conversation, title=title) if title else conversation


def _messages(conversation: Conversation, role_key: str, text_key: str) -> list[dict[str, str]]:
    path = conversation.path()
    system = next((str(m.settings.get("system_prompt") or "") for m in reversed(path) if m.role == "assistant"), "")
    messages = [{role_key: "system", text_key: system}] if system.strip() else []
    return messages + [{role_key: message.role, text_key: message.content} for message in path]


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _escape(line: str) -> str:
    return "\\" + line if line in _MARKS or _ESCAPED.fullmatch(line) else line


def _unescape(line: str) -> str:
    return line[1:] if _ESCAPED.fullmatch(line) else line
