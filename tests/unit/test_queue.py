"""The order of the queue, and its limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.engine.queue import FairQueue
from streaming.errors import EngineBusy


def filled(*names: str, **limits: int) -> FairQueue[str]:
    """A queue of items such as `ann1`, added in this order, each of the person it is named for."""
    queue: FairQueue[str] = FairQueue(**limits)
    for name in names:
        queue.add(name, name.rstrip("0123456789"))
    return queue


def drain(queue: FairQueue[str]) -> list[str]:
    return list(iter(queue.take, None))


def test_people_take_turns_and_each_ones_items_keep_their_order():
    queue = filled("ann1", "ann2", "ann3", "bob1", "cat1", "cat2")
    assert list(queue) == ["ann1", "bob1", "cat1", "ann2", "cat2", "ann3"]
    assert drain(queue) == ["ann1", "bob1", "cat1", "ann2", "cat2", "ann3"]


def test_whoever_had_a_turn_goes_behind_everyone_who_waits():
    queue = filled("ann1", "ann2")
    assert queue.take() == "ann1"
    for name in ("bob1", "cat1"):
        queue.add(name, name[:-1])
    assert queue.take() == "ann2"  # ann's line was there first
    queue.add("ann3", "ann")
    assert drain(queue) == ["bob1", "cat1", "ann3"]


def test_one_person_without_a_name_is_served_in_order():
    assert drain(filled("1", "2", "3")) == ["1", "2", "3"]


def test_what_is_removed_was_waiting_and_is_gone():
    queue = filled("ann1", "bob1", "bob2")
    assert queue.take() == "ann1"
    assert [queue.remove(name) for name in ("bob1", "bob1", "ann1")] == [True, False, False]
    assert (list(queue), queue.served, queue.n_waiting) == (["bob2"], ["ann1"], 1)
    queue.release("ann1")
    assert (queue.clear(), queue.served, queue.n_waiting, queue.take()) == (["bob2"], [], 0, None)


def test_nobody_takes_more_than_half_of_the_seats():
    queue = filled("ann1", "ann2", "ann3", "ann4", "ann5", n_seats=7)
    assert drain(queue) == ["ann1", "ann2", "ann3"]
    assert (queue.can_take, queue.n_waiting) == (False, 2)
    for name in ("bob1", "bob2", "cat1", "dan1", "eve1"):
        queue.add(name, name[:-1])
    assert drain(queue) == ["bob1", "cat1", "dan1", "eve1"]  # ann waits for one of hers, bob for any
    queue.release("cat1")
    assert drain(queue) == ["bob2"]
    assert not queue.can_take
    queue.release("ann2")
    assert drain(queue) == ["ann4"]
    queue.release("dan1")
    assert (queue.can_take, list(queue)) == (False, ["ann5"])


def test_the_only_seat_is_anybodys():
    queue = filled("ann1", "ann2", n_seats=1)
    assert (queue.take(), queue.take()) == ("ann1", None)
    queue.release("ann1")
    assert queue.take() == "ann2"


def test_one_person_has_so_many_at_a_time_waiting_or_served():
    queue = filled("ann1", "ann2", max_active=2)
    assert queue.take() == "ann1"
    with pytest.raises(EngineBusy, match=r"as one person may \(2\); wait for one to end, then send this again\.$"):
        queue.add("ann3", "ann")
    queue.add("bob1", "bob")
    queue.release("ann1")
    queue.add("ann3", "ann")
    assert list(queue) == ["ann2", "bob1", "ann3"]


def test_one_person_has_no_more_in_several_lines():
    queue: FairQueue[str] = FairQueue(max_active=2)
    queue.add("ann's first", "first", "ann")
    queue.add("ann's second", "second", "ann")
    assert queue.take() == "ann's first"
    with pytest.raises(EngineBusy, match=r"as one person may \(2\)"):
        queue.add("ann's third", "third", "ann")
    queue.add("bob's", "first", "bob")
    assert list(queue) == ["ann's second", "bob's"]
    assert queue.remove("ann's second")
    queue.add("ann's third", "third", "ann")
    queue.release("ann's first")
    queue.add("ann's fourth", "third", "ann")
    assert drain(queue) == ["bob's", "ann's third", "ann's fourth"]


def test_so_many_may_wait_in_all():
    queue = filled("ann1", "bob1", max_queued=2)
    with pytest.raises(EngineBusy, match=r"As many requests are waiting as may \(2\); try again in a minute\.$"):
        queue.add("cat1", "cat")
    queue.take()
    queue.add("cat1", "cat")
    assert list(queue) == ["bob1", "cat1"]


@given(st.lists(st.sampled_from(["ann", "bob", "cat", None])))
def test_the_order_that_is_shown_is_the_order_of_service(steps):
    """Names are added, None serves one: what comes next is always what was shown first."""
    queue: FairQueue[int] = FairQueue()
    for number, owner in enumerate(steps):
        if owner is not None:
            queue.add(number, owner)
        else:
            shown = next(iter(queue), None)
            assert queue.take() == shown
    shown = list(queue)
    assert shown == list(iter(queue.take, None))
