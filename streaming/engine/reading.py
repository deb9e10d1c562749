"""What the model has read for earlier requests, and what it reads unasked.

That is what every chat begins with, and what will stand between a reply and the next message. Used by the worker alone,
but for `n_bytes`.
"""

import logging
from collections import deque
from collections.abc import Callable
from threading import Lock

import psutil
from transformers import Cache

from streaming.chat import encode_opening
from streaming.engine.generate import PREFILL_CHUNK_TOKENS, has_stopped, new_cache, read, reads_with_step
from streaming.engine.prefix_cache import NOBODY, PrefixCache
from streaming.engine.run import Run
from streaming.models.loading import LoadedModel

logger = logging.getLogger(__name__)

MAX_CACHE_BYTES = 2 * 2**30
"""The most memory that kept prefixes take, however much is free."""
N_READ_AHEAD = 16
"""Of how many chats that have ended the next turn is prepared when nobody waits."""
MAX_AHEAD_TOKENS = 64
"""Whoever asks in the meantime waits for it: a template that rewrites replies is left to the next turn."""
MIN_OPENING_TOKENS = 16
"""What all chats begin with is kept for all from this length on: less is read about as fast as it is copied."""


class Reading:
    """What one model has read, within `max_bytes` (None: a quarter of the free memory, at most MAX_CACHE_BYTES).

    `encoding` is held while the model's tokenizer encodes.
    """

    def __init__(self, max_bytes: int | None, encoding: Lock) -> None:
        if max_bytes is None:
            max_bytes = min(psutil.virtual_memory().available // 4, MAX_CACHE_BYTES)
        self.prefixes = PrefixCache(max_bytes)
        self._encoding = encoding
        self._knows_opening = False
        self._ended: deque[Run] = deque(maxlen=N_READ_AHEAD)  # chats whose next turn can be prepared

    @property
    def n_bytes(self) -> int:
        """Bytes that the kept prefixes take."""
        return self.prefixes.n_bytes

    def open_cache(self, run: Run, loaded: LoadedModel) -> Cache:
        """Give a run the cache that it goes on with: of its owner's earlier requests, of the opening, or a new one."""
        generation, request = run.generation, run.generation.request
        cache = self.prefixes.take(request.owner, generation.prompt_ids)
        if cache is None and request.messages and request.messages[0]["role"] != "system" and not self._knows_opening:
            self._read_opening(loaded)
            cache = self.prefixes.take(request.owner, generation.prompt_ids)
        if cache is None:
            cache = new_cache(loaded)
        run.cache = cache
        run.n_reused_tokens = cache.get_seq_length()
        return cache

    def keep(self, run: Run, cache: Cache, loaded: LoadedModel) -> None:
        """Keep what was read for a run that has ended."""
        generation = run.generation
        self.prefixes.keep(generation.request.owner, [*generation.prompt_ids, *run.token_ids], cache)
        if run.token_ids and generation.request.messages and reads_with_step(loaded):
            self._ended.append(run)

    def go_ahead(self, loaded: LoadedModel, is_idle: Callable[[], bool]) -> None:
        """Prepare the next turns of the chats that ended last, until someone asks for something."""
        while self._ended and is_idle():
            try:
                self._read_ahead(self._ended.pop(), loaded)
            except Exception:
                logger.exception("The next turn of a chat could not be prepared; it reads a little more instead")

    def clear(self) -> None:
        """Let go of everything."""
        self.prefixes.clear()
        self._ended.clear()

    def _read_opening(self, loaded: LoadedModel) -> None:
        """Read what every chat begins with and keep it for everyone, where it is more than a few tokens."""
        self._knows_opening = True
        with self._encoding:
            ids = encode_opening(loaded.tokenizer, (), loaded.n_context)[:PREFILL_CHUNK_TOKENS]
        if len(ids) >= MIN_OPENING_TOKENS:
            cache = new_cache(loaded)
            read(ids, cache, loaded)
            self.prefixes.keep(NOBODY, ids, cache)

    def _read_ahead(self, run: Run, loaded: LoadedModel) -> None:
        """Read what will stand between a reply and the next message, which need not wait for it then."""
        request = run.generation.request
        reply = [*request.prefix_ids, *run.token_ids]
        if has_stopped(run, loaded):
            del reply[-1]  # the template ends a reply in its own way
        said = {"role": "assistant", "content": loaded.tokenizer.decode(reply), "token_ids": reply}
        with self._encoding:
            ids = encode_opening(loaded.tokenizer, [*(request.messages or ()), said], loaded.n_context)
        cache = self.prefixes.take(request.owner, ids)
        if cache is None:
            return
        unread = ids[cache.get_seq_length() :]
        if len(unread) <= MAX_AHEAD_TOKENS:
            read(unread, cache, loaded)
        self.prefixes.keep(request.owner, ids, cache)
