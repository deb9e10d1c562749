"""Where conversations are kept: SQLite in the data folder, or in memory where that is of no use."""

import json
import re
import sqlite3
import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streaming.conversations.database import Database
from streaming.conversations.tree import Conversation, Message

DELETED_KEPT_S = 24 * 3600.0
"""How long a deleted conversation can be had back."""
EXCERPT_CHARS = 120
_TRIGRAM = 3
_LIKE_SIGNS, _ESCAPED = re.compile(r"([%_\\])"), r"\\\1"

_COLUMNS = (
    "id, parent, role, content, created_at, token_ids, in_reasoning, reason, error, model, seed, settings, stats, "
    "rating, note"
)
# What changes while a reply is written; what people say of it (rating, note) is not among it.
_GROWING = ("content", "token_ids", "in_reasoning", "reason", "error", "model", "seed", "settings", "stats")


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation as lists show it. `excerpt` is what a search found, in the message `message_id`."""

    id: str
    title: str
    pinned: bool
    updated_at: float
    message_id: str | None = None
    excerpt: str = ""


class Store:
    """Every person's conversations. Each call is one short transaction, safe from any thread; in an event loop, use
    `asyncio.to_thread`.

    Nobody reaches a conversation without naming its owner: with another owner, or with an id that is not there, reading
    gives None and writing does nothing. Where the file is of no use, all goes on in memory, and `notice` says so.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Open the store in `folder`, or one in memory for None; replies that were cut off become "interrupted"."""
        self._database = Database(folder)
        self._database.run(_mark_interrupted)
        self.purge()

    @property
    def notice(self) -> str:
        """One sentence for people where something is not as it should be, else empty."""
        return self._database.notice

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    # One conversation

    def open(self, owner: str, conversation_id: str) -> Conversation | None:
        """Give a conversation with all its messages."""

        def read(db: sqlite3.Connection) -> Conversation | None:
            row = db.execute(
                "SELECT * FROM conversation WHERE id = ? AND owner = ? AND deleted_at IS NULL", (conversation_id, owner)
            ).fetchone()
            if row is None:
                return None
            messages = db.execute(
                f"SELECT {_COLUMNS} FROM message WHERE conversation = ? ORDER BY number", (conversation_id,)
            )
            return Conversation(
                id=row["id"],
                owner=owner,
                title=row["title"],
                leaf=row["leaf"],
                pinned=bool(row["pinned"]),
                created_at=row["created_at"],
                updated_at=row["updated_at"],
                messages={message["id"]: _message(message) for message in messages},
            )

        return self._database.run(read)

    def save(self, conversation: Conversation, messages: Iterable[Message] = ()) -> None:
        """Keep a conversation's title and what it shows, and `messages` of it that are new."""
        new = list(messages)

        def write(db: sqlite3.Connection) -> None:
            kept = db.execute(
                "INSERT INTO conversation (id, owner, title, leaf, pinned, created_at, updated_at) "
                "VALUES (:id, :owner, :title, :leaf, :pinned, :created_at, :updated_at) "
                "ON CONFLICT (id) DO UPDATE SET "
                "title = excluded.title, leaf = excluded.leaf, updated_at = excluded.updated_at "
                "WHERE owner = excluded.owner",
                {
                    name: getattr(conversation, name)
                    for name in ("id", "owner", "title", "leaf", "pinned", "created_at", "updated_at")
                },
            ).rowcount
            if not kept:
                return
            for message in new:
                names = ("conversation", *_COLUMNS.split(", "))
                values = {"conversation": conversation.id, **_row(message)}
                number = db.execute(
                    f"INSERT INTO message ({', '.join(names)}) VALUES (:{', :'.join(names)})", values
                ).lastrowid
                _index(db, number, message)

        self._database.run(write)

    def update(self, conversation_id: str, reply: Message) -> None:
        """Keep how far a reply has come, or how it ended. Once it has (`reason`), searches find it."""

        def write(db: sqlite3.Connection) -> None:
            row = _row(reply)
            found = db.execute(
                f"UPDATE message SET {', '.join(f'{name} = :{name}' for name in _GROWING)} "
                "WHERE conversation = :conversation AND id = :id RETURNING number",
                {name: row[name] for name in ("id", *_GROWING)} | {"conversation": conversation_id},
            ).fetchone()
            if found is not None:
                _index(db, found["number"], reply)

        self._database.run(write)

    def remove(self, conversation: Conversation, message_ids: Sequence[str]) -> None:
        """Take messages out of a conversation again, which now shows its `leaf`; an empty one goes altogether."""

        def write(db: sqlite3.Connection) -> None:
            place = (conversation.id, conversation.owner)
            for message_id in message_ids:
                db.execute(
                    "DELETE FROM message WHERE id = ? AND conversation IN "
                    "(SELECT id FROM conversation WHERE id = ? AND owner = ?)",
                    (message_id, *place),
                )
            db.execute("UPDATE conversation SET leaf = ? WHERE id = ? AND owner = ?", (conversation.leaf, *place))
            db.execute(
                "DELETE FROM conversation WHERE id = ? AND owner = ? AND NOT EXISTS "
                "(SELECT 1 FROM message WHERE conversation = conversation.id)",
                place,
            )

        self._database.run(write)

    def rate(self, owner: str, conversation_id: str, message_id: str, rating: int, note: str = "") -> None:
        """Keep what a person says of a reply: 1 for good, -1 for bad, 0 for nothing."""
        self._write(
            "UPDATE message SET rating = ?, note = ? WHERE id = ? AND conversation IN "
            "(SELECT id FROM conversation WHERE id = ? AND owner = ?)",
            (rating, note, message_id, conversation_id, owner),
        )

    def rename(self, owner: str, conversation_id: str, title: str) -> None:
        """Give a conversation another title."""
        self._write("UPDATE conversation SET title = ? WHERE id = ? AND owner = ?", (title, conversation_id, owner))

    def pin(self, owner: str, conversation_id: str, pinned: bool) -> None:
        """Keep a conversation at the top of the list, or no longer."""
        self._write("UPDATE conversation SET pinned = ? WHERE id = ? AND owner = ?", (pinned, conversation_id, owner))

    def delete(self, owner: str, conversation_id: str) -> None:
        """Put a conversation out of sight; `restore()` brings it back for DELETED_KEPT_S, then it is gone for good."""
        self._write(
            "UPDATE conversation SET deleted_at = ? WHERE id = ? AND owner = ?", (time.time(), conversation_id, owner)
        )

    def restore(self, owner: str, conversation_id: str) -> None:
        """Bring a deleted conversation back."""
        self._write("UPDATE conversation SET deleted_at = NULL WHERE id = ? AND owner = ?", (conversation_id, owner))

    # All of them

    def recent(self, owner: str, limit: int = 1000) -> list[Summary]:
        """Give a person's conversations: pinned ones first, then by the time of the last message, newest first."""

        def read(db: sqlite3.Connection) -> list[Summary]:
            rows = db.execute(
                "SELECT id, title, pinned, updated_at FROM conversation WHERE owner = ? AND deleted_at IS NULL "
                "ORDER BY pinned DESC, updated_at DESC LIMIT ?",
                (owner, limit),
            )
            return [_summary(row) for row in rows]

        return self._database.run(read)

    def search(self, owner: str, words: str, limit: int = 50) -> list[Summary]:
        """Find conversations that have a message with all the words or parts of words; the newest message first."""
        wanted = words.split()
        if not wanted:
            return []
        conditions = ["search.content LIKE ? ESCAPE '\\'" for word in wanted if len(word) < _TRIGRAM]
        values = [f"%{_LIKE_SIGNS.sub(_ESCAPED, word)}%" for word in wanted if len(word) < _TRIGRAM]
        phrases = ['"' + word.replace('"', '""') + '"' for word in wanted if len(word) >= _TRIGRAM]
        if phrases:
            conditions.append("search MATCH ?")
            values.append(" ".join(phrases))

        def read(db: sqlite3.Connection) -> list[Summary]:
            rows = db.execute(
                "SELECT c.id, c.title, c.pinned, c.updated_at, m.id AS message_id, m.content FROM search "
                "CROSS JOIN message m ON m.number = search.rowid CROSS JOIN conversation c ON c.id = m.conversation "
                f"WHERE {' AND '.join(conditions)} AND c.owner = ? AND c.deleted_at IS NULL ORDER BY search.rowid DESC",
                (*values, owner),
            )
            hits: dict[str, Summary] = {}
            for row in rows:  # found as they are read, newest first: a frequent word costs no more than a rare one
                if row["id"] not in hits:
                    excerpt = _excerpt(row["content"], wanted[0])
                    hits[row["id"]] = replace(_summary(row), message_id=row["message_id"], excerpt=excerpt)
                if len(hits) == limit:
                    break
            return list(hits.values())

        return self._database.run(read)

    def purge(self) -> None:
        """Forget for good what was deleted longer than DELETED_KEPT_S ago."""

        self._write("DELETE FROM conversation WHERE deleted_at < ?", (time.time() - DELETED_KEPT_S,))

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        self._database.run(lambda db: db.execute(statement, values).rowcount)


def _mark_interrupted(db: sqlite3.Connection) -> None:
    """Mark what was being written when the server died: nothing is being written now."""
    rows = db.execute(
        "UPDATE message SET reason = 'interrupted' WHERE reason IS NULL AND role = 'assistant' "
        f"RETURNING number, {_COLUMNS}"
    ).fetchall()
    for row in rows:
        _index(db, row["number"], _message(row))


def _index(db: sqlite3.Connection, number: int | None, message: Message) -> None:
    """Let searches find a message whose text stands still."""
    if message.role == "assistant" and message.reason is None:
        return
    db.execute("DELETE FROM search WHERE rowid = ?", (number,))
    db.execute("INSERT INTO search (rowid, content) VALUES (?, ?)", (number, message.content))


def _summary(row: sqlite3.Row) -> Summary:
    return Summary(row["id"], row["title"], bool(row["pinned"]), row["updated_at"])


def _row(message: Message) -> dict[str, Any]:
    row = {name: getattr(message, name) for name in _COLUMNS.split(", ")}
    ids = array("I", message.token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return row | {
        "token_ids": ids.tobytes(),
        "settings": json.dumps(dict(message.settings), ensure_ascii=False),
        "stats": json.dumps(dict(message.stats), ensure_ascii=False),
    }


def _message(row: sqlite3.Row) -> Message:
    fields = {name: row[name] for name in _COLUMNS.split(", ")}
    ids = array("I", fields["token_ids"])
    if sys.byteorder == "big":
        ids.byteswap()
    return Message(
        **fields
        | {
            "token_ids": tuple(ids),
            "in_reasoning": bool(fields["in_reasoning"]),
            "settings": json.loads(fields["settings"]),
            "stats": json.loads(fields["stats"]),
        }
    )


def _excerpt(content: str, word: str) -> str:
    """Give the text around a word, in one line."""
    at = max(0, content.lower().find(word.lower()))
    begin, end = max(0, at - EXCERPT_CHARS // 3), at + EXCERPT_CHARS
    words = " ".join(content[begin:end].split())
    return ("…" if begin else "") + words + ("…" if end < len(content) else "")
