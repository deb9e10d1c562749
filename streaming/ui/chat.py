"""The chat's handlers, in three steps: ask changes the page at once, stream reads the reply, settle ends it.

Gradio takes, compares and re-creates every output of a handler at every yield, so the step that yields for each
token has one output, and what it holds is the last reply alone: a long conversation streams as fast as an empty one.
"""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from streaming.conversations.tree import Conversation, Message
from streaming.errors import BrookError
from streaming.server.runs import LiveReply, Runs
from streaming.ui.conversations import NOTHING, SKIP, ConversationHandlers, Tab, Update, last_reply
from streaming.ui.models import ModelHandlers
from streaming.ui.replies import IDLE_FRAME_S, Replies
from streaming.ui.session import Session, owner_of
from streaming.ui.settings_panel import ChatSettings

Live = AsyncGenerator[Any, None]
BUSY = "A reply is being written; stop it first."


@dataclass(eq=False)
class Asked:
    """A reply that was asked for, and how to put things back when it is refused."""

    reply: LiveReply
    before: Conversation
    text: str = ""
    refusal: str = ""


class ChatSession(Session):
    """What a tab shows, and the replies that it asked for and did not yet stream or settle."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: deque[Asked] = deque()
        self.answered: deque[Asked] = deque()


class ChatHandlers:
    """What happens when people send, edit, retry and continue."""

    def __init__(self, runs: Runs) -> None:
        self.conversations = ConversationHandlers(runs)
        self.models = ModelHandlers(runs)
        self.replies = Replies(runs)
        self._runs = runs
        self._store = runs.store
        self._asking = asyncio.Lock()  # two tabs may ask in one conversation at once: the second finds it busy

    # Ask: each is followed by stream, then settle

    async def send(self, session: ChatSession, tab: Tab, text: str, request: gr.Request, *values: Any) -> Update:
        """Put a message at the end of the conversation."""
        if not text.strip():
            return NOTHING
        async with self._asking:
            conversation = await self.conversations.open(tab, request)
            if self.conversations.is_busy(conversation):
                return await self.conversations.show(session, conversation, composer=text, notice=BUSY)
            question = Message(role="user", content=text, parent=conversation.leaf)
            return await self._ask(session, conversation, values, question, _answer(question.id), text=text)

    async def send_example(
        self, session: ChatSession, tab: Tab, event: gr.EventData, request: gr.Request, *values: Any
    ) -> Update:
        """Send the example that was clicked."""
        return await self.send(session, tab, str(event._data["text"]), request, *values)

    async def edit(
        self, session: ChatSession, tab: Tab, event: gr.EventData, request: gr.Request, *values: Any
    ) -> Update:
        """Put another version beside a message. A person's is asked; a reply just reads as edited."""
        text = str(event._data["text"])
        async with self._asking:
            conversation = await self.conversations.open(tab, request)
            old = conversation.find(str(event._data["id"]))
            if old is None or not text.strip():
                return NOTHING
            if self.conversations.is_busy(conversation):
                return await self.conversations.show(session, conversation, notice=BUSY)
            if old.role == "user":
                question = Message(role="user", content=text, parent=old.parent)
                return await self._ask(session, conversation, values, question, _answer(question.id), text=text)
            edited = dataclasses.replace(
                _answer(old.parent), content=text, in_reasoning=old.in_reasoning, reason="edited", settings=old.settings
            )
            conversation = conversation.add(edited)
            await asyncio.to_thread(self._store.save, conversation, [edited])
        return await self.conversations.show(session, conversation)

    async def retry(self, session: ChatSession, tab: Tab, request: gr.Request, *values: Any) -> Update:
        """Write another reply beside the last one."""
        return await self._ask_again(session, tab, request, values, lambda reply: _answer(reply.parent))

    async def resume(self, session: ChatSession, tab: Tab, request: gr.Request, *values: Any) -> Update:
        """Go on with the last reply where it stopped."""
        return await self._ask_again(session, tab, request, values, lambda reply: reply)

    # Stream and settle

    async def stream(self, session: ChatSession, tab: Tab, request: gr.Request) -> Live:
        """Read the reply that was asked for."""
        if not session.asked or session.asked[0].reply.owner != owner_of(tab, request):
            async for frame in self.follow(session, tab, request):
                yield frame
            return
        asked = session.asked.popleft()
        try:
            async with aclosing(self._read(session, asked.reply)) as frames:
                async for frame in frames:
                    yield frame
        except BrookError as error:
            asked.refusal = str(error)
        session.answered.append(asked)

    async def settle(self, session: ChatSession, tab: Tab, request: gr.Request) -> tuple[Any, ...]:
        """Show what a reply changed beside itself: the list, the seed; and after a refusal, all as it was before."""
        if not session.answered or session.answered[0].reply.owner != owner_of(tab, request):
            return (*NOTHING, SKIP)
        asked = session.answered.popleft()
        if asked.refusal and session.leaf == asked.reply.message.id:
            before, text = asked.before, asked.text or SKIP
            return (*await self.conversations.show(session, before, composer=text, notice=asked.refusal), SKIP)
        generation = asked.reply.generation
        seed = SKIP if generation is None else gr.update(info=f"0 is fresh · last used {generation.seed}")
        return SKIP, SKIP, SKIP, await self.conversations.listed(session, owner_of(tab, request)), seed

    async def follow(self, session: ChatSession, tab: Tab, request: gr.Request) -> Live:
        """Read the reply of the conversation that is shown, if one is being written."""
        reply = self._runs.of(owner_of(tab, request), session.conversation)
        if reply is None:
            yield SKIP
            return
        try:
            async with aclosing(self._read(session, reply)) as frames:
                async for frame in frames:
                    yield frame
        except BrookError as error:  # the tab that asked puts all back
            yield {"state": "refused", "status": str(error), "message": None}

    async def _ask_again(
        self, session: ChatSession, tab: Tab, request: gr.Request, values: Sequence[Any], reply_after: Any
    ) -> Update:
        async with self._asking:
            conversation = await self.conversations.open(tab, request)
            reply = last_reply(conversation)
            if reply is None:
                return NOTHING
            if self.conversations.is_busy(conversation):
                return await self.conversations.show(session, conversation, notice=BUSY)
            return await self._ask(session, conversation, values, reply_after(reply))

    async def _ask(
        self, session: ChatSession, before: Conversation, values: Sequence[Any], *messages: Message, text: str = ""
    ) -> Update:
        """Ask for the last of `messages`, a reply; they are put into the conversation, unless they are in it already.

        Where it is refused, all is as `before`, and `text` is given back.
        """
        settings = ChatSettings(*values)
        *new, reply = messages
        reply = dataclasses.replace(reply, reason=None, error=None, settings=dataclasses.asdict(settings))
        conversation = before
        if reply.id in before.messages:
            conversation = before.change(reply)
        else:
            new.append(reply)
            for message in new:
                conversation = conversation.add(message)
        await asyncio.to_thread(self._store.save, conversation, new)
        model = self.models.of(session)
        live = self._runs.start(
            reply,
            self.replies.chat_request(conversation.path()[:-1], reply, settings, model),
            model=model.name,
            owner=conversation.owner,
            conversation_id=conversation.id,
            on_refusal=lambda: self._store.remove(before, [message.id for message in new]),
        )
        session.asked.append(Asked(live, before, text))
        return await self.conversations.show(session, conversation, composer="" if text else SKIP)

    async def _read(self, session: ChatSession, reply: LiveReply) -> Live:
        """Read a reply. When the tab shows something else meanwhile, stay, so that it is written all the same."""
        view, told_at = session.view, 0.0
        async with aclosing(self.replies.follow(reply)) as frames:
            async for frame in frames:
                if session.view == view:
                    yield dataclasses.asdict(frame)
                elif time.monotonic() - told_at > IDLE_FRAME_S:
                    told_at = time.monotonic()
                    yield SKIP


def _answer(parent: str | None) -> Message:
    return Message(role="assistant", content="", parent=parent)
