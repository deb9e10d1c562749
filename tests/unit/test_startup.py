"""The garbage collector rests while a program starts."""

import gc

import pytest

from streaming.startup import collector_paused


@pytest.fixture(autouse=True)
def frozen_objects_thaw():
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_rests_inside_and_works_again_after():
    with collector_paused():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(made), "what was made meanwhile is looked at no more"


def test_it_works_again_after_an_error_too():
    with pytest.raises(ZeroDivisionError), collector_paused():
        _ = 1 / 0
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
