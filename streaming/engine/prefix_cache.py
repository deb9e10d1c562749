"""Keep what the model has read: the next request reuses the longest common beginning and reads only the rest.

An entry is a transformers `Cache` with the ids whose keys and values it holds. Entries belong to an owner and are never
used for another; what belongs to NOBODY, because nobody has written a word of it, is used for everyone. Not
thread-safe: the worker that owns the model owns its prefixes too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Cache

from streaming.models.kv_cache import copy_beginning

NOBODY = None
"""The owner of what every chat begins with."""


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: str | None
    ids: tuple[int, ...]
    cache: Cache
    n_bytes: int


class PrefixCache:
    """Prefixes within `max_bytes`, the least recently used leave first; 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the least recently used first

    @property
    def n_bytes(self) -> int:
        """Bytes that the kept prefixes take."""
        return sum(entry.n_bytes for entry in self._entries)

    def take(self, owner: str, ids: Sequence[int]) -> Cache | None:
        """Give a cache that holds the longest known beginning of `ids`, at most all but the last; it is the caller's.

        A prefix that the request continues whole is handed over; one from which it branches off, or that is nobody's,
        is copied, so that others can continue it too.
        """
        usable = [entry for entry in self._entries if entry.owner in (owner, NOBODY)]
        best = max(usable, key=lambda entry: (_common(entry.ids, ids), -entry.n_bytes), default=None)
        if best is None:
            return None
        n_best = min(_common(best.ids, ids), len(ids) - 1)  # the last token is read anew: its logits are wanted
        if n_best <= 0:
            return None
        self._entries.remove(best)
        if n_best == len(best.ids) and best.owner is not NOBODY:
            return best.cache
        self._entries.append(best)
        return copy_beginning(best.cache, n_best)

    def keep(self, owner: str | None, ids: Sequence[int], cache: Cache) -> None:
        """Store what a request leaves: `cache` holds the first `cache.get_seq_length()` of `ids`.

        Caches that cannot be cut back exactly (sliding windows, linear attention) are not kept.
        """
        if not can_be_cut(cache):
            return
        kept_ids = tuple(ids[: cache.get_seq_length()])
        n_bytes = _n_bytes(cache)
        if not kept_ids or n_bytes > self._max_bytes:
            return
        self._entries = [
            entry for entry in self._entries if entry.owner != owner or entry.ids != kept_ids[: len(entry.ids)]
        ]
        self._entries.append(_Entry(owner, kept_ids, cache, n_bytes))
        while self.n_bytes > self._max_bytes:
            del self._entries[0]

    def clear(self) -> None:
        """Let go of everything."""
        self._entries = []


def can_be_cut(cache: Cache) -> bool:
    """Whether `crop` leaves the cache as if the tokens had never been read, at any length.

    Source: transformers 5.23, `Cache.is_croppable`; sliding layers claim it too but forget what left the window.
    """
    return bool(cache.is_croppable) and not any(cache.is_sliding) and not any(cache.is_linear)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _n_bytes(cache: Cache) -> int:
    layers: list[Any] = cache.layers
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
