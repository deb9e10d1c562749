"""The chat without a page: what is asked of the engine, what stays in the conversation, who sees it, who follows it."""

import asyncio
import dataclasses
import threading
import time
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from streaming.conversations.store import Store
from streaming.conversations.tree import Conversation, Message
from streaming.engine.base import Generation
from streaming.events import TokenEvent
from streaming.server.runs import Runs
from streaming.ui.chat import BUSY, ChatHandlers, ChatSession
from streaming.ui.session import owner_of
from streaming.ui.settings_panel import ChatSettings
from tests.scripted import ScriptedEngine

WAIT_S = 30
DEFAULTS = ChatSettings("", 64, 0.0, 1.0, 0, 0.0, 1.0, 0, "")


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine()
    engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


@pytest.fixture
def runs(engine):
    runs = Runs(engine)
    yield runs
    runs.close()
    runs.store.close()


def settings(**changed) -> tuple:
    values = {name: getattr(DEFAULTS, name) for name in ChatSettings.__slots__} | changed
    return tuple(values.values())


def event(**data) -> SimpleNamespace:
    return SimpleNamespace(_data=data)


class Tab:
    """A tab of a browser, which knows what its page was told."""

    def __init__(self, runs: Runs, browser: str = "a" * 32, handlers: ChatHandlers | None = None) -> None:
        self.handlers = handlers or ChatHandlers(runs)
        self.runs = runs
        self.session = ChatSession()
        self.said = {"browser": browser, "conversation": ""}
        self.composer = ""
        self.past: list[dict] = []
        self.live: dict = {}
        self.listed: dict = {}

    def take(self, update: tuple) -> None:
        names = ("composer", "past", "live", "listed")
        for name, value in zip(names, update[:4], strict=True):
            if value == {"__type__": "update"}:
                continue
            if name == "past":
                self.said["conversation"] = value["conversation"]
                value = value["messages"]
            setattr(self, name, value)

    async def do(self, name: str, *inputs) -> None:
        """Run a handler of asking or of conversations, and show what it gives."""
        handler = getattr(self.handlers, name, None) or getattr(self.handlers.conversations, name)
        self.take(await handler(self.session, self.said, *inputs))

    async def send(self, text: str, **changed) -> None:
        self.take(await self.handlers.send(self.session, self.said, text, None, *settings(**changed)))

    async def frames(self):
        async with aclosing(self.handlers.stream(self.session, self.said, None)) as frames:
            async for frame in frames:
                if "state" in frame:
                    self.live = frame
                    yield frame

    async def finish(self) -> list[dict]:
        frames = [frame async for frame in self.frames()]
        self.take(await self.handlers.settle(self.session, self.said, None))
        return frames

    async def ask(self, text: str, **changed) -> list[dict]:
        await self.send(text, **changed)
        return await self.finish()

    async def stop(self) -> None:
        await self.handlers.conversations.stop(self.said, None)

    @property
    def owner(self) -> str:
        return owner_of(self.said, None)

    @property
    def kept(self) -> Conversation:
        return self.runs.store.open(self.owner, self.said["conversation"])

    @property
    def texts(self) -> list[str]:
        return [m["text"] for m in [*self.past, *([self.live["message"]] if self.live["message"] else [])]]

    @property
    def titles(self) -> list[str]:
        return [item["title"] for item in self.listed["items"]]


@pytest.fixture
def tab(runs):
    return Tab(runs)


class TestTurns:
    def test_frames_grow_and_the_last_one_shows_all(self, tab):
        frames = asyncio.run(tab.ask("slow: five words"))
        texts = [frame["message"]["text"] for frame in frames]
        assert texts[-1] == "five words"
        assert len(set(texts)) >= 5
        assert all("five words".startswith(text) for text in texts)
        assert frames[-1]["state"] == "done"
        assert tab.texts == ["slow: five words", "five words"]

    def test_no_token_waits_longer_than_50_ms_for_a_frame_and_the_last_frame_shows_all(self, tab, engine, monkeypatch):
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
            await tab.send(f"say: {text}", max_new_tokens=1000)
            async for frame in tab.frames():
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

    def test_a_reply_keeps_what_was_shown_and_how_it_was_made(self, tab):
        asyncio.run(tab.ask("say: abc", seed=7, system_prompt="Be."))
        question, reply = tab.kept.path()
        assert (question.content, reply.content) == ("say: abc", "abc")
        assert reply.token_ids == (64, 65, 66), "the end of the turn is no part of it"
        assert (reply.reason, reply.model, reply.seed) == ("stop", "tiny", 7)
        assert reply.settings["system_prompt"] == "Be."
        assert reply.stats["n_generated_tokens"] == 4
        assert reply.stats["ttft_s"] > 0

    def test_a_reply_cut_at_a_stop_string_keeps_the_ids_of_what_was_shown(self, tab):
        asyncio.run(tab.ask("say: one. two", stop="."))
        reply = tab.kept.path()[-1]
        assert reply.content == "one"
        assert reply.token_ids == (78, 77, 68)

    def test_the_next_request_holds_the_conversation_and_the_system_prompt(self, tab, engine, monkeypatch):
        asyncio.run(tab.ask("say: a"))
        requests = []
        monkeypatch.setattr(engine, "submit", lambda r, submit=engine.submit: (requests.append(r), submit(r))[1])
        asyncio.run(tab.ask("say: b", system_prompt="Be."))
        [request] = requests
        assert [m["role"] for m in request.messages] == ["system", "user", "assistant", "user"]
        assert request.messages[2]["token_ids"] == (64,)
        assert request.prefix_ids == ()
        assert request.owner == tab.owner

    def test_another_models_ids_are_left_out(self, tab, engine, monkeypatch):
        asyncio.run(tab.ask("say: a"))
        requests = []
        monkeypatch.setattr(engine, "submit", lambda r, submit=engine.submit: (requests.append(r), submit(r))[1])
        by_another = dataclasses.replace(tab.kept.path()[-1], model="another")
        tab.runs.store.update(tab.kept.id, by_another)
        asyncio.run(tab.ask("say: b"))
        assert "token_ids" not in requests[0].messages[1]

    def test_continuing_gives_the_ids_that_are_there(self, tab):
        asyncio.run(tab.ask("say: abcdef", max_new_tokens=3))
        assert tab.live["message"]["text"] == "abc"
        assert tab.live["message"]["resumable"]

        async def resume():
            await tab.do("resume", None, *settings())
            return await tab.finish()

        frames = asyncio.run(resume())
        assert all(frame["message"]["text"].startswith("abc") for frame in frames)
        reply = tab.kept.path()[-1]
        assert reply.content == "abcdef"
        assert reply.token_ids == (64, 65, 66, 67, 68, 69)
        assert not reply.can_continue
        assert len(tab.kept.messages) == 2

    def test_a_refusal_puts_everything_back(self, tab):
        asyncio.run(tab.ask("say: kept"))
        before, texts = tab.kept, tab.texts
        asyncio.run(tab.ask("x" * 9000))
        assert tab.composer == "x" * 9000
        assert tab.live["state"] == "refused"
        assert "tokens long but the model can read at most" in tab.live["status"]
        assert tab.texts == texts
        assert (tab.kept.messages, tab.kept.leaf) == (before.messages, before.leaf)
        assert tab.runs.of_owner(tab.owner) == []

    def test_a_refusal_at_once_leaves_no_conversation(self, tab):
        asyncio.run(tab.ask("x" * 9000))
        assert tab.titles == ["New chat"]
        assert tab.runs.store.recent(tab.owner) == []
        asyncio.run(tab.ask("say: goes on"))
        assert tab.texts == ["say: goes on", "goes on"]

    def test_a_full_queue_puts_everything_back(self):
        engine = ScriptedEngine(max_active=1)
        engine.wait_ready(30)
        runs = Runs(engine)
        first, second = Tab(runs), Tab(runs)  # one person, two tabs

        async def refused():
            await first.send("slow: " + "x" * 60)
            async for frame in first.frames():
                if frame["message"]["text"]:
                    break
            assert [frame for frame in await second.ask("say: typed with care") if frame["state"] == "writing"] == []

        asyncio.run(refused())
        runs.close()
        runs.store.close()
        engine.close()
        assert second.composer == "say: typed with care"
        assert second.live["state"] == "refused"
        assert "as many requests on their way as one person may (1)" in second.live["status"]
        assert second.texts == []

    def test_a_second_message_waits_for_the_first_to_end(self, tab):
        async def both():
            await tab.send("slow: the first")
            async for frame in tab.frames():
                if frame["message"]["text"]:
                    break
            await tab.send("say: second")
            assert tab.composer == "say: second"
            assert (tab.live["state"], tab.live["status"]) == ("refused", BUSY)
            return await tab.finish()

        frames = asyncio.run(both())
        assert frames[-1]["message"]["text"] == "the first"
        assert [m.role for m in tab.kept.path()] == ["user", "assistant"]

    def test_two_tabs_that_ask_at_once_get_one_reply(self, runs):
        one = Tab(runs)
        two = Tab(runs, handlers=one.handlers)
        asyncio.run(one.ask("say: before"))
        two.said = dict(one.said)

        async def both():
            await asyncio.gather(one.send("slow: from one"), two.send("slow: from two"))
            return await asyncio.gather(one.finish(), two.finish())

        asyncio.run(both())
        assert len(one.kept.path()) == 4
        assert one.texts == two.texts == [m.content for m in one.kept.path()]
        assert [one.composer, two.composer].count("") == 1

    def test_a_stop_before_the_request_is_made_writes_nothing(self, runs, monkeypatch):
        ready = threading.Event()
        monkeypatch.setattr(runs.engine, "wait_ready", ready.wait)
        tab = Tab(runs)

        async def stopped():
            await tab.send("say: x")
            await tab.stop()
            return await tab.finish()

        frames = asyncio.run(stopped())
        assert frames[-1]["status"] == "Stopped before it began"
        assert tab.kept.path()[-1].content == ""
        assert tab.kept.path()[-1].reason == "cancelled"


class TestBranches:
    def test_editing_and_regenerating_overwrite_nothing(self, tab):
        async def play():
            await tab.ask("say: first")
            await tab.ask("say: second")
            await tab.do("retry", None, *settings())
            await tab.finish()
            await tab.do("edit", event(id=tab.past[0]["id"], text="say: other"), None, *settings())
            await tab.finish()

        asyncio.run(play())
        assert tab.texts == ["say: other", "other"]
        contents = sorted(m.content for m in tab.kept.messages.values())
        assert contents == sorted(["say: first", "first", "say: second", "second", "second", "say: other", "other"])

    def test_an_edited_reply_stands_beside_the_one_that_was_written(self, tab):
        async def play():
            await tab.ask("say: one two three")
            await tab.do("edit", event(id=tab.live["message"]["id"], text="one two"), None, *settings())
            await tab.do("resume", None, *settings())
            await tab.finish()

        asyncio.run(play())
        assert tab.texts == ["say: one two three", "one two three"]
        written, edited = tab.kept.siblings(tab.kept.leaf)
        assert (written.reason, edited.reason) == ("stop", "stop")
        assert edited.token_ids == written.token_ids

    def test_undo_loses_nothing_and_gives_the_question_back(self, tab):
        async def play():
            await tab.ask("say: kept")
            await tab.ask("say: taken back")
            await tab.do("undo", None)

        asyncio.run(play())
        assert tab.composer == "say: taken back"
        assert tab.texts == ["say: kept", "kept"]
        assert len(tab.kept.messages) == 4

    def test_a_refused_retry_shows_the_reply_again(self, tab, engine, monkeypatch):
        from streaming.errors import EngineBusy

        asyncio.run(tab.ask("say: kept"))

        def refuse(request):
            raise EngineBusy("Too many people ask; try again in a moment.")

        async def retry():
            await tab.do("retry", None, *settings())
            await tab.finish()

        monkeypatch.setattr(engine, "submit", refuse)
        asyncio.run(retry())
        assert tab.texts == ["say: kept", "kept"]
        assert tab.live["status"] == "Too many people ask; try again in a moment."
        assert len(tab.kept.messages) == 2


class TestConversations:
    def test_they_are_begun_switched_and_put_away(self, tab):
        async def play():
            await tab.ask("say: in the first")
            first = tab.said["conversation"]
            await tab.do("new", None)
            assert tab.texts == []
            assert tab.titles == ["New chat", "say: in the first"]
            await tab.ask("say: in the second")
            assert tab.titles == ["say: in the second", "say: in the first"]
            await tab.do("select", event(id=first), None)
            assert tab.texts == ["say: in the first", "in the first"]
            await tab.do("delete", event(id=first), None)
            assert tab.titles == ["say: in the second"]
            assert tab.texts == ["say: in the second", "in the second"]
            await tab.do("clear", None)
            assert tab.titles == ["New chat"]

        asyncio.run(play())

    def test_a_new_tab_shows_what_is_being_written_and_else_a_new_chat(self, runs):
        async def play():
            first = Tab(runs)
            await first.ask("say: done")
            second = Tab(runs)
            await second.do("refresh", None)
            assert second.texts == []
            await first.send("slow: being written")
            await second.do("refresh", None)
            assert second.said == first.said
            frames = await second.finish()
            assert frames[-1]["message"]["text"] == "being written"
            await first.finish()

        asyncio.run(play())

    @pytest.mark.parametrize("held", ["open", "recent"])
    def test_a_refresh_that_is_late_takes_nothing_off_the_page(self, tab, runs, monkeypatch, held):
        asyncio.run(tab.ask("say: before"))
        work, reached, go = getattr(runs.store, held), threading.Event(), threading.Event()
        given: list[tuple] = []

        def wait(*values):
            if not reached.is_set():
                result = work(*values)
                reached.set()
                go.wait(WAIT_S)
                return result
            return work(*values)

        async def play():
            monkeypatch.setattr(runs.store, held, wait)
            refresh = asyncio.create_task(tab.handlers.conversations.refresh(tab.session, tab.said, None))
            await asyncio.to_thread(reached.wait, WAIT_S)
            await tab.send("slow: sent meanwhile")
            go.set()
            given.append(await refresh)
            await tab.finish()

        asyncio.run(play())
        assert given == [({"__type__": "update"},) * 4]
        assert tab.texts == ["say: before", "before", "slow: sent meanwhile", "sent meanwhile"]

    def test_a_page_that_outlived_the_server_goes_on(self, tab, runs):
        asyncio.run(tab.ask("say: before"))
        again = Tab(runs)
        again.said = dict(tab.said)
        asyncio.run(again.ask("say: after"))
        assert again.texts == ["say: before", "before", "say: after", "after"]


class TestWho:
    def test_an_account_a_browser_and_nobody(self):
        account = SimpleNamespace(username="ada")
        anyone = SimpleNamespace(username=None)
        assert owner_of({"browser": "a" * 32}, account) == "account:ada"
        ada, bob = (owner_of({"browser": letter * 32}, anyone) for letter in "ab")
        assert ada != bob
        assert "a" * 32 not in ada
        assert owner_of({"browser": "a" * 32}, None) == ada
        for said in ({}, None, {"browser": "short"}, {"browser": ["a" * 32]}, {"browser": "a" * 32 + "\n"}):
            assert owner_of(said, anyone) != owner_of(said, anyone)

    def test_nobody_reads_stops_or_changes_anothers_by_its_id(self, runs):
        ada, bob = Tab(runs), Tab(runs, browser="b" * 32)

        async def play():
            await ada.send("slow: for Ada alone")
            frames = ada.frames()
            await anext(frames)
            bob.said["conversation"] = ada.said["conversation"]
            reply_id = ada.kept.leaf
            for name, *inputs in (
                ("refresh", None),
                ("select", event(id=ada.said["conversation"]), None),
                ("edit", event(id=reply_id, text="mine"), None, *settings()),
                ("retry", None, *settings()),
                ("resume", None, *settings()),
                ("undo", None),
                ("delete", event(id=ada.said["conversation"]), None),
                ("clear", None),
            ):
                bob.said["conversation"] = ada.said["conversation"]
                await bob.do(name, *inputs)
                assert bob.past == []
                assert not bob.live.get("message")
                assert [f async for f in bob.frames()] == []
                assert bob.titles in ([], ["New chat"])
            bob.said["conversation"] = ada.said["conversation"]
            await bob.stop()
            bob.said["conversation"] = ada.said["conversation"]
            await bob.ask("say: bob's own")
            assert bob.texts == ["say: bob's own", "bob's own"]
            assert bob.said["conversation"] != ada.said["conversation"]
            return [frame async for frame in frames]

        frames = asyncio.run(play())
        assert frames[-1]["message"]["text"] == "for Ada alone"
        assert [m.content for m in ada.kept.path()] == ["slow: for Ada alone", "for Ada alone"]

    def test_a_tabs_session_alone_shows_nobody_its_reply(self, runs):
        ada = Tab(runs)

        async def play():
            await ada.send("slow: for Ada alone")
            frames = [f async for f in ada.handlers.stream(ada.session, {"browser": "b" * 32}, None)]
            frames += [f async for f in ada.handlers.follow(ada.session, {}, None)]
            assert frames == [{"__type__": "update"}] * 2
            await ada.finish()

        asyncio.run(play())
        assert ada.texts[-1] == "for Ada alone"

    def test_a_tabs_session_alone_lists_nothing(self, tab, runs):
        async def steal():
            await tab.ask("say: my secret")
            thief = {"browser": "b" * 32, "conversation": tab.said["conversation"]}
            handlers = tab.handlers.conversations
            return [
                await handlers.rename(tab.session, thief, event(id="none", title="x"), None),
                await handlers.pin(tab.session, thief, event(id="none", pinned=True), None),
                await handlers.search(tab.session, thief, event(words="secret"), None),
            ]

        for listed in asyncio.run(steal()):
            assert [item for item in listed["items"] if item["id"]] == []


class TestRuns:
    def test_a_reply_goes_on_when_its_tab_leaves_and_a_later_one_sees_it_whole(self, runs):
        first, second = Tab(runs), Tab(runs)

        async def leave():
            await first.send("slow: from the first character on")
            async for frame in first.frames():
                if len(frame["message"]["text"]) > 4:
                    return

        async def come():
            await second.do("refresh", None)
            assert "from the first character on".startswith(second.live["message"]["text"])
            shown = second.live["message"]["text"]
            frames = await second.finish()
            assert all(frame["message"]["text"].startswith(shown) for frame in frames)
            return frames

        asyncio.run(leave())
        frames = asyncio.run(come())
        assert frames[-1]["message"]["text"] == "from the first character on"
        assert first.kept.path()[-1].reason == "stop"

    def test_any_number_of_tabs_follow_and_a_stop_in_one_stops_all(self, runs):
        tabs = [Tab(runs) for _ in range(5)]

        async def play():
            await tabs[0].send("slow: " + "x" * 60)
            for tab in tabs[1:]:
                await tab.do("refresh", None)

            async def follow(tab):
                frames = []
                async for frame in tab.frames():
                    frames.append(frame)
                    if tab is tabs[3] and len(frame["message"]["text"]) > 5:
                        await tab.stop()
                return frames

            return await asyncio.gather(*(follow(tab) for tab in tabs))

        followed = asyncio.run(play())
        kept = tabs[0].kept.path()[-1]
        assert kept.reason == "cancelled"
        assert 5 < len(kept.content) < 60
        for frames in followed:
            assert frames[-1]["message"]["text"] == kept.content
            texts = [frame["message"]["text"] for frame in frames]
            assert texts == sorted(texts, key=len)

    def test_a_tab_that_looks_elsewhere_keeps_its_reply_going(self, engine):
        runs = Runs(engine, grace_s=0.2)
        tab = Tab(runs)

        async def play():
            await tab.send("slow: it goes on though nobody looks")
            asked = tab.said["conversation"]
            stream = asyncio.create_task(tab.finish())
            await asyncio.sleep(0)
            await tab.do("new", None)
            await stream
            await tab.do("select", event(id=asked), None)

        asyncio.run(play())
        assert tab.texts[-1] == "it goes on though nobody looks"
        runs.store.close()

    def test_what_nobody_watches_is_stopped_after_the_grace_time_and_kept(self, engine):
        runs = Runs(engine, grace_s=0.3)
        tab = Tab(runs)

        async def leave():
            await tab.send("slow: " + "x" * 60)
            async for frame in tab.frames():
                if frame["message"]["text"]:
                    return

        asyncio.run(leave())
        [reply] = runs.of_owner(tab.owner)
        left_at = time.monotonic()
        message = reply.done.result(WAIT_S)
        assert time.monotonic() - left_at > 0.25
        assert message.reason == "abandoned"
        assert tab.kept.path()[-1] == message
        asyncio.run(tab.do("refresh", None))
        assert tab.live["message"]["notice"] == "Stopped: nobody was watching."
        assert tab.live["message"]["resumable"]

        async def resume():
            await tab.do("resume", None, *settings())
            await tab.finish()

        asyncio.run(resume())
        assert tab.texts[-1] == "x" * 60
        assert tab.live["message"]["notice"] == ""
        runs.store.close()

    def test_without_a_grace_time_a_reply_waits_for_its_first_reader_and_ends_with_its_last(self, engine):
        runs = Runs(engine, grace_s=0)
        late, left = Tab(runs, "a" * 32), Tab(runs, "b" * 32)
        asyncio.run(late.send("slow: the page asks, and reads in another request"))
        [reply] = runs.of_owner(late.owner)
        assert reply.done.result(WAIT_S).reason == "stop"

        async def leave():
            await left.send("slow: " + "x" * 60)
            async for frame in left.frames():
                if frame["message"]["text"]:
                    return

        asyncio.run(leave())
        [reply] = runs.of_owner(left.owner)
        assert reply.done.result(WAIT_S).reason == "abandoned"
        runs.store.close()

    def test_what_is_queued_and_nobody_waits_for_leaves_the_queue(self, engine):
        runs = Runs(engine, grace_s=0.2)
        engine.held.clear()
        engine.go.clear()
        try:
            holder = runs.start(Message(role="assistant", content=""), lambda: hold("hold: first"))
            with holder.reading():
                assert engine.held.wait(WAIT_S)
                waiting = runs.start(Message(role="assistant", content=""), lambda: hold("say: never"))
                with waiting.reading():
                    pass
                assert waiting.done.result(WAIT_S).reason == "abandoned"
                assert engine.status().n_queued == 0
                engine.go.set()
                assert holder.done.result(WAIT_S).content == "first"
        finally:
            engine.go.set()
            runs.close()
            runs.store.close()

    def test_a_running_reply_is_kept_as_it_grows(self, engine, tmp_path):
        store = Store(tmp_path)
        runs = Runs(engine, store)
        tab = Tab(runs)
        kept: list[Message] = []
        update = store.update
        store.update = lambda conversation_id, message: (kept.append(message), update(conversation_id, message))

        asyncio.run(tab.ask("slow: " + "kept as it grows, every half second or so " * 2, max_new_tokens=200))
        assert len(kept) >= 4
        assert [m.reason for m in kept] == [*[None] * (len(kept) - 1), "stop"]
        for message in kept:
            assert runs.engine.tokenizer.decode(list(message.token_ids)) == message.content
        runs.close()
        store.close()

    def test_closing_keeps_what_is_there_as_interrupted(self, engine, tmp_path):
        store = Store(tmp_path)
        runs = Runs(engine, store)
        tab = Tab(runs)

        async def ask():
            await tab.send("slow: " + "abcdefghij" * 6)
            async for frame in tab.frames():
                if len(frame["message"]["text"]) > 5:
                    return

        asyncio.run(ask())
        shown = tab.live["message"]["text"]
        began = time.monotonic()
        runs.close()
        assert time.monotonic() - began < 3
        reply = tab.kept.path()[-1]
        assert reply.reason == "interrupted"
        assert reply.content.startswith(shown)
        store.close()

    def test_a_store_that_fails_takes_no_reply_with_it(self, engine):
        runs = Runs(engine)
        tab = Tab(runs)

        def fail(*_):
            raise RuntimeError("no")

        runs.store.update = fail
        frames = asyncio.run(tab.ask("say: written all the same"))
        assert frames[-1]["message"]["text"] == "written all the same"
        runs.store.close()


def hold(text: str):
    from streaming.engine.base import GenerationRequest

    return GenerationRequest(messages=[{"role": "user", "content": text}], max_new_tokens=20)
