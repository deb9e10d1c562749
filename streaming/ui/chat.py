"""The chat's handlers, in three steps: ask changes the page at once, stream sends the reply, settle ends it.

Gradio takes, compares and re-creates every output of a handler at every yield, so the step that yields for each
token has one output, and what it holds is the last reply alone: a long conversation streams as fast as an empty one.
"""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from streaming.engine.base import Engine, GenerationRequest
from streaming.errors import BrookError
from streaming.ui.replies import Frame, Replies
from streaming.ui.session import Conversation, Message, Session, Turn
from streaming.ui.settings_panel import ChatSettings

# What asking and settling change: composer, past messages, the last reply, the list of conversations.
Update = tuple[Any, Any, Any, Any]
Live = AsyncGenerator[Any, None]
SKIP = gr.skip()
NOTHING: Update = (SKIP, SKIP, SKIP, SKIP)


@dataclass(eq=False)
class Asked:
    """A reply that was asked for: where it goes, and how to put things back when it is refused."""

    conversation: Conversation
    turn: Turn
    settings: ChatSettings
    before: list[Message]
    text: str = ""
    refusal: str = ""


class ChatSession(Session):
    """A tab's conversations, and the replies that it asked for and did not yet stream or settle."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: deque[Asked] = deque()
        self.answered: deque[Asked] = deque()


class ChatHandlers:
    """What happens when people send, stop, edit, retry, continue, undo and switch."""

    def __init__(self, engine: Engine) -> None:
        self.replies = Replies(engine)

    # Ask: each is followed by stream, then settle

    async def send(self, session: ChatSession, text: str, *values: Any) -> Update:
        """Put a message at the end of the active conversation."""
        conversation = session.active
        if not text.strip():
            return NOTHING
        if conversation.turn is not None:
            return text, SKIP, _notice(conversation, "A reply is being written; stop it first."), SKIP
        before = list(conversation.messages)
        conversation.messages.append(Message("user", text))
        return _ask(session, conversation, before, values, text=text)

    async def send_example(self, session: ChatSession, event: gr.EventData, *values: Any) -> Update:
        """Send the example that was clicked."""
        return await self.send(session, str(event._data["text"]), *values)

    async def edit(self, session: ChatSession, event: gr.EventData, *values: Any) -> Update:
        """Change a message. A person's is asked again, and what came after it goes; a reply just reads as edited."""
        conversation, text = session.active, str(event._data["text"])
        index = conversation.index(str(event._data["id"]))
        if index is None or conversation.turn is not None or not text.strip():
            return NOTHING
        before, message = list(conversation.messages), conversation.messages[index]
        if message.role == "assistant":
            edited = Message("assistant", text, id=message.id, in_reasoning=message.in_reasoning, can_continue=True)
            conversation.messages[index] = edited
            return _show(session)
        conversation.messages[index:] = [Message("user", text)]
        return _ask(session, conversation, before, values, text=text)

    async def retry(self, session: ChatSession, *values: Any) -> Update:
        """Write the last reply again."""
        conversation = session.active
        if conversation.turn is not None or conversation.last_reply is None:
            return NOTHING
        before = list(conversation.messages)
        conversation.messages.pop()
        return _ask(session, conversation, before, values)

    async def resume(self, session: ChatSession, *values: Any) -> Update:
        """Go on with the last reply where it stopped."""
        conversation, reply = session.active, session.active.last_reply
        if conversation.turn is not None or reply is None:
            return NOTHING
        return _ask(session, conversation, list(conversation.messages), values, reply=reply)

    # Stream and settle

    async def stream(self, session: ChatSession) -> Live:
        """Write the reply that was asked for; when the tab shows something else meanwhile, write it all the same."""
        if not session.asked:
            yield SKIP
            return
        asked = session.asked.popleft()
        conversation, turn, view = asked.conversation, asked.turn, session.view

        def build_request() -> GenerationRequest:
            return self.replies.chat_request(conversation, turn.reply, asked.settings)

        try:
            async with aclosing(self.replies.write(turn, build_request)) as frames:
                async for frame in frames:
                    if frame.state == "done":
                        conversation.turn = None
                    yield _live(frame) if session.view == view else SKIP
        except BrookError as error:
            asked.refusal = str(error)
            conversation.messages[:] = asked.before
        finally:
            conversation.turn = None
        session.answered.append(asked)

    async def settle(self, session: ChatSession) -> tuple[Any, ...]:
        """Show what a reply changed beside itself: the list, the seed; and after a refusal, all as it was before."""
        if not session.answered:
            return (*NOTHING, SKIP)
        asked = session.answered.popleft()
        if asked.refusal and session.active is asked.conversation:
            return (*_show(session, composer=asked.text or SKIP, notice=asked.refusal), SKIP)
        run = asked.turn.run
        seed = SKIP if run is None else gr.update(info=f"0 is fresh · last used {run.seed}")
        return SKIP, SKIP, SKIP, session.for_list(), seed

    async def follow(self, session: ChatSession) -> Live:
        """Show the reply of a conversation that was switched to, if it is still being written."""
        view, turn = session.view, session.active.turn
        if turn is None:
            yield SKIP
            return
        async with aclosing(self.replies.follow(turn)) as frames:
            async for frame in frames:
                if session.view != view:
                    return
                yield _live(frame)

    # What needs no model

    async def undo(self, session: ChatSession) -> Update:
        """Take the last exchange back; what was asked returns to the composer."""
        conversation = session.active
        asked = max((i for i, m in enumerate(conversation.messages) if m.role == "user"), default=None)
        if asked is None or conversation.turn is not None:
            return NOTHING
        text = conversation.messages[asked].content
        del conversation.messages[asked:]
        return _show(session, composer=text)

    async def new(self, session: ChatSession) -> Update:
        """Begin a conversation; what another is writing goes on."""
        session.open_new()
        return _show(session)

    async def select(self, session: ChatSession, event: gr.EventData) -> Update:
        """Show a conversation."""
        session.select(str(event._data["id"]))
        return _show(session)

    async def delete(self, session: ChatSession, event: gr.EventData) -> Update:
        """Forget a conversation and stop what it is writing."""
        session.delete(str(event._data["id"]))
        return _show(session)

    async def clear(self, session: ChatSession) -> Update:
        """Begin the active conversation anew."""
        session.delete(session.active.id)
        session.open_new()
        return _show(session)

    async def refresh(self, session: ChatSession) -> Update:
        """Show what the tab has, when the page has loaded."""
        return _show(session)

    async def stop(self, session: ChatSession) -> None:
        """Stop the reply of the active conversation, wherever it is."""
        session.active.stop()

    async def wait_ready(self) -> AsyncIterator[str]:
        """Give words for how far the model is, until it is loaded."""
        async for words in self.replies.wait_ready():
            yield words

    @property
    def tags(self) -> list[list[str]]:
        """The model's reasoning tags, for the transcript."""
        return [list(pair) for pair in self.replies.tags.pairs]


def _ask(
    session: ChatSession,
    conversation: Conversation,
    before: list[Message],
    values: tuple[Any, ...],
    *,
    text: str = "",
    reply: Message | None = None,
) -> Update:
    """Ask for a reply at the end of a conversation, or for `reply` to go on; a refusal gives `text` back."""
    if reply is None:
        reply = Message("assistant", "")
        conversation.messages.append(reply)
    conversation.turn = Turn(reply, session.owner)
    session.asked.append(Asked(conversation, conversation.turn, ChatSettings(*values), before, text))
    return _show(session, composer="" if text else SKIP)


def _live(frame: Frame) -> dict[str, Any]:
    return {"state": frame.state, "status": frame.status, "message": frame.message}


def _notice(conversation: Conversation, words: str) -> dict[str, Any]:
    reply = conversation.last_reply
    return {"state": "refused", "status": words, "message": None if reply is None else reply.for_page()}


def _show(session: Session, composer: Any = SKIP, notice: str = "") -> Update:
    """Show the active conversation from its beginning; handlers that wrote for what was shown before fall silent."""
    session.view += 1
    conversation = session.active
    reply = conversation.last_reply
    past = [m.for_page() for m in conversation.messages if m is not reply]
    live = {
        "state": "refused" if notice else "waiting" if conversation.turn is not None else "idle",
        "status": notice,
        "message": None if reply is None else reply.for_page(),
    }
    return composer, {"conversation": conversation.id, "messages": past}, live, session.for_list()
