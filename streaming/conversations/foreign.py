"""Exports of other chats, which are trees as well: ChatGPT's `conversations.json` and Open WebUI's "Export Chats".

Only what was said is taken. Messages of tools, hidden ones and pictures are left out; what answered them answers what
came before. Open WebUI says what its files look like (docs.openwebui.com, "Import & Export"); ChatGPT's are described
by those who wrote readers of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streaming.conversations.json_items import Item
from streaming.conversations.tree import Conversation, Message, Role, title_of

_MILLISECONDS = 10**11
"""A time above this counts milliseconds: in seconds it would be in the year 5138."""


@dataclass(frozen=True, slots=True)
class _Node:
    parent: str | None
    role: Role | None
    text: str = ""
    at: float | None = None
    model: str = ""


def read_chatgpt(item: Item, owner: str) -> Conversation:
    """Read one conversation of ChatGPT's.

    Raises:
        ImportRefused: something is not as it should be.
    """
    nodes = {name: _chatgpt_node(node) for name, node in item.members("mapping")}
    return _grow(nodes, item.get("current_node", str, ""), owner, item, "create_time", "update_time")


def read_open_webui(item: Item, owner: str) -> Conversation:
    """Read one conversation of Open WebUI's.

    Raises:
        ImportRefused: something is not as it should be.
    """
    chat = item.item("chat") if "chat" in item.value else item
    history = chat.item("history")
    nodes = {name: _open_webui_node(node) for name, node in history.members("messages")}
    titled = item if item.value.get("title") else chat
    return _grow(nodes, history.get("currentId", str, ""), owner, titled, "created_at", "updated_at")


def _chatgpt_node(node: Item) -> _Node:
    parent = node.get("parent", str, "") or None
    if node.value.get("message") is None:
        return _Node(parent, None)
    message = node.item("message")
    role = message.item("author").get("role", str)
    hidden = message.get("metadata", dict, {}).get("is_visually_hidden_from_conversation")
    text = _chatgpt_text(message.item("content"))
    if role not in ("user", "assistant") or hidden or message.get("recipient", str, "all") != "all" or not text.strip():
        return _Node(parent, None)
    at = message.get("create_time", float, 0.0) or None
    model = message.get("metadata", dict, {}).get("model_slug")
    return _Node(parent, role, text, at, model if isinstance(model, str) else "")  # type: ignore[arg-type]


def _chatgpt_text(content: Item) -> str:
    kind = content.get("content_type", str, "text")
    if kind == "code":
        return f"```\n{content.get('text', str, '')}\n```"
    if kind not in ("text", "multimodal_text"):
        return ""
    return "\n".join(part for part in content.get("parts", list, []) if isinstance(part, str))


def _open_webui_node(node: Item) -> _Node:
    parent = node.get("parentId", str, "") or None
    role = node.get("role", str)
    text = node.get("content", str, "")
    if role not in ("user", "assistant") or not text.strip():
        return _Node(parent, None)
    at = node.get("timestamp", float, 0.0) or None
    return _Node(parent, role, text, at, node.get("model", str, ""))  # type: ignore[arg-type]


def _grow(
    nodes: Mapping[str, _Node], current: str, owner: str, head: Item, created_key: str, updated_key: str
) -> Conversation:
    """Make a conversation of nodes, the shown path ending in `current`."""
    created_at = _seconds(head.get(created_key, float, 0.0))
    children: dict[str | None, list[str]] = {}
    for name, node in nodes.items():
        children.setdefault(node.parent if node.parent in nodes else None, []).append(name)
    messages: dict[str, Message] = {}
    nearest: dict[str, str | None] = {}  # node → the message that it is, or that it comes after
    waiting: list[tuple[str, str | None]] = [(name, None) for name in reversed(children.get(None, []))]
    while waiting:
        name, above = waiting.pop()
        node = nodes[name]
        nearest[name] = above
        if node.role is not None:
            nearest[name] = name
            reply: dict[str, Any] = {"reason": "stop"} if node.role == "assistant" else {}
            messages[name] = Message(
                role=node.role,
                content=node.text,
                parent=above,
                id=name,
                created_at=_seconds(node.at or created_at),
                model=node.model,
                **reply,
            )
        below = sorted(children.get(name, []), key=lambda child: nodes[child].at or 0.0)
        waiting += [(child, nearest[name]) for child in reversed(below)]
    first = next((message.content for message in messages.values() if message.role == "user"), "")
    return Conversation(
        owner=owner,
        title=title_of(head.get("title", str, "") or first),
        messages=messages,
        leaf=nearest.get(current) or next(reversed(messages), None),
        pinned=head.get("pinned", bool, False),
        created_at=created_at,
        updated_at=_seconds(head.get(updated_key, float, 0.0)) or created_at,
    )


def _seconds(at: float) -> float:
    return at / 1000 if at > _MILLISECONDS else at
