"""The log: one writer, any number of readers in threads and event loops, from any offset."""

import asyncio
import random
import threading

import pytest

from streaming.errors import StreamerMisuse, StreamTimeout
from streaming.events import FinishEvent, TokenEvent
from streaming.log import EventLog

WAIT_S = 30


def token(index: int) -> TokenEvent:
    return TokenEvent(index, 65 + index % 26, chr(65 + index % 26))


def written(n: int, *, ends: bool = True) -> EventLog:
    log = EventLog()
    for index in range(n):
        log.append(token(index))
    if ends:
        log.append(FinishEvent("stop"))
    return log


class TestWriting:
    def test_nothing_comes_after_the_finish(self):
        log = written(2)
        with pytest.raises(StreamerMisuse, match="already ended"):
            log.append(token(2))
        with pytest.raises(StreamerMisuse):
            log.append(FinishEvent("error"))
        assert len(log) == 3

    def test_what_it_holds(self):
        log = written(3)
        assert (log.text(), log.token_ids(), log.finish.reason, len(log)) == ("ABC", [65, 66, 67], "stop", 4)
        assert written(3, ends=False).finish is None


class TestReading:
    @pytest.mark.parametrize("after", [0, 1, 3, 4, 99])
    def test_from_any_offset_also_when_all_is_over(self, after):
        log = written(3)
        assert list(log.events(after)) == log.snapshot()[after:]

        async def read() -> list:
            return [event async for event in log.aevents(after)]

        assert asyncio.run(read()) == log.snapshot()[after:]

    def test_many_readers_at_random_moments_miss_nothing(self):
        """40 threads and 40 tasks, each from a random offset, while a writer appends 2,000 events."""
        log, chance, n = EventLog(), random.Random(0), 2000
        offsets = [chance.randrange(0, n) for _ in range(40)]
        read: dict[int, list] = {}

        def follow(reader: int) -> None:
            read[reader] = list(log.events(offsets[reader], WAIT_S))

        async def follow_all() -> list[list]:
            async def one(after: int) -> list:
                return [event async for event in log.aevents(after, WAIT_S)]

            return await asyncio.gather(*(one(after) for after in offsets))

        threads = [threading.Thread(target=follow, args=(i,), name="brook-test-reader") for i in range(40)]
        aread: list[list] = []
        threads.append(threading.Thread(target=lambda: aread.extend(asyncio.run(follow_all())), name="brook-test-loop"))
        for thread in threads:
            thread.start()
        for index in range(n):
            log.append(token(index))
        log.append(FinishEvent("stop"))
        for thread in threads:
            thread.join(WAIT_S)
        everything = log.snapshot()
        assert [read[i] for i in range(40)] == [everything[after:] for after in offsets]
        assert aread == [everything[after:] for after in offsets]

    def test_a_reader_that_leaves_takes_nothing_with_it(self):
        log = written(5, ends=False)
        first = log.events()
        next(first)
        first.close()

        async def leave() -> None:
            reader = log.aevents()
            await anext(reader)
            await reader.aclose()

        asyncio.run(leave())
        log.append(FinishEvent("stop"))
        assert len(list(log.events())) == 6

    def test_waiting_too_long_is_told(self):
        log = written(1, ends=False)
        events = log.events(timeout=0.02)
        next(events)
        with pytest.raises(StreamTimeout, match=r"No token came for 0\.02 s"):
            next(events)

        async def read() -> None:
            aevents = log.aevents(timeout=0.02)
            await anext(aevents)
            with pytest.raises(StreamTimeout):
                await anext(aevents)

        asyncio.run(read())

    def test_a_touch_wakes_who_waits_and_is_no_event(self):
        log = EventLog()
        timer = threading.Timer(0.02, log.touch)
        timer.start()
        assert log.wait(0, WAIT_S) == []
        timer.join(WAIT_S)
        with pytest.raises(StreamTimeout):
            list(log.events(timeout=0.02))

    def test_waiting_for_the_finish(self):
        log = EventLog()
        assert log.wait_finish(0.01) is None
        timer = threading.Timer(0.02, log.append, [FinishEvent("stop")])
        timer.start()
        assert log.wait_finish(WAIT_S).reason == "stop"
        timer.join(WAIT_S)

    def test_a_loop_that_is_gone_does_not_disturb_the_writer(self):
        log = EventLog()

        async def start() -> None:
            anext(log.aevents()).close()
            task = asyncio.ensure_future(anext(log.aevents()))
            await asyncio.sleep(0)
            task.cancel()

        asyncio.run(start())
        log.append(FinishEvent("stop"))
        assert log.finish is not None

    @pytest.mark.parametrize("closed", ["before", "while it is woken"])
    def test_a_loop_that_was_closed_under_a_reader_does_not_disturb_the_writer(self, closed, monkeypatch):
        log, loop = EventLog(), asyncio.new_event_loop()
        reader = loop.create_task(log.wait_async(0))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        if closed == "while it is woken":  # it was still open when the writer looked
            monkeypatch.setattr(loop, "is_closed", lambda: False)
        events = [token(0), FinishEvent("stop")]
        for event in events:
            log.append(event)
        log.touch()
        assert log.snapshot() == events
        reader.get_coro().close()
        reader._log_destroy_pending = False
