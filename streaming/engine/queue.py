"""Who is next: requests wait in a line for each owner, and owners take turns."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Generic, TypeVar

from streaming.errors import EngineBusy

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items that wait, and items that are served.

    Owners take turns: whoever has had one goes behind everyone else who waits, and each one's own items keep their
    order. At most `max_active` items of one person, who may be several owners, may be here at a time, waiting or
    served, and at most `max_queued` of all may wait; 0 is no limit. Not thread-safe: its engine holds a lock around
    every call.
    """

    def __init__(self, max_active: int = 0, max_queued: int = 0) -> None:
        self._max_active = max_active
        self._max_queued = max_queued
        self._lines: dict[str, list[T]] = {}  # whose turn is next comes first; nobody's line is empty
        self._served: list[T] = []
        self._persons: list[tuple[str, T]] = []  # whose each one is that waits or is served

    def __iter__(self) -> Iterator[T]:
        """Give the waiting items in the order in which they will be served if none comes or goes."""
        for turn in zip_longest(*self._lines.values()):
            yield from (item for item in turn if item is not None)

    @property
    def n_waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._lines.values()))

    @property
    def served(self) -> list[T]:
        """The items that were taken and not yet released."""
        return list(self._served)

    def add(self, item: T, owner: str, person: str = "") -> None:
        """Put an item at the end of its owner's line; the owner is a person unless another is named.

        Raises:
            EngineBusy: a limit is reached.
        """
        n_own = sum((person or owner) == one for one, _ in self._persons)
        if self._max_active and n_own >= self._max_active:
            raise EngineBusy(
                f"You already have as many requests on their way as one person may ({self._max_active}); "
                "wait for one to end, then send this again."
            )
        if self._max_queued and self.n_waiting >= self._max_queued:
            raise EngineBusy(f"As many requests are waiting as may ({self._max_queued}); try again in a minute.")
        self._lines.setdefault(owner, []).append(item)
        self._persons.append((person or owner, item))

    def take(self) -> T | None:
        """Give the next item to serve, or None when nobody waits."""
        if not self._lines:
            return None
        owner = next(iter(self._lines))
        line = self._lines.pop(owner)
        item = line.pop(0)
        if line:
            self._lines[owner] = line
        self._served.append(item)
        return item

    def release(self, item: T) -> None:
        """Take note that a served item has ended."""
        self._served = [one for one in self._served if one is not item]
        self._leave(item)

    def remove(self, item: T) -> bool:
        """Take an item out that waits; say whether it did."""
        for owner, line in self._lines.items():
            if any(one is item for one in line):
                self._lines[owner] = [one for one in line if one is not item]
                if not self._lines[owner]:
                    del self._lines[owner]
                self._leave(item)
                return True
        return False

    def clear(self) -> list[T]:
        """Take out all that wait, and give them."""
        waiting = list(self)
        self._lines = {}
        for item in waiting:
            self._leave(item)
        return waiting

    def _leave(self, item: T) -> None:
        self._persons = [(person, one) for person, one in self._persons if one is not item]
