"""What one tab holds: its conversations, their messages, and the reply being written. No Gradio here."""

import itertools
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from streaming.engine.base import Generation

TITLE_CHARS = 48
_numbers = itertools.count(1)


def _new_id() -> str:
    return f"{next(_numbers):x}"


def new_owner() -> str:
    """Give a name that nobody else has, under which an engine keeps what it read for later requests."""
    return secrets.token_urlsafe(16)


@dataclass(eq=False)
class Message:
    """One message as it stands. `token_ids` are what the model wrote, so that later turns are token-exact.

    A reply being written has its text in the log of its turn's run; it is put here at the end.
    """

    role: Literal["user", "assistant"]
    content: str
    token_ids: tuple[int, ...] = ()
    id: str = field(default_factory=_new_id)
    in_reasoning: bool = False
    error: str | None = None
    can_continue: bool = False

    def for_model(self) -> dict[str, Any]:
        """Give the message as engines take it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        return message | {"token_ids": self.token_ids} if self.token_ids else message

    def for_page(self) -> dict[str, Any]:
        """Give the message as the transcript shows it."""
        return {
            "id": self.id,
            "role": self.role,
            "text": self.content,
            "reasoning": self.in_reasoning,
            "error": self.error,
            "resumable": self.can_continue,
        }


@dataclass(eq=False)
class Turn:
    """A reply on its way: asked for, perhaps not yet submitted, perhaps being written."""

    reply: Message
    owner: str = field(default_factory=new_owner)
    run: Generation | None = None
    stopped: bool = False
    begins_with: str = field(init=False)

    def __post_init__(self) -> None:
        self.begins_with = self.reply.content

    def begin(self, run: Generation) -> None:
        """Take the run that writes the reply; may be called from any thread, and after `stop()`."""
        self.run = run
        if self.stopped:
            run.cancel()

    def stop(self) -> None:
        """End the reply here; also before it was submitted."""
        self.stopped = True
        if self.run is not None:
            self.run.cancel()


@dataclass(eq=False)
class Conversation:
    """Messages in order, and the turn that is going on, if one is."""

    messages: list[Message] = field(default_factory=list)
    turn: Turn | None = None
    id: str = field(default_factory=_new_id)

    @property
    def title(self) -> str:
        """Give the beginning of the first message, for the list of conversations."""
        first = next((m.content for m in self.messages if m.role == "user"), "")
        line = " ".join(first.split())
        return (line[: TITLE_CHARS - 1] + "…" if len(line) > TITLE_CHARS else line) or "New chat"

    @property
    def last_reply(self) -> Message | None:
        """The reply at the end, if there is one."""
        return self.messages[-1] if self.messages and self.messages[-1].role == "assistant" else None

    def index(self, message_id: str) -> int | None:
        """Find a message by its id."""
        return next((i for i, message in enumerate(self.messages) if message.id == message_id), None)

    def stop(self) -> None:
        """Stop the turn that is going on, if one is."""
        if self.turn is not None:
            self.turn.stop()


class Session:
    """One tab's conversations, newest first. Used from the event loop only, so it needs no lock.

    `view` counts what the tab was told to show: a handler that still writes for an older view leaves the page alone.
    """

    def __init__(self) -> None:
        self.conversations = [Conversation()]
        self.active = self.conversations[0]
        self.view = 0

    @cached_property
    def owner(self) -> str:
        """The tab's own name. Made at first use: Gradio copies one session for every tab."""
        return new_owner()

    def open_new(self) -> Conversation:
        """Begin a conversation, or go to the one that is still empty."""
        empty = next((c for c in self.conversations if not c.messages), None)
        if empty is None:
            empty = Conversation()
            self.conversations.insert(0, empty)
        self.active = empty
        return empty

    def select(self, conversation_id: str) -> Conversation:
        """Show a conversation; an unknown one leaves the active one."""
        self.active = next((c for c in self.conversations if c.id == conversation_id), self.active)
        return self.active

    def delete(self, conversation_id: str) -> None:
        """Forget a conversation and stop what it is writing."""
        gone = next((c for c in self.conversations if c.id == conversation_id), None)
        if gone is None:
            return
        gone.stop()
        self.conversations.remove(gone)
        if gone is self.active:
            self.active = self.conversations[0] if self.conversations else self.open_new()

    def close(self) -> None:
        """Stop everything; the tab is gone."""
        for conversation in self.conversations:
            conversation.stop()

    def for_list(self) -> list[dict[str, Any]]:
        """Give the conversations as the sidebar lists them."""
        return [
            {"id": c.id, "title": c.title, "active": c is self.active, "busy": c.turn is not None}
            for c in self.conversations
        ]
