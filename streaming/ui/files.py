"""Conversations out to files and back in, for the page: what it downloads, and what it was given."""

import asyncio
import itertools
import re
from typing import Any

import gradio as gr

from streaming.conversations.transfer import FORMATS, read_conversations, write_feedback
from streaming.conversations.tree import Conversation
from streaming.errors import BrookError
from streaming.server.runs import Runs
from streaming.ui.conversations import NOTHING, ConversationHandlers, Tab, Update
from streaming.ui.session import Session, owner_of

MAX_CONVERSATIONS = 100_000


class FileHandlers:
    """What happens when people export and import. The page makes the file of what it is sent."""

    def __init__(self, runs: Runs, conversations: ConversationHandlers) -> None:
        self._store = runs.store
        self._conversations = conversations
        self._numbers = itertools.count(1)  # tells the page one answer from the next

    async def export(self, tab: Tab, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        """Write one conversation, or all for the id "", in one of the formats or as feedback."""
        owner, conversation_id, form = owner_of(tab, request), str(event._data["id"]), str(event._data["form"])
        conversations = await asyncio.to_thread(self._open, owner, conversation_id)
        if not conversations:
            return self._say("There is nothing to export yet.")
        name = _file_name(conversations[0].title) if conversation_id else "brook-conversations"
        if form == "feedback":
            text = await asyncio.to_thread(write_feedback, conversations)
            if not text:
                return self._say("No reply was rated yet.")
            return self._send(f"{name}.feedback.jsonl", "application/jsonl", text)
        if form not in FORMATS:
            return self._say(f"There is no format {form!r}.", failed=True)
        chosen = FORMATS[form]
        return self._send(name + chosen.suffix, chosen.media_type, await asyncio.to_thread(chosen.write, conversations))

    async def take(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """Read a file and show the first of its conversations; where it cannot be read, nothing changes."""
        owner = owner_of(tab, request)
        try:
            conversations = await asyncio.to_thread(read_conversations, str(event._data["text"]), owner)
        except BrookError as error:
            return (*NOTHING, self._say(str(error), failed=True))
        conversations = [conversation for conversation in conversations if conversation.messages]
        if not conversations:
            return (*NOTHING, self._say("There is no message in this file.", failed=True))
        [first, *_] = await asyncio.to_thread(self._store.add, conversations)
        shown: Update = await self._conversations.show(
            session, await self._conversations.open({**tab, "conversation": first}, request)
        )
        n = len(conversations)
        return (*shown, self._say(f"{n:,} {'chat was' if n == 1 else 'chats were'} imported."))

    def _open(self, owner: str, conversation_id: str) -> list[Conversation]:
        ids = [conversation_id] if conversation_id else [s.id for s in self._store.recent(owner, MAX_CONVERSATIONS)]
        return [found for one in ids if (found := self._store.open(owner, one)) is not None]

    def _send(self, name: str, media_type: str, text: str) -> dict[str, Any]:
        return {"n": next(self._numbers), "file": {"name": name, "type": media_type, "text": text}}

    def _say(self, words: str, *, failed: bool = False) -> dict[str, Any]:
        return {"n": next(self._numbers), "words": words, "failed": failed}


def _file_name(title: str) -> str:
    return re.sub(r"[\W_]+", "-", title).strip("-")[:60] or "conversation"
