"""Who is next: requests wait in a line for each owner, and owners take turns."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Generic, TypeVar

from streaming.errors import EngineBusy

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items that wait, and items that are served.

    Owners take turns: whoever has had one goes behind everyone else who waits, and each one's own items keep their
    order. `n_seats` may be served at a time, and nobody takes more than half of the seats, so that whoever comes next
    finds one. At most `max_active` items of one person, who may be several owners, may be here at a time, waiting or
    served, and at most `max_queued` of all may wait. 0 is no limit. Not thread-safe: its engine holds a lock around
    every call.
    """

    def __init__(self, max_active: int = 0, max_queued: int = 0, *, n_seats: int = 0) -> None:
        self._n_seats = n_seats
        self._max_active = max_active
        self._max_queued = max_queued
        self._lines: dict[str, list[T]] = {}  # whose turn is next comes first; nobody's line is empty
        self._served: list[tuple[str, T]] = []  # with the owner
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
        return [item for _, item in self._served]

    @property
    def can_take(self) -> bool:
        """Whether someone who waits may be served now."""
        return self._next_owner() is not None

    def add(self, item: T, owner: str, person: str = "") -> None:
        """Put an item at the end of its owner's line; raises what `require_room` does."""
        self.require_room(owner, person)
        self._lines.setdefault(owner, []).append(item)
        self._persons.append((person or owner, item))

    def require_room(self, owner: str, person: str = "") -> None:
        """Raise EngineBusy where one more item would be more than a limit allows; "" as person is the owner."""
        n_own = sum((person or owner) == one for one, _ in self._persons)
        if self._max_active and n_own >= self._max_active:
            raise EngineBusy(
                f"You already have as many requests on their way as one person may ({self._max_active}); "
                "wait for one to end, then send this again."
            )
        if self._max_queued and self.n_waiting >= self._max_queued:
            raise EngineBusy(f"As many requests are waiting as may ({self._max_queued}); try again in a minute.")

    def take(self) -> T | None:
        """Give the next item to serve, or None when nobody waits who may have a seat."""
        owner = self._next_owner()
        if owner is None:
            return None
        line = self._lines.pop(owner)
        item = line.pop(0)
        if line:
            self._lines[owner] = line
        self._served.append((owner, item))
        return item

    def release(self, item: T) -> None:
        """Take note that a served item has ended."""
        self._served = [(owner, one) for owner, one in self._served if one is not item]
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

    def _next_owner(self) -> str | None:
        if self._n_seats and len(self._served) >= self._n_seats:
            return None
        most = max(1, self._n_seats // 2) if self._n_seats else math.inf
        return next((owner for owner in self._lines if self._n_seats_of(owner) < most), None)

    def _n_seats_of(self, owner: str) -> int:
        return sum(owner == one for one, _ in self._served)

    def _leave(self, item: T) -> None:
        self._persons = [(person, one) for person, one in self._persons if one is not item]
