"""The API's answers are kept within bounds, and cancelled once nobody reads them."""

import asyncio
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


def ended(name: str) -> Answer:
    done = answer(name)
    done.runs[0].log.append(FinishEvent("stop"))
    return done


def test_ended_answers_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(streams, "MAX_KEPT", 3)
    answers = Answers()
    running = answer("running")
    answers.add(running)
    for i in range(6):
        answers.add(ended(str(i)))
    assert [i for i in range(6) if answers.find(str(i), "me")] == [3, 4, 5]
    assert answers.find("running", "me") is running


def test_ended_answers_are_kept_for_a_while(monkeypatch):
    answers = Answers()
    done = ended("done")
    answers.add(done)
    assert answers.find("done", "me") is done
    assert answers.find("done", "you") is None
    done.left_at -= streams.KEEP_S + 1
    assert answers.find("done", "me") is None


def test_an_answer_is_cancelled_when_its_last_reader_leaves():
    answers, it = Answers(), answer("x", n=2)
    with answers.reading(it):
        with answers.reading(it):
            pass
        assert not it.is_done
    assert [run.finish.reason for run in it.runs] == ["cancelled"] * 2


def test_a_reader_who_comes_back_in_time_keeps_it_going():
    async def leave_and_return() -> tuple[bool, bool]:
        answers, it = Answers(), answer("x", resume_s=0.05)
        with answers.reading(it):
            pass
        with answers.reading(it):
            await asyncio.sleep(0.1)
            was_done = it.is_done
        await asyncio.sleep(0.1)
        return was_done, it.is_done

    assert asyncio.run(leave_and_return()) == (False, True)


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
