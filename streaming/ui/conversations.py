"""Which conversation a tab shows, and what people do with conversations without a model.

A tab names itself what it shows, in the first input of every handler: {"browser": its secret, "conversation": an id}.
So a page that was open while the server was started again goes on as if nothing had been.
"""

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

import gradio as gr

from streaming.conversations.tree import NEW_TITLE, Conversation, Message
from streaming.server.runs import Runs
from streaming.ui.session import Session, for_page, owner_of

# What handlers change: composer, past messages, the last reply, the list of conversations.
Update = tuple[Any, Any, Any, Any]
Tab = Mapping[str, Any]
SKIP = gr.skip()
OUTLINE_CHARS = 60
MAX_TITLE_CHARS = 200
MAX_NOTE_CHARS = 2000
NOTHING: Update = (SKIP, SKIP, SKIP, SKIP)


class ConversationHandlers:
    """What happens when people open, switch, undo, search, name and delete. Nobody is shown what is not theirs."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._store = runs.store

    async def refresh(self, session: Session, tab: Tab, request: gr.Request) -> Update:
        """Show what the tab shows as it is now; in a tab that shows nothing yet, what is being written, if anything.

        Nobody asked for it by hand: when the person did something meanwhile, that stands.
        """
        owner, view = owner_of(tab, request), session.view
        if not tab.get("conversation"):
            running = [reply.conversation_id for reply in self._runs.of_owner(owner)]
            tab = {**tab, "conversation": running[-1] if running else ""}
        conversation = await self.open(tab, request)
        if session.view != view:
            return NOTHING
        update = await self.show(session, conversation)
        return update if session.view == view + 1 else NOTHING

    async def new(self, session: Session, tab: Tab, request: gr.Request) -> Update:
        """Begin a conversation; what another is writing goes on."""
        return await self.show(session, Conversation(owner=owner_of(tab, request)))

    async def select(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> Update:
        """Show a conversation; where one of its messages was searched for, the branch with that."""
        conversation = await self.open({**tab, "conversation": event._data["id"]}, request)
        return await self._show_branch(session, conversation, event._data.get("message"))

    async def branch(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> Update:
        """Show the branch with a message."""
        return await self._show_branch(session, await self.open(tab, request), event._data["id"])

    async def undo(self, session: Session, tab: Tab, request: gr.Request) -> Update:
        """Show the conversation without its last exchange; what was asked returns to the composer."""
        conversation = await self.open(tab, request)
        asked = next((message for message in reversed(conversation.path()) if message.role == "user"), None)
        if asked is None or self.is_busy(conversation):
            return NOTHING
        conversation = conversation.undo()
        await asyncio.to_thread(self._store.save, conversation)
        return await self.show(session, conversation, composer=asked.content)

    async def delete(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> Update:
        """Put a conversation away and stop what it is writing; in its place show the newest, if it was shown."""
        owner, gone = owner_of(tab, request), str(event._data["id"])
        await self._put_away(owner, gone)
        if gone == tab.get("conversation"):
            rest = await asyncio.to_thread(self._store.recent, owner, 1)
            tab = {**tab, "conversation": rest[0].id if rest else ""}
        return await self.show(session, await self.open(tab, request))

    async def clear(self, session: Session, tab: Tab, request: gr.Request) -> Update:
        """Put the conversation away and begin another."""
        await self._put_away(owner_of(tab, request), str(tab.get("conversation")))
        return await self.new(session, tab, request)

    async def restore(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> Update:
        """Bring a conversation back that was put away, and show it."""
        await asyncio.to_thread(self._store.restore, owner_of(tab, request), str(event._data["id"]))
        return await self.select(session, tab, event, request)

    async def stop(self, tab: Tab, request: gr.Request) -> None:
        """Stop the reply of the conversation, for every tab that shows it."""
        reply = self._runs.of(owner_of(tab, request), str(tab.get("conversation")))
        if reply is not None:
            reply.stop()

    async def rate(self, tab: Tab, event: gr.EventData, request: gr.Request) -> None:
        """Keep what the person thinks of a reply."""
        owner, data = owner_of(tab, request), event._data
        rating = max(-1, min(1, int(data["rating"])))
        where = (owner, str(tab.get("conversation")), str(data["id"]))
        await asyncio.to_thread(self._store.rate, *where, rating, str(data.get("note", ""))[:MAX_NOTE_CHARS])

    # What changes the list alone

    async def rename(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        """Give a conversation another title."""
        title = " ".join(str(event._data["title"]).split())[:MAX_TITLE_CHARS]
        if title:
            await asyncio.to_thread(self._store.rename, owner_of(tab, request), str(event._data["id"]), title)
        return await self.listed(session, owner_of(tab, request))

    async def pin(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        """Keep a conversation at the top of the list, or no longer."""
        where = (owner_of(tab, request), str(event._data["id"]))
        await asyncio.to_thread(self._store.pin, *where, bool(event._data["pinned"]))
        return await self.listed(session, owner_of(tab, request))

    async def search(self, session: Session, tab: Tab, event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        """List the conversations with some words, from now on; without words, all."""
        session.words = str(event._data["words"]).strip()
        return await self.listed(session, owner_of(tab, request))

    # What asking shares with them

    async def open(self, tab: Tab, request: gr.Request) -> Conversation:
        """Give the conversation that a tab names, where it is the person's own; else a new one."""
        owner, conversation_id = owner_of(tab, request), tab.get("conversation")
        found = await asyncio.to_thread(self._store.open, owner, str(conversation_id)) if conversation_id else None
        return found or Conversation(owner=owner)

    def is_busy(self, conversation: Conversation) -> bool:
        """Whether a reply is being written in a conversation."""
        return self._runs.of(conversation.owner, conversation.id) is not None

    async def show(
        self, session: Session, conversation: Conversation, *, composer: Any = SKIP, notice: str = ""
    ) -> Update:
        """Show a conversation from its beginning; handlers that wrote for what was shown before fall silent."""
        session.show(conversation)
        running = self._runs.of(conversation.owner, conversation.id)
        if running is not None:
            conversation = conversation.change(self._runs.grown(running))
        reply = last_reply(conversation)
        answers: dict[str | None, list[str]] = {}
        for message in conversation.messages.values():
            answers.setdefault(message.parent, []).append(message.id)
        path = [for_page(message, answers[message.parent]) for message in conversation.path()]
        live = {
            "state": "refused" if notice else "waiting" if running is not None else "idle",
            "status": notice,
            "message": None if reply is None else path.pop(),
        }
        is_forked = any(len(siblings) > 1 for siblings in answers.values())
        past = {
            "conversation": session.conversation,
            "messages": path,
            "tree": _outline(conversation) if is_forked else [],
        }
        return composer, past, live, await self.listed(session, conversation.owner)

    async def listed(self, session: Session, owner: str) -> dict[str, Any]:
        """Give the owner's conversations as the sidebar lists them; a new one is kept from its first message on."""
        if session.words:
            summaries = await asyncio.to_thread(self._store.search, owner, session.words)
        else:
            summaries = await asyncio.to_thread(self._store.recent, owner)
        busy = {reply.conversation_id for reply in self._runs.of_owner(owner)}
        items = [
            {
                **dataclasses.asdict(summary),
                "active": summary.id == session.conversation,
                "busy": summary.id in busy,
            }
            for summary in summaries
        ]
        if not session.conversation and not session.words:
            items.insert(0, {"id": "", "title": NEW_TITLE, "active": True, "busy": False})
        return {"items": items, "search": session.words, "notice": self._store.notice}

    async def _show_branch(self, session: Session, conversation: Conversation, message_id: Any) -> Update:
        wanted = conversation.find(message_id) if isinstance(message_id, str) else None
        if wanted is not None and wanted not in conversation.path() and not self.is_busy(conversation):
            conversation = conversation.select(wanted.id)
            await asyncio.to_thread(self._store.save, conversation)
        return await self.show(session, conversation)

    async def _put_away(self, owner: str, conversation_id: str) -> None:
        reply = self._runs.of(owner, conversation_id)
        if reply is not None:
            reply.stop()
        await asyncio.to_thread(self._store.delete, owner, conversation_id)


def _outline(conversation: Conversation) -> list[dict[str, Any]]:
    """Give every message with the beginning of its text, and whether it is shown, for a small view of the tree."""
    shown = {message.id for message in conversation.path()}
    return [
        {
            "id": message.id,
            "parent": message.parent,
            "role": message.role,
            "text": " ".join(message.content[: 4 * OUTLINE_CHARS].split())[:OUTLINE_CHARS],
            "shown": message.id in shown,
        }
        for message in conversation.messages.values()
    ]


def last_reply(conversation: Conversation) -> Message | None:
    """Give the reply at the end of what is shown, if there is one."""
    last = conversation.find(conversation.leaf)
    return last if last is not None and last.role == "assistant" else None
