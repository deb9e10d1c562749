"""From a conversation to a reply: the request that is made, and the frames that a reader of it shows."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from streaming.conversations.tree import Message
from streaming.engine.base import GenerationRequest
from streaming.engine.menu_model import MenuModel
from streaming.events import FinishEvent
from streaming.server.runs import LiveReply, Runs
from streaming.ui.session import for_page
from streaming.ui.settings_panel import ChatSettings
from streaming.ui.status import describe_finish, describe_loading, describe_progress

READY_POLL_S = 0.2
"""How often a reply that waits for its model tells how far that has loaded."""
IDLE_FRAME_S = 0.5
"""How often a frame goes out when no token comes: Gradio finds out with it that a browser has gone."""

State = Literal["idle", "waiting", "reading", "writing", "done", "refused"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Frame:
    """One state of a reply on the page: the message so far, where it is, and that in words.

    `beat` counts the frames that tell nothing new, so that the page hears from the server all the same.
    """

    state: State
    status: str
    message: dict[str, Any]
    beat: int = 0

    @property
    def text(self) -> str:
        """The message's text so far."""
        return str(self.message["text"])


class Replies:
    """Makes requests of conversations, and reads replies for the page. Used from event loops only."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    async def write(self, reply: LiveReply) -> AsyncGenerator[Frame, None]:
        """Follow a reply that is for this reader alone: closing the iterator stops it.

        Raises:
            BrookError: the request was refused.
        """
        try:
            async with aclosing(self.follow(reply)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            reply.stop()

    async def follow(self, reply: LiveReply) -> AsyncGenerator[Frame, None]:
        """Read a reply from its beginning to its end, a frame for all that is new; any number of readers may.

        Raises:
            BrookError: the request was refused; nothing was written.
        """
        with reply.reading():
            page = for_page(reply.message)
            begun, done = _watch(reply.begun), _watch(reply.done)
            beat = 0
            while not reply.begun.done():
                yield Frame("waiting", describe_loading(reply.model.status()), dict(page), beat)
                beat += 1
                await asyncio.wait([begun], timeout=READY_POLL_S)
            generation = reply.begun.result()
            if generation is None:
                yield Frame("done", "Stopped before it began", for_page(await asyncio.shield(done)))
                return
            tags = self.runs.tags(reply.model)
            page["reasoning"] = self.runs.begins_in_reasoning(reply, generation)
            n_read, n_tokens, began_at, last_at = 0, 0, 0.0, 0.0
            while True:
                events = await generation.log.wait_async(n_read, IDLE_FRAME_S)
                beat += not events
                for event in events:
                    n_read += 1
                    if isinstance(event, FinishEvent):
                        reply.wake()
                        message = for_page(await asyncio.shield(done))
                        yield Frame("done", describe_finish(generation, event), message)
                        return
                    began_at, last_at = began_at or event.t_s, event.t_s
                    n_tokens += 1
                    page["text"] += tags.text_of(event.id, event.text)
                progress = generation.progress
                state: State = "waiting" if progress.state == "waiting" else "writing" if n_tokens else "reading"
                yield Frame(state, describe_progress(progress, n_tokens, last_at - began_at), dict(page), beat)

    def chat_request(
        self, path: Sequence[Message], reply: Message, settings: ChatSettings, model: MenuModel
    ) -> Callable[[], GenerationRequest]:
        """Give what builds the request to `model` for `reply`, after the messages of `path`, from where it stands."""

        def build() -> GenerationRequest:
            messages = [_for_model(message, model.model_id) for message in path]
            if settings.system_prompt.strip():
                messages.insert(0, {"role": "system", "content": settings.system_prompt})
            prefix_ids = _own_ids(reply, model.model_id)
            prefix_text = "" if prefix_ids else reply.content
            return GenerationRequest(
                messages=messages, prefix_ids=prefix_ids, prefix_text=prefix_text, **settings.for_request()
            )

        return build


def _for_model(message: Message, model: str) -> dict[str, Any]:
    given: dict[str, Any] = {"role": message.role, "content": message.content}
    ids = _own_ids(message, model)
    return given | {"token_ids": ids} if ids else given


def _own_ids(message: Message, model: str) -> tuple[int, ...]:
    """Give a message's token ids where they are this model's."""
    return message.token_ids if message.model == model else ()


def _watch(future: "Future[T]") -> "asyncio.Future[T]":
    """Give a future of another thread as this loop's; whether anyone reads it or not."""
    watched = asyncio.wrap_future(future)
    watched.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs it as forgotten
    return watched
