"""Which conversation a tab shows, and what people do with conversations without a model.

A tab names itself what it shows, in the first input of every handler: {"browser": its secret, "conversation": an id}.
So a page that was open while the server was started again goes on as if nothing had been.
"""

import asyncio
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
NOTHING: Update = (SKIP, SKIP, SKIP, SKIP)


class ConversationHandlers:
    """What happens when people open, switch, undo and delete. Nobody is shown what is not theirs."""

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
        """Show a conversation."""
        return await self.show(session, await self.open({**tab, "conversation": event._data["id"]}, request))

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

    async def stop(self, tab: Tab, request: gr.Request) -> None:
        """Stop the reply of the conversation, for every tab that shows it."""
        reply = self._runs.of(owner_of(tab, request), str(tab.get("conversation")))
        if reply is not None:
            reply.stop()

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
        live = {
            "state": "refused" if notice else "waiting" if running is not None else "idle",
            "status": notice,
            "message": None if reply is None else for_page(reply),
        }
        past = [for_page(message) for message in conversation.path() if message is not reply]
        return composer, {"conversation": session.conversation, "messages": past}, live, await self.listed(session)

    async def listed(self, session: Session) -> dict[str, Any]:
        """Give the conversations as the sidebar lists them; a new one is kept from its first message on."""
        summaries = await asyncio.to_thread(self._store.recent, session.owner)
        busy = {reply.conversation_id for reply in self._runs.of_owner(session.owner)}
        items = [
            {
                "id": summary.id,
                "title": summary.title,
                "active": summary.id == session.conversation,
                "busy": summary.id in busy,
            }
            for summary in summaries
        ]
        if not session.conversation:
            items.insert(0, {"id": "", "title": NEW_TITLE, "active": True, "busy": False})
        return {"items": items, "notice": self._store.notice}

    async def _put_away(self, owner: str, conversation_id: str) -> None:
        reply = self._runs.of(owner, conversation_id)
        if reply is not None:
            reply.stop()
        await asyncio.to_thread(self._store.delete, owner, conversation_id)


def last_reply(conversation: Conversation) -> Message | None:
    """Give the reply at the end of what is shown, if there is one."""
    last = conversation.find(conversation.leaf)
    return last if last is not None and last.role == "assistant" else None
