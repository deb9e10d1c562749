"""From a conversation to a reply: the request that is made, the log that is followed, the message that stays."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from streaming.engine.base import Engine, Generation, GenerationRequest
from streaming.events import FinishEvent, TokenEvent
from streaming.ui.reasoning import ReasoningTags, begins_in_reasoning, find_tags
from streaming.ui.session import Conversation, Message, Turn
from streaming.ui.settings_panel import ChatSettings
from streaming.ui.status import describe_finish, describe_loading, describe_progress

READY_POLL_S = 0.2
"""How often the page is told how far the model has loaded, and a Stop is looked for meanwhile."""
IDLE_FRAME_S = 0.5
"""How often a frame goes out when no token comes: Gradio finds out with it that a browser has gone."""

State = Literal["idle", "waiting", "reading", "writing", "done", "refused"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One state of a reply on the page: the message so far, where it is, and that in words."""

    state: State
    status: str
    message: dict[str, Any]

    @property
    def text(self) -> str:
        """The message's text so far."""
        return str(self.message["text"])


class Replies:
    """Asks an engine for replies and writes them into conversations. Used from the event loop only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @cached_property
    def tags(self) -> ReasoningTags:
        """The model's reasoning tags; known once it is loaded."""
        return find_tags(self._engine.tokenizer)

    async def wait_ready(self, turn: Turn | None = None) -> AsyncIterator[str]:
        """Give words for how far the model is until it is loaded, or `turn` is stopped.

        Raises:
            ModelUnavailable: it could not be loaded.
        """
        while not (turn and turn.stopped) and not await asyncio.to_thread(self._engine.wait_ready, READY_POLL_S):
            yield describe_loading(self._engine.status())

    async def write(self, turn: Turn, build_request: Callable[[], GenerationRequest]) -> AsyncGenerator[Frame, None]:
        """Write `turn.reply` with a request that is built once the model is there; a frame for all that is new.

        Closing the iterator stops the reply; what was written stays.

        Raises:
            BrookError: the request was refused; nothing was written.
        """
        try:
            async for words in self.wait_ready(turn):
                yield Frame("waiting", words, turn.reply.for_page())
            if not turn.stopped:

                def submit() -> None:
                    turn.begin(self._engine.submit(dataclasses.replace(build_request(), owner=turn.owner)))

                await asyncio.to_thread(submit)
                self._begin(turn)
            async with aclosing(self.follow(turn)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            turn.stop()
            if turn.run is not None:
                self._settle(turn, turn.run)

    async def follow(self, turn: Turn) -> AsyncGenerator[Frame, None]:
        """Read a turn's log from its beginning to its end; any number of readers may."""
        while turn.run is None:
            if turn.stopped:
                yield Frame("done", "Stopped before it began", turn.reply.for_page())
                return
            yield Frame("waiting", describe_loading(self._engine.status()), turn.reply.for_page())
            await asyncio.sleep(READY_POLL_S)
        run, page = turn.run, turn.reply.for_page() | {"text": turn.begins_with}
        n_read, n_tokens, began_at, last_at = 0, 0, 0.0, 0.0
        while True:
            for event in await run.log.wait_async(n_read, IDLE_FRAME_S):
                n_read += 1
                if isinstance(event, FinishEvent):
                    self._settle(turn, run)
                    yield Frame("done", describe_finish(run, event), turn.reply.for_page())
                    return
                began_at, last_at = began_at or event.t_s, event.t_s
                n_tokens += 1
                page["text"] += self.tags.text_of(event.id, event.text)
            progress = run.progress
            state: State = "waiting" if progress.state == "waiting" else "writing" if n_tokens else "reading"
            yield Frame(state, describe_progress(progress, n_tokens, last_at - began_at), dict(page))

    def chat_request(self, conversation: Conversation, reply: Message, settings: ChatSettings) -> GenerationRequest:
        """Build the request for a conversation's last message, `reply`, from where that stands."""
        prefix_text = "" if reply.token_ids else reply.content
        messages = [m.for_model() for m in conversation.messages if m is not reply]
        if settings.system_prompt.strip():
            messages.insert(0, {"role": "system", "content": settings.system_prompt})
        return GenerationRequest(
            messages=messages, prefix_ids=reply.token_ids, prefix_text=prefix_text, **settings.for_request()
        )

    def _begin(self, turn: Turn) -> None:
        reply = turn.reply
        reply.error, reply.can_continue = None, False
        if turn.run is not None:
            n_opened = len(turn.run.prompt_ids) - len(turn.run.request.prefix_ids)
            opened_ids = turn.run.prompt_ids[:n_opened]
            reply.in_reasoning = begins_in_reasoning(self._engine.tokenizer, opened_ids, self.tags)

    def _settle(self, turn: Turn, run: Generation) -> None:
        """Write what the log holds into the message. Safe to do again."""
        reply, finish = turn.reply, run.log.finish
        events = [event for event in run.log.snapshot() if isinstance(event, TokenEvent)]
        reply.content = turn.begins_with + "".join(self.tags.text_of(event.id, event.text) for event in events)
        reply.token_ids = self._exact_ids(run, [event.id for event in events])
        reply.error = finish.error if finish is not None else None
        reply.can_continue = finish is None or finish.reason in ("length", "cancelled")

    def _exact_ids(self, run: Generation, new_ids: list[int]) -> tuple[int, ...]:
        """Give the reply's ids without the end-of-turn token, or none where they say more than was shown."""
        tokenizer = self._engine.tokenizer
        ids = [*run.request.prefix_ids, *new_ids]
        if tokenizer is None or not ids:
            return ()
        if ids[-1] in tokenizer.all_special_ids:
            ids.pop()
        shown = run.prefix_text + run.log.text()
        same = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == shown
        return tuple(ids) if same else ()
