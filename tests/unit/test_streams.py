"""The API's answers are kept within bounds, and cancelled once nobody reads them."""

import asyncio
import gc
import weakref
from contextlib import aclosing

import pytest

from streaming.engine.base import Generation, GenerationRequest
from streaming.events import FinishEvent, TokenEvent
from streaming.log import EventLog
from streaming.server import streams
from streaming.server.openai_schema import Asked
from streaming.server.streams import Answer, Answers, follow


def generation() -> Generation:
    """A generation that ends when it is told to."""
    log = EventLog()
    return Generation(
        GenerationRequest(prompt=""), (), log=log, seed=1, cancel=lambda run: log.append(FinishEvent("cancelled"))
    )


def answer(name: str, n: int = 1, **options) -> Answer:
    runs = [generation() for _ in range(n)]
    return Answer(name, "me", "tiny", Asked((), is_chat=True, model=None, **options), runs)


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time goes on when it is told to, and then at once."""

    now = 0.0

    def time(self) -> float:
        return self.now

    async def pass_s(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)  # what is due is found
        await asyncio.sleep(0)  # and done


def on_a_clock(story):
    """Run a story that is told with a Clock."""
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(story(runner.get_loop()))


def read_once(answers: Answers, it: Answer) -> None:
    with answers.reading(it):
        pass


def end(it: Answer) -> None:
    for run in it.runs:
        run.log.append(FinishEvent("stop"))


def test_ended_answers_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(streams, "MAX_KEPT", 3)

    async def story(clock: Clock) -> tuple[list[int], bool, bool]:
        answers = Answers()
        running, deserted = answer("running"), answer("deserted", resume_s=20)
        answers.add(running)
        answers.add(deserted)
        read_once(answers, deserted)
        with answers.reading(running):
            for i in range(6):
                done = answer(str(i))
                answers.add(done)
                with answers.reading(done):
                    end(done)
                await clock.pass_s(1)
            kept = [i for i in range(6) if answers.find(str(i), "me")]
            return kept, answers.find("running", "me") is running, answers.find("deserted", "me") is deserted

    assert on_a_clock(story) == ([3, 4, 5], True, True)


def test_an_answer_is_forgotten_a_minute_after_its_last_reader_left_though_nobody_asks_for_anything():
    async def story(clock: Clock) -> list[bool]:
        answers, it = Answers(), answer("done")
        answers.add(it)
        assert answers.find("done", "you") is None
        with answers.reading(it):
            end(it)
            await clock.pass_s(1000)
        await clock.pass_s(59)
        found, there = answers.find("done", "me"), weakref.ref(it)
        read_once(answers, it)
        await clock.pass_s(0)
        seen = [found is it]
        del it, found
        for seconds in (59, 2):
            await clock.pass_s(seconds)
            gc.collect()
            seen.append(there() is not None)
        return seen

    assert on_a_clock(story) == [True, True, False]


def test_an_answer_is_cancelled_when_its_last_reader_leaves():
    async def story(clock: Clock) -> list[str | None]:
        answers, it = Answers(), answer("x", n=2)
        answers.add(it)
        with answers.reading(it):
            read_once(answers, it)
            await clock.pass_s(1000)
            assert not it.is_done
        await clock.pass_s(0)
        return [run.finish and run.finish.reason for run in it.runs]

    assert on_a_clock(story) == ["cancelled"] * 2


def test_a_reader_who_comes_back_in_time_keeps_it_going_however_often_it_leaves():
    async def story(clock: Clock) -> list[bool]:
        answers, it = Answers(), answer("x", resume_s=20)
        answers.add(it)
        read_once(answers, it)
        seen = []
        for away_s in (15, 15, 15):
            await clock.pass_s(away_s)
            seen.append(it.is_done)
            read_once(answers, it)
        with answers.reading(it):
            await clock.pass_s(1000)
        for away_s in (19, 2):
            await clock.pass_s(away_s)
            seen.append(it.is_done)
        return seen

    assert on_a_clock(story) == [False] * 4 + [True]


def test_several_logs_are_followed_as_one_to_the_end_of_each():
    async def read() -> list:
        runs = [generation(), generation()]
        seen = []

        async def reader() -> None:
            async for item in follow(runs, (1, 0), 30):
                assert item is not None
                seen.append((item[0], getattr(item[1], "text", "end")))

        runs[0].log.append(TokenEvent(0, 1, "had"))
        task = asyncio.create_task(reader())
        for choice, event in (
            (1, TokenEvent(0, 1, "a")), (0, TokenEvent(1, 1, "b")), (0, FinishEvent("stop")),
            (1, TokenEvent(1, 1, "c")), (1, FinishEvent("stop")),
        ):  # fmt: skip
            await asyncio.sleep(0)
            n_before = len(seen)
            runs[choice].log.append(event)
            while len(seen) == n_before:
                await asyncio.sleep(0.001)
        await asyncio.wait_for(task, 10)
        return seen

    assert asyncio.run(read()) == [(1, "a"), (0, "b"), (0, "end"), (1, "c"), (1, "end")]


@pytest.mark.parametrize("heartbeat_s", [0.01, 0.05])
def test_silence_is_told_in_time_whatever_else_wakes_the_readers(heartbeat_s):
    async def beats() -> list:
        run = generation()

        async def touch() -> None:
            while True:
                run.log.touch()
                await asyncio.sleep(heartbeat_s / 5)

        touching = asyncio.create_task(touch())
        async with aclosing(follow([run], (0,), heartbeat_s)) as items:
            seen = [await anext(items) for _ in range(3)]
        touching.cancel()
        return seen

    assert asyncio.run(asyncio.wait_for(beats(), 10)) == [None] * 3
