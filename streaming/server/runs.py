"""The replies that are being written: whoever may reads along, nobody's leaving takes a reply with it.

A reply belongs to no tab and no request. A thread of its own asks the engine, keeps what is there in the store every
half second, and ends it: as the model does, when anyone stops it, or when nobody has watched for the grace time.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from streaming.conversations.store import Store
from streaming.conversations.tree import Message, Reason, new_id
from streaming.engine.base import Engine, Generation, GenerationRequest
from streaming.engine.menu import ModelMenu
from streaming.engine.menu_model import MenuModel
from streaming.errors import BrookError, GenerationFailed
from streaming.events import TokenEvent
from streaming.reasoning import ReasoningTags, begins_in_reasoning, find_tags

logger = logging.getLogger(__name__)

CHECKPOINT_S = 0.5
CHECKPOINT_TOKENS = 64
"""A running reply is kept whenever so much is new. A killed server loses no more."""
POLL_S = 0.1
"""How often a reply's thread looks at its log. It does not wait on it: waking at every token would slow decoding."""
CLOSE_S = 3.0
"""How long `Runs.close()` waits for replies to end."""
FIRST_READER_S = 10.0
"""How long a reply waits for its first reader, if the grace time is shorter: a page asks, and reads once it knows."""
_N_HELD_TOKENS = 8
"""How many of the last tokens may say more than was shown: bytes of a character, the beginning of a stop string."""


class LiveReply:
    """A reply on its way: asked for, perhaps not yet submitted, perhaps being written. Safe to use from any thread.

    `message` is how it stood before, `model` what writes it, `begun` its generation once the engine has it (None where
    it was stopped before), `done` the message as it ended; both raise the BrookError with which a request is refused.
    """

    def __init__(
        self, message: Message, model: MenuModel, owner: str, conversation_id: str | None, grace_s: float
    ) -> None:
        self.message = message
        self.model = model
        self.owner = owner
        self.conversation_id = conversation_id
        self.begun: Future[Generation | None] = Future()
        self.done: Future[Message] = Future()
        self.stop_reason: Reason | None = None
        self._grace_s = grace_s
        self._patience_s = max(grace_s, FIRST_READER_S)
        self._n_readers = 0
        self._unwatched_since = time.monotonic()
        self._lock = threading.Lock()
        self._wake = threading.Event()

    @property
    def generation(self) -> Generation | None:
        """What writes it, once the engine has taken it."""
        return self.begun.result() if self.begun.done() and self.begun.exception() is None else None

    def stop(self, reason: Reason = "cancelled") -> None:
        """End the reply here, for every reader; also before it was submitted."""
        with self._lock:
            self.stop_reason = self.stop_reason or reason
            generation = self.generation
        if generation is not None:
            generation.cancel()
        self.wake()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count as a reader: as long as there is one, the reply goes on."""
        with self._lock:
            self._n_readers += 1
            self._patience_s = self._grace_s
        try:
            yield
        finally:
            with self._lock:
                self._n_readers -= 1
                self._unwatched_since = time.monotonic()

    def wake(self) -> None:
        """Have the thread look at the log now, as when a reader has seen its end."""
        self._wake.set()

    # For its thread

    def begin(self, generation: Generation | None) -> None:
        """Take the generation, and stop it where the reply was stopped meanwhile."""
        with self._lock:
            self.begun.set_result(generation)
        if self.stop_reason is not None and generation is not None:
            generation.cancel()

    def wait(self) -> None:
        """Wait a moment, and stop the reply where nobody has watched it for the grace time."""
        if self._wake.wait(POLL_S):
            self._wake.clear()
        self.check_watched()

    def check_watched(self) -> None:
        """Stop the reply where nobody has watched it for the grace time."""
        with self._lock:
            is_deserted = not self._n_readers and time.monotonic() - self._unwatched_since > self._patience_s
        if is_deserted:
            self.stop("abandoned")


class Runs:
    """Writes replies with an engine's models, and keeps them in a store. Every method may be called from any thread.

    `menu` has the engine's models, where it is not the engine of one. After the last reader has left, a reply goes on
    for `grace_s` seconds; then it is stopped, and what is there kept.
    """

    def __init__(
        self, engine: Engine, store: Store | None = None, grace_s: float = 60.0, menu: ModelMenu | None = None
    ) -> None:
        self.engine = engine
        self.menu = ModelMenu.of(engine) if menu is None else menu
        self.store = Store() if store is None else store
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._threads: dict[LiveReply, threading.Thread] = {}
        self._tags: dict[str, ReasoningTags] = {}

    def tags(self, model: MenuModel) -> ReasoningTags:
        """Give a model's reasoning tags, which are known once it was loaded."""
        if model.name not in self._tags:
            self._tags[model.name] = find_tags(model.tokenizer)
        return self._tags[model.name]

    def start(
        self,
        message: Message,
        build_request: Callable[[], GenerationRequest],
        *,
        model: str = "",
        owner: str = "",
        conversation_id: str | None = None,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> LiveReply:
        """Write on at the end of `message`, with a request that is built once the model is there; "" is the first one.

        It is kept under `conversation_id`, where it must be already; None keeps it nowhere. Without an owner it has
        one of its own. `on_refusal` is called, in the reply's thread, when the engine refuses the request.
        """
        reply = LiveReply(message, self.menu.find(model), owner or new_id(), conversation_id, self._grace_s)
        thread = threading.Thread(
            target=self._write, args=(reply, build_request, on_refusal), name="brook-reply", daemon=True
        )
        with self._lock:
            self._threads[reply] = thread
        thread.start()
        return reply

    def of(self, owner: str, conversation_id: str) -> LiveReply | None:
        """Give the reply that is being written in a conversation of `owner`."""
        return next((reply for reply in self.of_owner(owner) if reply.conversation_id == conversation_id), None)

    def of_owner(self, owner: str) -> list[LiveReply]:
        """Give the replies that are being written in conversations of `owner`, in the order they were asked for."""
        with self._lock:
            return [reply for reply in self._threads if reply.owner == owner and reply.conversation_id is not None]

    def grown(self, reply: LiveReply) -> Message:
        """Give a reply with what the log holds now."""
        generation = reply.generation
        if generation is None:
            return dataclasses.replace(reply.message, reason=reply.stop_reason)
        finish, tags = generation.log.finish, self.tags(reply.model)
        events = [event for event in generation.log.snapshot() if isinstance(event, TokenEvent)]
        ids = [*generation.request.prefix_ids, *(event.id for event in events)]
        stats = {} if finish is None else finish.to_dict()
        return dataclasses.replace(
            reply.message,
            content=reply.message.content + "".join(tags.text_of(event.id, event.text) for event in events),
            token_ids=_exact_ids(
                reply.model.tokenizer, ids, generation.prefix_text + "".join(event.text for event in events)
            ),
            in_reasoning=self.begins_in_reasoning(reply, generation),
            reason=reply.stop_reason if finish is not None and finish.reason == "cancelled" else stats.get("reason"),
            error=stats.get("error"),
            model=reply.model.model_id,
            seed=generation.seed,
            stats={name: value for name, value in stats.items() if name not in ("type", "reason", "error")},
        )

    def close(self) -> None:
        """Stop every reply and keep what is there, marked as interrupted."""
        deadline = time.monotonic() + CLOSE_S
        with self._lock:
            threads = dict(self._threads)
        for reply in threads:
            reply.stop("interrupted")
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    # A reply's thread

    def _write(
        self, reply: LiveReply, build_request: Callable[[], GenerationRequest], on_refusal: Callable[[], None]
    ) -> None:
        refusal: BrookError | None = None
        try:
            self._generate(reply, build_request)
        except BrookError as error:
            refusal = error
        except Exception as error:
            logger.exception("A reply could not be written")
            refusal = GenerationFailed(f"The reply could not be written ({type(error).__name__}); try again.")
        if refusal is not None:
            on_refusal()
        with self._lock:
            del self._threads[reply]
        if refusal is None:
            reply.done.set_result(self.grown(reply))
            return
        if not reply.begun.done():
            reply.begun.set_exception(refusal)
        reply.done.set_exception(refusal)

    def _generate(self, reply: LiveReply, build_request: Callable[[], GenerationRequest]) -> None:
        while reply.stop_reason is None and not reply.model.wait_ready(POLL_S):
            reply.check_watched()
        generation = None
        if reply.stop_reason is None:
            request = dataclasses.replace(build_request(), owner=reply.owner, model=reply.model.name)
            generation = self.engine.submit(request)
        reply.begin(generation)
        n_kept, kept_at = 0, time.monotonic()
        while generation is not None and generation.finish is None:
            reply.wait()
            n_new, now = len(generation.log) - n_kept, time.monotonic()
            if n_new and (n_new >= CHECKPOINT_TOKENS or now - kept_at >= CHECKPOINT_S):
                self._keep(reply)
                n_kept, kept_at = n_kept + n_new, now
        self._keep(reply)

    def _keep(self, reply: LiveReply) -> None:
        if reply.conversation_id is None:
            return
        try:
            self.store.update(reply.conversation_id, self.grown(reply))
        except Exception:  # a reply is written to its end, kept or not
            logger.exception("A reply could not be kept")

    def begins_in_reasoning(self, reply: LiveReply, generation: Generation) -> bool:
        """Whether a reply begins inside a reasoning block."""
        n_opened = len(generation.prompt_ids) - len(generation.request.prefix_ids)
        model = reply.model
        return begins_in_reasoning(model.tokenizer, generation.prompt_ids[:n_opened], self.tags(model))


def _exact_ids(tokenizer: Any, ids: list[int], shown: str) -> tuple[int, ...]:
    """Give the longest beginning of the ids that says what was shown and no more; none where there is none."""
    if tokenizer is None:
        return ()
    for n in range(len(ids), max(0, len(ids) - _N_HELD_TOKENS), -1):
        if ids[n - 1] in tokenizer.all_special_ids:
            continue
        if tokenizer.decode(ids[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False) == shown:
            return tuple(ids[:n])
    return ()
