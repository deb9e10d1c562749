"""The tree of a conversation: whatever people do, every message stays reachable and what is shown is one path."""

import itertools
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from streaming.conversations.store import Store
from streaming.conversations.tree import NEW_TITLE, Conversation, Message
from streaming.errors import ConversationInvalid


def exchange(conversation: Conversation, asked: str, answered: str, parent: str | None = None) -> Conversation:
    question = Message(role="user", content=asked, parent=parent or conversation.leaf)
    return conversation.add(question).add(Message(role="assistant", content=answered, parent=question.id))


def words(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.path()]


class TestPaths:
    def test_an_edit_is_a_sibling_and_both_can_be_shown(self):
        first = exchange(exchange(Conversation(owner="ada"), "a", "A"), "b", "B")
        edited = exchange(first, "b2", "B2", parent=first.path()[1].id)
        assert words(edited) == ["a", "A", "b2", "B2"]
        b, b2 = edited.siblings(edited.path()[2].id)
        assert [b.content, b2.content] == ["b", "b2"]
        assert words(edited.select(b.id)) == ["a", "A", "b", "B"]
        assert words(edited.select(b.id).select(b2.id)) == ["a", "A", "b2", "B2"]

    def test_selecting_goes_on_through_the_newest(self):
        conversation = exchange(Conversation(owner="ada"), "a", "A1")
        question = conversation.path()[0]
        conversation = conversation.add(Message(role="assistant", content="A2", parent=question.id))
        assert words(conversation.select(question.id)) == ["a", "A2"]

    def test_undo_shows_less_and_loses_nothing(self):
        conversation = exchange(exchange(Conversation(owner="ada"), "a", "A"), "b", "B")
        undone = conversation.undo()
        assert words(undone) == ["a", "A"]
        assert undone.messages == conversation.messages
        assert words(undone.undo()) == []
        assert undone.undo().undo() == undone.undo()
        assert words(exchange(undone.undo(), "c", "C")) == ["c", "C"]

    def test_the_first_message_of_a_person_gives_the_title(self):
        conversation = Conversation(owner="ada")
        assert conversation.title == NEW_TITLE
        assert exchange(conversation, "a\nvery " + "long " * 40, "A").title == "a very " + "long " * 8 + "…"
        assert exchange(exchange(conversation, "a", "A"), "b", "B").title == "a"

    def test_a_message_that_answers_none_or_is_there_twice_is_refused(self):
        message = Message(role="user", content="a")
        conversation = Conversation(owner="ada").add(message)
        with pytest.raises(ConversationInvalid, match="two messages with the id"):
            conversation.add(message)
        with pytest.raises(ConversationInvalid, match="which is not there"):
            conversation.add(Message(role="user", content="b", parent="elsewhere"))

    def test_ids_are_long_and_never_the_same(self):
        ids = {Message(role="user", content="").id for _ in range(1000)}
        assert len(ids) == 1000
        assert min(map(len, ids)) >= 22

    def test_half_a_character_becomes_a_sign_that_can_be_stored(self):
        assert Message(role="user", content="a\ud83d").content == "a\ufffd"
        assert Message(role="user", content="a\ud83d\ude00").content == "a😀"

    def test_what_can_be_gone_on_with(self):
        def can(reason):
            return Message(role="assistant", content="", reason=reason).can_continue

        assert [
            r for r in ("stop", "length", "cancelled", "error", "abandoned", "interrupted", "edited") if can(r)
        ] == [
            "length",
            "cancelled",
            "abandoned",
            "interrupted",
            "edited",
        ]
        assert not Message(role="user", content="", reason="length").can_continue


class Conversing(RuleBasedStateMachine):
    """What people do with conversations, kept in a store; each step checks that it gives back what was done."""

    conversations = Bundle("conversations")
    texts = st.text(max_size=12)

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.known: dict[str, Conversation] = {}

    def teardown(self) -> None:
        self.store.close()

    def keep(self, conversation: Conversation, *new: Message) -> None:
        self.known[conversation.id] = conversation
        self.store.save(conversation, new)

    @rule(target=conversations)
    def begin(self) -> str:
        conversation = Conversation(owner="ada")
        self.keep(conversation)
        return conversation.id

    @rule(conversation_id=conversations, text=texts, ids=st.lists(st.integers(0, 2**32 - 1), max_size=5))
    def send(self, conversation_id: str, text: str, ids: list[int]) -> None:
        conversation = self.known.get(conversation_id)
        if conversation is None:
            return
        question = Message(role="user", content=text, parent=conversation.leaf)
        reply = Message(role="assistant", content="", parent=question.id)
        self.keep(conversation.add(question).add(reply), question, reply)
        self.grow(conversation_id, reply.id, text, ids)

    def grow(self, conversation_id: str, reply_id: str, text: str, ids: list[int]) -> None:
        conversation = self.known[conversation_id]
        reply = conversation.messages[reply_id]
        grown = Message(
            **{name: getattr(reply, name) for name in ("role", "parent", "id", "created_at")},
            content=reply.content + text,
            token_ids=(*reply.token_ids, *ids),
            reason="length",
            model="tiny",
            seed=7,
            settings={"temperature": 0.5, "stop": ["é"]},
            stats={"n_generated_tokens": len(ids)},
        )
        self.known[conversation_id] = conversation.change(grown)
        self.store.update(conversation_id, grown)

    @rule(conversation_id=conversations, pick=st.integers(0), text=texts)
    def edit(self, conversation_id: str, pick: int, text: str) -> None:
        conversation = self.known.get(conversation_id)
        if conversation is None or not conversation.path():
            return
        old = conversation.path()[pick % len(conversation.path())]
        new = Message(role=old.role, content=text, parent=old.parent, reason="edited")
        self.keep(conversation.add(new), new)

    @rule(conversation_id=conversations, text=texts)
    def regenerate(self, conversation_id: str, text: str) -> None:
        conversation = self.known.get(conversation_id)
        if conversation is None or not conversation.path() or conversation.path()[-1].role == "user":
            return
        reply = Message(role="assistant", content="", parent=conversation.path()[-1].parent)
        self.keep(conversation.add(reply), reply)
        self.grow(conversation_id, reply.id, text, [])

    @rule(conversation_id=conversations, pick=st.integers(0))
    def switch(self, conversation_id: str, pick: int) -> None:
        conversation = self.known.get(conversation_id)
        if conversation is not None and conversation.messages:
            message_id = list(conversation.messages)[pick % len(conversation.messages)]
            self.keep(conversation.select(message_id))
            assert message_id in [message.id for message in self.known[conversation_id].path()]

    @rule(conversation_id=conversations)
    def undo(self, conversation_id: str) -> None:
        if conversation_id in self.known:
            self.keep(self.known[conversation_id].undo())

    @rule(conversation_id=conversations, for_good=st.booleans())
    def delete(self, conversation_id: str, for_good: bool) -> None:
        self.store.delete("ada", conversation_id)
        assert self.store.open("ada", conversation_id) is None
        if for_good:
            self.known.pop(conversation_id, None)
        elif conversation_id in self.known:
            self.store.restore("ada", conversation_id)

    @rule(target=conversations, conversation_id=conversations)
    def bring_in(self, conversation_id: str) -> str:
        """Take the messages of a conversation into another, as an import does, parents first."""
        copy = Conversation(owner="ada")
        for message in self.known[conversation_id].messages.values() if conversation_id in self.known else ():
            copy = copy.add(message)
        self.keep(copy, *copy.messages.values())
        return copy.id

    @invariant()
    def what_was_done_is_kept(self) -> None:
        for conversation in self.known.values():
            assert self.store.open("ada", conversation.id) == conversation
            assert self.store.open("bob", conversation.id) is None
        assert {summary.id for summary in self.store.recent("ada")} == set(self.known)

    @invariant()
    def every_message_can_be_reached_and_what_is_shown_is_one_path(self) -> None:
        for conversation in self.known.values():
            path = conversation.path()
            assert (path[-1].id if path else None) == conversation.leaf
            assert [m.parent for m in path] == [None, *(m.id for m in path[:-1])][: len(path)]
            for message in conversation.messages.values():
                assert message in conversation.select(message.id).path()
                assert message in conversation.siblings(message.id)
            below = itertools.chain.from_iterable(conversation.children(i) for i in (None, *conversation.messages))
            assert sorted(m.id for m in below) == sorted(conversation.messages)


Conversing.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestConversing = Conversing.TestCase


def test_a_long_conversation_is_walked_in_no_time():
    messages: dict[str, Message] = {}
    parent = None
    for i in range(2000):
        message = Message(role="user" if i % 2 == 0 else "assistant", content=str(i), parent=parent)
        messages[message.id], parent = message, message.id
    conversation = Conversation(owner="ada", messages=messages, leaf=parent)
    began = time.perf_counter()
    assert len(conversation.path()) == 2000
    assert conversation.select(next(iter(messages))).leaf == parent
    assert time.perf_counter() - began < 1
