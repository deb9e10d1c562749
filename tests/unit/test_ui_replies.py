"""Replies without a page: what is asked of the engine, what stays in the conversation, and what the words say."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass

import gradio as gr
import pytest

from streaming.engine.base import EngineStatus, Generation, GenerationRequest, Progress, SamplingDefaults
from streaming.errors import InvalidRequest
from streaming.events import FinishEvent, Timings, TokenEvent
from streaming.log import EventLog
from streaming.ui.chat import ChatHandlers, ChatSession
from streaming.ui.reasoning import begins_in_reasoning, find_tags
from streaming.ui.replies import Replies
from streaming.ui.session import Conversation, Message, Session, Turn
from streaming.ui.settings_panel import ChatSettings, offer_defaults, validate
from streaming.ui.status import describe_finish, describe_loading, describe_progress
from tests.scripted import ScriptedEngine

DEFAULTS = ChatSettings("", 64, 0.0, 1.0, 0, 0.0, 1.0, 0, "")
EOS = 258


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine()
    engine.wait_ready(30)
    yield engine
    engine.close()


@pytest.fixture
def chat(engine):
    return ChatHandlers(engine), ChatSession()


def settings(**changed) -> tuple:
    values = {name: getattr(DEFAULTS, name) for name in ChatSettings.__slots__} | changed
    return tuple(values.values())


async def play(handlers: ChatHandlers, session: ChatSession, asked) -> list:
    """Run the three steps of a reply; give the frames of the middle one."""
    await asked
    frames = [frame async for frame in handlers.stream(session) if "state" in frame]
    await handlers.settle(session)
    return frames


class TestTurns:
    def test_frames_grow_and_the_last_one_shows_all(self, chat):
        handlers, session = chat
        frames = asyncio.run(play(handlers, session, handlers.send(session, "slow: five words", *settings())))
        texts = [frame["message"]["text"] for frame in frames]
        assert texts[-1] == "five words"
        assert len(set(texts)) >= 5
        assert all("five words".startswith(text) for text in texts)
        assert frames[-1]["state"] == "done"

    def test_no_token_waits_longer_than_50_ms_for_a_frame_and_the_last_frame_shows_all(self, chat, engine, monkeypatch):
        handlers, session = chat
        text = "as fast as the model can, for a reader who is slow " * 8
        max_wait_s, frame_s, late_s = 0.050, 0.030, 0.0
        submitted: list[tuple[float, Generation]] = []
        shown: list[tuple[float, int]] = []  # when a frame came, and how many characters it showed

        def submit(request, submit=engine.submit):
            before = time.perf_counter()
            submitted.append((before, submit(request)))
            return submitted[0][1]

        async def read_slowly():
            nonlocal late_s
            await handlers.send(session, f"say: {text}", *settings(max_new_tokens=1000))
            async for frame in handlers.stream(session):
                shown.append((time.perf_counter(), len(frame["message"]["text"])))
                await asyncio.sleep(frame_s)
                late_s = max(late_s, time.perf_counter() - shown[-1][0] - frame_s)

        monkeypatch.setattr(engine, "submit", submit)
        asyncio.run(read_slowly())
        ((began_at, run),) = submitted
        made_s = [event.t_s for event in run.log.snapshot() if isinstance(event, TokenEvent) and event.text]
        assert len(made_s) == len(text), "a token is a character here"
        assert shown[-1][1] == len(text)
        assert len(shown) < len(text) / 2, "the reader is slow enough to have tokens joined"
        waits_s = [next(at for at, n in shown if n > i) - began_at - t_s for i, t_s in enumerate(made_s)]
        # What the machine was late by in a mere sleep is not the page's doing.
        assert max(waits_s) <= max_wait_s + late_s

    def test_a_reply_keeps_the_models_own_ids_without_the_end_of_turn(self, chat):
        handlers, session = chat
        asyncio.run(play(handlers, session, handlers.send(session, "say: abc", *settings())))
        assert session.active.messages[-1].for_model() == {
            "role": "assistant",
            "content": "abc",
            "token_ids": (64, 65, 66),
        }

    def test_a_reply_cut_at_a_stop_string_keeps_no_ids_that_say_more(self, chat):
        handlers, session = chat
        asyncio.run(play(handlers, session, handlers.send(session, "say: one. two", *settings(stop="."))))
        reply = session.active.messages[-1]
        assert reply.content == "one"
        assert reply.token_ids == ()

    def test_the_next_request_holds_the_conversation_and_the_system_prompt(self, chat, engine):
        handlers, session = chat
        asyncio.run(play(handlers, session, handlers.send(session, "say: a", *settings())))
        message = Message("assistant", "")
        session.active.messages.extend([Message("user", "say: b"), message])
        request = handlers.replies.chat_request(session.active, message, ChatSettings(*settings(system_prompt="Be.")))
        assert [m["role"] for m in request.messages] == ["system", "user", "assistant", "user"]
        assert request.messages[2]["token_ids"] == (64,)
        assert request.prefix_ids == ()

    def test_continuing_gives_the_ids_that_are_there(self, chat):
        handlers, session = chat
        asyncio.run(play(handlers, session, handlers.send(session, "say: abcdef", *settings(max_new_tokens=3))))
        assert session.active.messages[-1].content == "abc"
        assert session.active.messages[-1].can_continue
        asyncio.run(play(handlers, session, handlers.resume(session, *settings())))
        reply = session.active.messages[-1]
        assert reply.content == "abcdef"
        assert reply.token_ids == (64, 65, 66, 67, 68, 69)
        assert not reply.can_continue

    def test_a_refusal_puts_everything_back(self, chat):
        handlers, session = chat
        asyncio.run(play(handlers, session, handlers.send(session, "say: kept", *settings())))
        before = list(session.active.messages)

        async def refused():
            await handlers.send(session, "x" * 9000, *settings())
            async for _ in handlers.stream(session):
                pass
            return await handlers.settle(session)

        composer, _, live, _, _ = asyncio.run(refused())
        assert composer == "x" * 9000
        assert live["state"] == "refused"
        assert "tokens long but the model can read at most" in live["status"]
        assert session.active.messages == before
        assert session.active.turn is None

    def test_a_full_queue_puts_everything_back(self):
        engine = ScriptedEngine(max_active=1)
        engine.wait_ready(30)
        handlers, first, second = ChatHandlers(engine), ChatSession(), ChatSession()
        first.owner = second.owner = "ann"  # one person, two tabs

        async def refused():
            await handlers.send(first, "slow: " + "x" * 60, *settings())
            stream = handlers.stream(first)
            async for frame in stream:
                if frame["message"]["text"]:
                    break
            await handlers.send(second, "say: typed with care", *settings())
            assert [frame async for frame in handlers.stream(second) if frame.get("state") == "writing"] == []
            shown = await handlers.settle(second)
            await stream.aclose()
            return shown

        try:
            composer, _, live, _, _ = asyncio.run(refused())
        finally:
            engine.close()
        assert composer == "say: typed with care"
        assert live["state"] == "refused"
        assert "as many requests on their way as one person may (1)" in live["status"]
        assert second.active.messages == []
        assert second.active.turn is None

    def test_a_second_message_waits_for_the_first_to_end(self, chat):
        handlers, session = chat

        async def both():
            await handlers.send(session, "slow: first", *settings())
            stream = handlers.stream(session)
            await anext(stream)
            update = await handlers.send(session, "say: second", *settings())
            await stream.aclose()
            return update

        composer, _, live, _ = asyncio.run(both())
        assert composer == "say: second"
        assert live["state"] == "refused"
        assert [m.role for m in session.active.messages] == ["user", "assistant"]

    def test_closing_the_stream_cancels_the_run_and_keeps_the_part(self, chat, engine):
        handlers, session = chat

        async def leave():
            await handlers.send(session, "slow: " + "x" * 60, *settings())
            stream = handlers.stream(session)
            async for frame in stream:
                if frame["message"]["text"]:
                    break
            turn = session.active.turn
            await stream.aclose()
            return turn

        turn = asyncio.run(leave())
        assert turn.run.log.wait_finish(20).reason == "cancelled"
        assert session.active.turn is None
        assert 0 < len(session.active.messages[-1].content) < 60

    def test_two_readers_follow_one_turn(self, engine):
        async def read():
            replies, conversation = Replies(engine), Conversation([Message("user", "slow: shared")])
            reply = Message("assistant", "")
            conversation.messages.append(reply)
            turn = Turn(reply)

            async def texts(frames):
                async with aclosing(frames):
                    return [frame.text async for frame in frames]

            request = replies.chat_request(conversation, reply, DEFAULTS)
            return await asyncio.gather(texts(replies.write(turn, lambda: request)), texts(replies.follow(turn)))

        written, followed = asyncio.run(read())
        assert written[-1] == followed[-1] == "shared"

    def test_a_stop_before_the_request_is_made_writes_nothing(self, chat):
        handlers, session = chat

        async def stopped():
            await handlers.send(session, "say: x", *settings())
            await handlers.stop(session)
            return [frame async for frame in handlers.stream(session)]

        frames = asyncio.run(stopped())
        assert frames[-1]["status"] == "Stopped before it began"
        assert session.active.messages[-1].content == ""


class TestSession:
    def test_an_empty_conversation_is_used_before_another_is_begun(self):
        session = Session()
        first = session.active
        assert session.open_new() is first
        first.messages.append(Message("user", "hello"))
        assert session.open_new() is not first
        assert [c["title"] for c in session.for_list()] == ["New chat", "hello"]

    def test_deleting_the_last_conversation_leaves_an_empty_one(self):
        session = Session()
        session.active.messages.append(Message("user", "hello"))
        session.delete(session.active.id)
        assert len(session.conversations) == 1
        assert session.active.messages == []

    def test_titles_are_one_short_line(self):
        conversation = Conversation([Message("user", "a\nvery " + "long " * 40)])
        assert len(conversation.title) <= 48
        assert "\n" not in conversation.title


class TestSettings:
    def test_they_become_a_request(self):
        request = ChatSettings("", 5, None, 0.9, 0, 0.0, 1.0, 0, "END\n\\n\\n\n").for_request()
        assert request["stop"] == ("END", "\n\n")
        assert request["seed"] is None
        assert request["temperature"] is None
        GenerationRequest(prompt="x", **request)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("temperature", -0.1), ("top_p", 1.5), ("top_k", -1), ("min_p", 2), ("max_new_tokens", 0), ("seed", -5)],
    )
    def test_what_the_engine_refuses_is_told_at_its_field(self, name, value):
        values = settings(**{name: value})
        wrong = [v["is_valid"] for v in validate(values)].index(False)
        assert list(ChatSettings.__slots__)[wrong] == name
        with pytest.raises(InvalidRequest) as refused:
            GenerationRequest(prompt="x", **{name: value})
        assert refused.value.field == name

    def test_a_models_defaults_fill_what_was_left_alone(self):
        initial = settings(max_new_tokens=256)
        changed = list(initial)
        changed[2] = 0.5
        defaults = SamplingDefaults(temperature=0.2, top_p=0.9)
        assert offer_defaults(initial, defaults)[2:4] == [0.2, 0.9]
        assert offer_defaults(changed, defaults)[2:4] == [0.5, 0.9]

    def test_emptied_fields_and_values_in_range_are_fine(self):
        assert all(v["is_valid"] for v in validate(settings(temperature=None, top_k=None)))
        assert all(v["is_valid"] for v in validate(settings()))


@dataclass
class Added:
    """An added token, as tokenizers list them."""

    content: str
    special: bool


class TagTokenizer:
    """A tokenizer with reasoning tags of its own, of which one pair is control tokens."""

    added_tokens_decoder = {  # noqa: RUF012
        1: Added("[THINK]", True),
        2: Added("[/THINK]", True),
        3: Added("<seed:think>", False),
        4: Added("</seed:think>", False),
        5: Added("<|im_end|>", True),
    }

    def decode(self, ids, skip_special_tokens):
        return "".join(self.added_tokens_decoder[i].content if i in self.added_tokens_decoder else "a" for i in ids)


class TestReasoning:
    def test_the_tokenizers_own_tags_are_found_and_control_tokens_put_back(self):
        tags = find_tags(TagTokenizer())
        assert ("[THINK]", "[/THINK]") in tags.pairs
        assert ("<seed:think>", "</seed:think>") in tags.pairs
        assert tags.text_of(1, "") == "[THINK]"
        assert tags.text_of(5, "") == ""
        assert tags.text_of(9, "word") == "word"

    def test_a_prompt_that_opens_the_block_is_known(self):
        tokenizer = TagTokenizer()
        tags = find_tags(tokenizer)
        assert begins_in_reasoning(tokenizer, [9, 9, 3], tags)
        assert not begins_in_reasoning(tokenizer, [3, 9, 4], tags)
        assert not begins_in_reasoning(tokenizer, [], tags)


class TestWords:
    def test_every_state_has_its_words(self):
        assert describe_loading(EngineStatus("loading", "m")) == "Loading the model"
        assert describe_loading(EngineStatus("loading", "m", detail="Fetching · 4 %")) == "Fetching · 4 %"
        assert describe_progress(Progress("waiting", n_ahead=2), 0, 0) == "Waiting · 2 ahead of you"
        assert describe_progress(Progress("reading", 256, 1024), 0, 0) == "Reading the prompt · 25 %"
        assert describe_progress(Progress("writing"), 1, 0) == "Writing · 1 token"
        assert describe_progress(Progress("writing"), 11, 2.0) == "Writing · 11 tokens · 5.0 tokens/s"

    def test_the_end_tells_how_much_how_fast_and_what_was_left_out(self):
        run = Generation(
            GenerationRequest(prompt="x"), (1,), log=EventLog(), seed=7, cancel=lambda run: None, n_dropped_messages=4
        )
        finish = FinishEvent("length", n_generated_tokens=1200, timings=Timings(0.0, 0.25, 31.25))
        assert describe_finish(run, finish) == (
            "Stopped at the length limit · 1,200 tokens · 31.2 tokens/s · first after 0.25 s · "
            "4 oldest messages left out to fit · seed 7"
        )


def test_skipped_updates_are_what_gradio_takes_for_no_change():
    assert gr.skip() == {"__type__": "update"}
