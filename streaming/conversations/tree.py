"""A conversation is a tree of messages: every edit and every reply written again is a sibling, nothing is overwritten.

Pure values. A conversation remembers which path through it is shown by the path's last message, its `leaf`.
"""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streaming.errors import ConversationInvalid

TITLE_CHARS = 48
NEW_TITLE = "New chat"

Role = Literal["user", "assistant"]
Reason = Literal["stop", "length", "cancelled", "error", "abandoned", "interrupted", "edited"]
"""How a reply came to be as it is: an engine's finish reasons, then: nobody was watching, the server stopped while it
was being written, a person edited it."""


def new_id() -> str:
    """Give an id that nobody can guess."""
    return secrets.token_urlsafe(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, under the message that it answers (`parent`; None for a first message).

    A reply's `token_ids` are what the model wrote, so that later turns are token-exact; they mean something to `model`
    only. Its `reason` is None while it is being written. `settings` are what it was asked with, `stats` how it went:
    the finish event's counts and seconds. `rating` is 1 for thumbs up, -1 for down; `note` says why. `created_at`
    counts seconds since 1970.
    """

    role: Role
    content: str
    parent: str | None = None
    id: str = field(default_factory=new_id)
    created_at: float = field(default_factory=time.time)
    token_ids: tuple[int, ...] = ()
    in_reasoning: bool = False
    reason: Reason | None = None
    error: str | None = None
    model: str = ""
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    rating: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        if not self.content.isascii():  # half a surrogate pair is no text; browsers may send one
            whole = self.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            object.__setattr__(self, "content", whole)

    @property
    def can_continue(self) -> bool:
        """Whether the model can go on with it: a reply that did not come to its own end."""
        return self.role == "assistant" and self.reason not in ("stop", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A person's conversation: its messages by id, in the order they were made, parents before children.

    `owner` says whose it is. `leaf` is None where no message is shown, as after the first one was undone.
    """

    owner: str
    id: str = field(default_factory=new_id)
    title: str = NEW_TITLE
    messages: Mapping[str, Message] = field(default_factory=dict)
    leaf: str | None = None
    pinned: bool = False
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)

    def find(self, message_id: str | None) -> Message | None:
        """Give a message by its id."""
        return None if message_id is None else self.messages.get(message_id)

    def path(self, message_id: str | None = None) -> list[Message]:
        """Give the messages from the first to the one named, or to the leaf: what is shown."""
        return list(self._upwards(message_id or self.leaf))[::-1]

    def children(self, message_id: str | None) -> list[Message]:
        """Give the messages right under one, or the first messages for None, oldest first."""
        return [message for message in self.messages.values() if message.parent == message_id]

    def siblings(self, message_id: str) -> list[Message]:
        """Give the alternatives to a message, itself among them, oldest first."""
        return self.children(self.messages[message_id].parent)

    def add(self, message: Message) -> "Conversation":
        """Put a message under its parent and show it; the first message of a person gives the title.

        Raises:
            ConversationInvalid: there is no such parent, or a message of that id is there.
        """
        if message.id in self.messages:
            raise ConversationInvalid(f"There are two messages with the id {message.id!r}.")
        if message.parent is not None and message.parent not in self.messages:
            raise ConversationInvalid(f"The message {message.id!r} answers {message.parent!r}, which is not there.")
        titled = self.title != NEW_TITLE or message.role != "user"
        return dataclasses.replace(
            self,
            title=self.title if titled else title_of(message.content),
            messages={**self.messages, message.id: message},
            leaf=message.id,
            updated_at=time.time(),
        )

    def change(self, message: Message) -> "Conversation":
        """Put a message in the place of the one with its id, as a reply that has grown."""
        return dataclasses.replace(self, messages={**self.messages, message.id: message})

    def select(self, message_id: str) -> "Conversation":
        """Show the path through a message, and on from there through the newest."""
        leaf, newest = message_id, {message.parent: message.id for message in self.messages.values()}
        while leaf in newest:
            leaf = newest[leaf]
        return dataclasses.replace(self, leaf=leaf)

    def undo(self) -> "Conversation":
        """Show the path without its last exchange, from the person's message on. Nothing is lost."""
        asked = next((m for m in self._upwards(self.leaf) if m.role == "user"), None)
        return self if asked is None else dataclasses.replace(self, leaf=asked.parent)

    def without(self, message_ids: Iterable[str], leaf: str | None) -> "Conversation":
        """Take messages that nothing answers out again, as after a refusal, and show `leaf`."""
        gone = set(message_ids)
        kept = {message_id: message for message_id, message in self.messages.items() if message_id not in gone}
        return dataclasses.replace(self, messages=kept, leaf=leaf)

    def _upwards(self, message_id: str | None) -> Iterator[Message]:
        while message_id is not None:
            message = self.messages[message_id]
            yield message
            message_id = message.parent


def title_of(text: str) -> str:
    """Make a conversation's title of its first message: the beginning, in one line."""
    line = " ".join(text.split())
    return (line[: TITLE_CHARS - 1] + "…" if len(line) > TITLE_CHARS else line) or NEW_TITLE
