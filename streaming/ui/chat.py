"""The chat's handlers: each yields what changes on the page, from a click to the last token."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from streaming.engine.base import Engine, GenerationRequest
from streaming.errors import BrookError
from streaming.ui.replies import Frame, Replies
from streaming.ui.session import Conversation, Message, Session, Turn
from streaming.ui.settings_panel import Settings

# What a handler changes, in the order of `ChatHandlers.outputs`: composer, past, live, conversations, seed.
Update = tuple[Any, Any, Any, Any, Any]
Updates = AsyncGenerator[Update, None]
SKIP = gr.skip()


def update(
    composer: Any = SKIP, past: Any = SKIP, live: Any = SKIP, conversations: Any = SKIP, seed: Any = SKIP
) -> Update:
    """Name what changes; the rest of the page stays as it is."""
    return composer, past, live, conversations, seed


class ChatHandlers:
    """What happens when people send, stop, edit, retry, continue, undo and switch.

    The transcript is in two parts: `past` changes between replies, `live` is the last reply and all that is sent
    while it is written. Gradio walks and compares an output's whole value at every yield, so this keeps the pace of
    a long conversation that of an empty one.
    """

    def __init__(self, engine: Engine) -> None:
        self._replies = Replies(engine)

    async def send(self, session: Session, text: str, *values: Any) -> Updates:
        """Put a message at the end of the active conversation and stream the reply."""
        conversation = session.active
        if not text.strip():
            yield update()
            return
        if conversation.turn is not None:
            yield update(composer=text, live=_notice(session, "A reply is being written; stop it first."))
            return
        before = list(conversation.messages)
        conversation.messages.append(Message("user", text))
        async with aclosing(self._ask(session, conversation, before, text, values)) as frames:
            async for frame in frames:
                yield frame

    async def send_example(self, session: Session, event: gr.EventData, *values: Any) -> Updates:
        """Send the example that was clicked."""
        async with aclosing(self.send(session, str(event._data["text"]), *values)) as frames:
            async for frame in frames:
                yield frame

    async def edit(self, session: Session, event: gr.EventData, *values: Any) -> Updates:
        """Change a message. A person's is asked again, and what came after it goes; a reply just reads as edited."""
        conversation, text = session.active, str(event._data["text"])
        index = conversation.index(str(event._data["id"]))
        if index is None or conversation.turn is not None or not text.strip():
            yield update()
            return
        before, message = list(conversation.messages), conversation.messages[index]
        if message.role == "assistant":
            edited = Message("assistant", text, id=message.id, in_reasoning=message.in_reasoning, can_continue=True)
            conversation.messages[index] = edited
            yield _show(session)
            return
        conversation.messages[index:] = [Message("user", text)]
        async with aclosing(self._ask(session, conversation, before, text, values)) as frames:
            async for frame in frames:
                yield frame

    async def retry(self, session: Session, event: gr.EventData, *values: Any) -> Updates:
        """Write the last reply again."""
        conversation = session.active
        if conversation.turn is not None or conversation.last_reply is None:
            yield update()
            return
        before = list(conversation.messages)
        conversation.messages.pop()
        async with aclosing(self._ask(session, conversation, before, "", values)) as frames:
            async for frame in frames:
                yield frame

    async def resume(self, session: Session, event: gr.EventData, *values: Any) -> Updates:
        """Go on with the last reply where it stopped."""
        conversation = session.active
        reply = conversation.last_reply
        if conversation.turn is not None or reply is None:
            yield update()
            return
        before = list(conversation.messages)
        async with aclosing(self._ask(session, conversation, before, "", values, reply)) as frames:
            async for frame in frames:
                yield frame

    async def undo(self, session: Session) -> Update:
        """Take the last exchange back; what was asked returns to the composer."""
        conversation = session.active
        if conversation.turn is not None:
            return update()
        asked = max((i for i, m in enumerate(conversation.messages) if m.role == "user"), default=None)
        if asked is None:
            return update()
        text = conversation.messages[asked].content
        del conversation.messages[asked:]
        return _show(session, composer=text)

    async def new(self, session: Session) -> Update:
        """Begin a conversation; what another is writing goes on."""
        session.open_new()
        return _show(session)

    async def select(self, session: Session, event: gr.EventData) -> Updates:
        """Show a conversation, and follow its reply if it is still being written."""
        conversation = session.select(str(event._data["id"]))
        yield _show(session)
        view, turn = session.view, conversation.turn
        if turn is None:
            return
        async with aclosing(self._replies.follow(turn)) as frames:
            async for frame in frames:
                if session.view != view:
                    return
                yield update(live=_live(frame))
        yield update(conversations=session.for_list())

    async def delete(self, session: Session, event: gr.EventData) -> Updates:
        """Forget a conversation and stop what it is writing."""
        session.delete(str(event._data["id"]))
        event._data["id"] = session.active.id
        async with aclosing(self.select(session, event)) as frames:
            async for frame in frames:
                yield frame

    async def clear(self, session: Session) -> Update:
        """Begin the active conversation anew."""
        session.delete(session.active.id)
        session.open_new()
        return _show(session)

    async def stop(self, session: Session) -> None:
        """Stop the reply of the active conversation, wherever it is."""
        session.active.stop()

    async def refresh(self, session: Session) -> Update:
        """Show what the tab has, when the page has loaded."""
        return _show(session)

    async def wait_ready(self) -> AsyncIterator[str]:
        """Give words for how far the model is, until it is loaded."""
        async for words in self._replies.wait_ready():
            yield words

    @property
    def tags(self) -> list[list[str]]:
        """The model's reasoning tags, for the transcript."""
        return [list(pair) for pair in self._replies.tags.pairs]

    async def _ask(
        self,
        session: Session,
        conversation: Conversation,
        before: list[Message],
        text: str,
        values: tuple[Any, ...],
        reply: Message | None = None,
    ) -> Updates:
        """Stream a reply to the end of a conversation; when it is refused, all is as `before` and `text` comes back.

        `reply` is one to go on with. When the tab shows something else meanwhile, the reply is written all the same.
        """
        if reply is None:
            reply = Message("assistant", "")
            conversation.messages.append(reply)
        turn = conversation.turn = Turn(reply)
        yield _show(session, composer="" if text else SKIP)
        view = session.view

        def build_request() -> GenerationRequest:
            return self._replies.chat_request(conversation, reply, Settings(*values))

        try:
            async with aclosing(self._replies.write(turn, build_request)) as frames:
                async for frame in frames:
                    done = frame.state == "done"
                    if done:
                        conversation.turn = None
                    if session.view != view:
                        yield update()
                    elif done and frame.seed is not None:
                        yield update(live=_live(frame), seed=gr.update(info=f"0 is fresh · last used {frame.seed}"))
                    else:
                        yield update(live=_live(frame))
            yield update(conversations=session.for_list())
        except BrookError as error:
            conversation.turn = None
            conversation.messages[:] = before
            if session.active is conversation:
                yield _show(session, composer=text or SKIP, notice=str(error))
        finally:
            conversation.turn = None


def _live(frame: Frame) -> dict[str, Any]:
    return {"state": frame.state, "status": frame.status, "message": frame.message}


def _notice(session: Session, words: str) -> dict[str, Any]:
    reply = session.active.last_reply
    return {"state": "refused", "status": words, "message": None if reply is None else reply.for_page()}


def _show(session: Session, composer: Any = SKIP, notice: str = "") -> Update:
    """Show the active conversation from its beginning; handlers that wrote for what was shown before fall silent."""
    session.view += 1
    conversation = session.active
    reply = conversation.last_reply
    past = [m.for_page() for m in conversation.messages if m is not reply]
    busy = conversation.turn is not None
    live = {
        "state": "refused" if notice else "waiting" if busy else "idle",
        "status": notice,
        "message": None if reply is None else reply.for_page(),
    }
    return update(composer, {"conversation": conversation.id, "messages": past}, live, session.for_list())


def bind(
    listen: Callable[..., Any],
    handler: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    validator: Callable[..., Any] | None = None,
) -> None:
    """Listen to an event with a handler that streams to the page; users and conversations never wait for another."""
    listen(
        handler,
        inputs,
        outputs,
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="multiple",
        api_visibility="private",
        validator=validator,
    )
