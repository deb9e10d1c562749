"""The store: what is kept stays, for its owner alone, and no trouble with the file ends a chat."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from streaming.conversations import schema
from streaming.conversations.database import NAME
from streaming.conversations.store import DELETED_KEPT_S, Store
from streaming.conversations.tree import Conversation, Message

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "conversations"


def conversation(*contents: str, owner: str = "ada") -> Conversation:
    made = Conversation(owner=owner)
    for i, content in enumerate(contents):
        role = ("user", "assistant")[i % 2]
        reason = "stop" if role == "assistant" else None
        made = made.add(Message(role=role, content=content, parent=made.leaf, reason=reason))
    return made


def kept(store: Store, *contents: str, owner: str = "ada") -> Conversation:
    made = conversation(*contents, owner=owner)
    store.save(made, made.messages.values())
    return made


def titles(store: Store, owner: str = "ada") -> list[str]:
    return [summary.title for summary in store.recent(owner)]


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()


class TestKeeping:
    def test_what_was_kept_is_there_after_a_restart(self, tmp_path):
        store = Store(tmp_path)
        made = kept(store, "question", "日本語 and 👩‍👩‍👧\0\r\n")
        reply = Message(
            role="assistant",
            content="grown",
            parent=made.path()[0].id,
            token_ids=(0, 1, 2**32 - 1),
            in_reasoning=True,
            model="tiny",
            seed=2**63 - 1,
            settings={"temperature": 0.7, "stop": ["é"]},
        )
        made = made.add(reply)
        store.save(made, [reply])
        store.close()
        again = Store(tmp_path)
        assert again.notice == ""
        found = again.open("ada", made.id)
        assert found.messages[reply.id].reason == "interrupted"
        assert found == made.change(found.messages[reply.id])
        again.close()

    def test_a_growing_reply_keeps_what_people_said_of_it(self, store):
        made = kept(store, "question", "answer")
        reply = made.path()[-1]
        store.rate("ada", made.id, reply.id, -1, "wrong")
        store.update(made.id, Message(role="assistant", content="answer and more", id=reply.id, reason="length"))
        found = store.open("ada", made.id).messages[reply.id]
        assert (found.content, found.reason, found.rating, found.note) == ("answer and more", "length", -1, "wrong")

    def test_the_list_has_pinned_ones_first_and_then_the_newest(self, store):
        first, second, third = (kept(store, text) for text in ("first", "second", "third"))
        assert titles(store) == ["third", "second", "first"]
        store.pin("ada", second.id, True)
        more = Message(role="user", content="again", parent=first.leaf)
        store.save(first.add(more), [more])
        assert titles(store) == ["second", "first", "third"]
        store.rename("ada", third.id, "renamed")
        assert titles(store) == ["second", "first", "renamed"]

    def test_what_was_refused_is_taken_out_again(self, store):
        made = kept(store, "kept", "answer")
        refused = Message(role="user", content="too long", parent=made.leaf)
        store.save(made.add(refused), [refused])
        store.remove(made, [refused.id])
        assert store.open("ada", made.id).path() == made.path()
        assert store.search("ada", "too long") == []
        new = kept(store, "refused at once")
        store.remove(new.without([new.leaf], None), [new.leaf])
        assert titles(store) == ["kept"]

    def test_many_threads_at_once_lose_nothing(self, tmp_path):
        store = Store(tmp_path)
        threads = [threading.Thread(target=lambda i=i: [kept(store, f"{i} {k}") for k in range(20)]) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(titles(store)) == sorted(f"{i} {k}" for i in range(8) for k in range(20))
        store.close()


class TestDeleting:
    def test_a_deleted_conversation_is_out_of_sight_and_can_be_had_back(self, store):
        made = kept(store, "a question", "an answer")
        store.delete("ada", made.id)
        assert (titles(store), store.open("ada", made.id), store.search("ada", "question")) == ([], None, [])
        store.restore("ada", made.id)
        assert store.open("ada", made.id) == made
        assert len(store.search("ada", "question")) == 1

    def test_after_a_while_it_is_gone_for_good_and_the_rest_is_not(self, store, monkeypatch):
        gone, stays = kept(store, "gone", "gone too"), kept(store, "stays")
        store.delete("ada", gone.id)
        store.purge()
        store.restore("ada", gone.id)
        assert store.open("ada", gone.id) == gone
        store.delete("ada", gone.id)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + DELETED_KEPT_S + 60)
        store.purge()
        store.restore("ada", gone.id)
        assert titles(store) == ["stays"]
        assert store.open("ada", stays.id) == stays
        assert store._database.run(lambda db: db.execute("SELECT count(*) FROM message").fetchone()[0]) == 1
        assert store._database.run(lambda db: db.execute("SELECT count(*) FROM search").fetchone()[0]) == 1


class TestOwners:
    def test_nobody_reaches_anothers(self, store):
        made = kept(store, "a secret", "an answer")
        reply = made.path()[-1]
        assert store.open("bob", made.id) is None
        assert store.recent("bob") == []
        assert store.search("bob", "secret") == []
        store.rename("bob", made.id, "taken")
        store.pin("bob", made.id, True)
        store.delete("bob", made.id)
        store.rate("bob", made.id, reply.id, 1, "mine")
        theirs = Conversation(owner="bob", id=made.id).add(Message(role="user", content="mine"))
        store.save(theirs, theirs.messages.values())
        store.remove(Conversation(owner="bob", id=made.id), list(made.messages))
        assert store.open("ada", made.id) == made


class TestSearching:
    def test_words_are_found_in_every_language_and_case(self, store):
        english = kept(store, "The Brook runs", "downhill, past the MILL")
        japanese = kept(store, "日本語のテキスト", "回答")
        assert [hit.id for hit in store.search("ada", "mill")] == [english.id]
        assert [hit.id for hit in store.search("ada", "past hill")] == [english.id]
        assert [hit.id for hit in store.search("ada", "テキスト")] == [japanese.id]
        assert [hit.id for hit in store.search("ada", "回答")] == [japanese.id]
        assert [hit.id for hit in store.search("ada", "回答 テキスト")] == []
        assert store.search("ada", "  ") == []

    def test_signs_in_a_search_are_text(self, store):
        made = kept(store, '100 % "sure" AND not_this OR *that*')
        for words in ('"sure"', "%", "_", "AND not", "*that*", "100 % OR"):
            assert [hit.id for hit in store.search("ada", words)] == [made.id], words
        for words in ("0_", "%%", 'x" OR "sure', "NOT sure*"):
            assert store.search("ada", words) == [], words

    def test_a_hit_tells_the_message_and_what_stands_there(self, store):
        made = kept(store, "word " * 100 + "needle " + "word " * 100, "answer")
        [hit] = store.search("ada", "needle")
        assert hit.message_id == made.path()[0].id
        assert "needle" in hit.excerpt
        assert hit.excerpt.startswith("…")
        assert hit.excerpt.endswith("…")

    def test_a_reply_is_found_once_it_stands_still(self, store):
        made = conversation("question")
        reply = Message(role="assistant", content="", parent=made.leaf)
        made = made.add(reply)
        store.save(made, made.messages.values())
        store.update(made.id, Message(role="assistant", content="half an answer", id=reply.id))
        assert store.search("ada", "answer") == []
        store.update(made.id, Message(role="assistant", content="an answer", id=reply.id, reason="stop"))
        assert len(store.search("ada", "answer")) == 1
        assert store.search("ada", "half") == []


class TestVersions:
    def test_every_older_version_is_brought_forward(self, tmp_path):
        fixtures = sorted(FIXTURES.glob("v*.sql"))
        assert [path.stem for path in fixtures] == [f"v{number + 1}" for number in range(schema.VERSION)]
        for path in fixtures:
            folder = tmp_path / path.stem
            folder.mkdir()
            with sqlite3.connect(folder / NAME) as db:
                db.executescript(path.read_text("utf-8"))
            db.close()
            store = Store(folder)
            assert store.notice == ""
            [summary] = store.recent("browser:ada")
            found = store.open("browser:ada", summary.id)
            assert [(m.role, m.content, m.reason) for m in found.path()] == [
                ("user", "Why is the sky blue? 青", None),
                ("assistant", "Because of Rayleigh", "interrupted"),
            ]
            assert found.path()[-1].token_ids == (1, 70000)
            assert [hit.id for hit in store.search("browser:ada", "rayleigh")] == [summary.id]
            store.close()

    def test_a_step_that_fails_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        store = Store(tmp_path)
        made = kept(store, "kept")
        store.close()
        monkeypatch.setattr(
            schema, "MIGRATIONS", (*schema.MIGRATIONS, "ALTER TABLE message ADD COLUMN x TEXT; SELECT x FROM absent")
        )
        monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            Store(tmp_path)
        monkeypatch.undo()
        again = Store(tmp_path)
        assert again.open("ada", made.id) == made
        again.close()

    def test_a_newer_file_is_left_alone(self, tmp_path):
        with sqlite3.connect(tmp_path / NAME) as db:
            db.execute("PRAGMA user_version = 999")
        db.close()
        before = (tmp_path / NAME).read_bytes()
        store = Store(tmp_path)
        assert "was written by a newer Brook" in store.notice
        kept(store, "goes on")
        assert titles(store) == ["goes on"]
        store.close()
        assert (tmp_path / NAME).read_bytes() == before


def hold_lock(folder: Path) -> sqlite3.Connection:
    other = sqlite3.connect(folder / NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


class TestTrouble:
    """Each kind of trouble, met at the start and on the way: the chat goes on, and one sentence says so."""

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr("streaming.conversations.database.BUSY_TIMEOUT_S", 0.05)

    def goes_on(self, store: Store) -> None:
        before = titles(store)
        made = kept(store, "goes on", "in memory")
        assert titles(store) == ["goes on", *before]
        assert store.open("ada", made.id) == made
        assert store.notice.endswith("conversations are kept only until Brook ends.")
        assert "\n" not in store.notice

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda db: db.execute("PRAGMA query_only = 1"), "cannot be written"),
            (lambda db: db.execute("PRAGMA max_page_count = 1"), "has no room left on its disk"),
        ],
    )
    def test_a_file_that_fails_on_the_way(self, tmp_path, spoil, words):
        store = Store(tmp_path)
        made = kept(store, "before")
        spoil(store._database._connection)
        big = kept(store, "x" * 100_000)
        assert words in store.notice
        assert store.open("ada", made.id) == made
        assert store.open("ada", big.id) == big
        store.rename("ada", big.id, "big")
        self.goes_on(store)
        store.close()
        again = Store(tmp_path)
        assert titles(again) == ["before"]
        again.close()

    def test_a_file_that_is_locked_on_the_way(self, tmp_path):
        store = Store(tmp_path)
        kept(store, "before")
        other = hold_lock(tmp_path)
        self.goes_on(store)
        assert "is locked by another program" in store.notice
        assert titles(store) == ["goes on", "before"]
        store.close()
        other.close()

    def test_a_file_that_is_locked_at_the_start(self, tmp_path):
        Store(tmp_path).close()
        other = hold_lock(tmp_path)
        store = Store(tmp_path)
        assert "is locked by another program" in store.notice
        self.goes_on(store)
        store.close()
        other.close()

    @pytest.mark.parametrize("content", [b"this is no database" * 1000, None])
    def test_a_damaged_file_is_set_aside_whole(self, tmp_path, content):
        store = Store(tmp_path)
        for i in range(50):
            kept(store, f"before {i}", "x" * 2000)
        store.close()
        path = tmp_path / NAME
        if content is None:  # a page in the middle is lost
            content = path.read_bytes()
            content = content[: len(content) // 2] + b"\xff" * 8192 + content[len(content) // 2 + 8192 :]
        path.write_bytes(content)
        store = Store(tmp_path)
        [aside] = tmp_path.glob("conversations-damaged-*.db")
        assert str(aside) in store.notice
        assert aside.read_bytes() == content
        made = kept(store, "begun anew")
        store.close()
        again = Store(tmp_path)
        assert again.notice == ""
        assert again.open("ada", made.id) == made
        again.close()

    def test_damage_met_on_the_way(self, tmp_path):
        store = Store(tmp_path)
        for i in range(50):
            kept(store, f"before {i}", "x" * 2000)
        store._database.run(lambda db: None)
        store._database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store._database._connection.execute("PRAGMA cache_size = 0")
        path = tmp_path / NAME
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        store._database._connection.execute("PRAGMA shrink_memory")
        kept(store, "y" * 5000)
        assert "is damaged" in store.notice
        self.goes_on(store)
        store.close()

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
    def test_a_folder_that_cannot_be_made(self):
        store = Store(Path("/proc/brook"))
        assert "cannot be written" in store.notice
        self.goes_on(store)
        store.close()

    def test_a_mistake_in_the_code_is_no_trouble_with_the_file(self, tmp_path):
        store = Store(tmp_path)
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            store._database.run(lambda db: db.execute("SELECT * FROM absent"))
        assert store.notice == ""
        store.close()


class TestTwoServers:
    def test_the_second_goes_on_in_memory_and_leaves_the_first_alone(self, tmp_path):
        first, second = Store(tmp_path), Store(tmp_path)
        made = kept(first, "in the first")
        reply = Message(role="assistant", content="being written", parent=made.leaf)
        first.save(made.add(reply), [reply])
        third = Store(tmp_path)
        for other in (second, third):
            assert "Another Brook uses" in other.notice
            kept(other, "in memory")
            assert titles(other) == ["in memory"]
            other.close()
        assert first.notice == ""
        assert first.open("ada", made.id).path()[-1].reason is None
        first.close()
        again = Store(tmp_path)
        assert again.notice == ""
        assert titles(again) == ["in the first"]
        again.close()

    def test_a_killed_process_leaves_no_lock_and_all_that_it_kept(self, tmp_path):
        code = (
            "import sys, time; from pathlib import Path; from streaming.conversations.store import Store\n"
            "from streaming.conversations.tree import Conversation, Message\n"
            "store = Store(Path(sys.argv[1]))\n"
            "made = Conversation(owner='ada').add(Message(role='user', content='a'))\n"
            "store.save(made, made.messages.values()); print('kept', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "kept\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        store = Store(tmp_path)
        assert store.notice == ""
        assert titles(store) == ["a"]
        store.close()
