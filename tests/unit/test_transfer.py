"""Conversations out to files and back: nothing is lost in our own format, and a bad file is refused at its line."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.conversations.plain import BEGIN
from streaming.conversations.store import Store
from streaming.conversations.transfer import FORMATS, read_conversations, write_feedback
from streaming.conversations.tree import Conversation, Message
from streaming.errors import ImportRefused

IMPORTS = Path(__file__).parents[1] / "fixtures" / "imports"
ME = "browser:me"

texts = st.text(st.characters(exclude_categories=["Cs"]))
names = st.text("abcdefXYZ-_019", min_size=1, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
replies = st.fixed_dictionaries(
    {
        "token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
        "in_reasoning": st.booleans(),
        "reason": st.sampled_from(["stop", "length", "cancelled", "error", "abandoned", "interrupted", "edited"]),
        "error": st.none() | texts,
        "model": texts,
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "settings": st.dictionaries(texts, json_values, max_size=3),
        "stats": st.dictionaries(texts, json_values, max_size=3),
        "rating": st.sampled_from([-1, 0, 1]),
        "note": texts,
    }
)
seconds = st.floats(0, 4e9)


@st.composite
def conversations(draw) -> Conversation:
    """Any tree of messages, and any path of it shown."""
    messages: dict[str, Message] = {}
    for message_id in draw(st.lists(names, max_size=6, unique=True)):
        role = draw(st.sampled_from(["user", "assistant"]))
        fields = draw(replies) if role == "assistant" else {}
        messages[message_id] = Message(
            role=role,
            content=draw(texts),
            parent=draw(st.none() | st.sampled_from(list(messages)) if messages else st.none()),
            id=message_id,
            created_at=draw(seconds),
            **fields,
        )
    return Conversation(
        owner=ME,
        id=draw(names),
        title=draw(texts),
        messages=messages,
        leaf=draw(st.none() | st.sampled_from(list(messages)) if messages else st.none()),
        pinned=draw(st.booleans()),
        created_at=draw(seconds),
        updated_at=draw(seconds),
    )


def chat(*turns: tuple[str, str], title: str = "A title", **settings) -> Conversation:
    conversation = Conversation(owner=ME)
    for role, text in turns:
        reply = {"reason": "stop", "settings": settings} if role == "assistant" else {}
        conversation = conversation.add(Message(role=role, content=text, parent=conversation.leaf, **reply))
    return dataclasses.replace(conversation, title=title)


def shown(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.path()]


def refusal(text: str) -> ImportRefused:
    with pytest.raises(ImportRefused) as refused:
        read_conversations(text, ME)
    message = str(refused.value)
    assert message.startswith(f"Line {refused.value.line:,}: ")
    assert message.endswith(". Nothing was imported.")
    assert "\n" not in message
    return refused.value


def line_at_fault(text: str) -> int:
    """Give the line for which a text is refused; 1 where it is not."""
    try:
        read_conversations(text, ME)
    except ImportRefused as refused:
        return refused.line
    return 1


class TestOwnJson:
    @given(st.lists(conversations(), max_size=3))
    def test_what_comes_back_is_the_same_byte_for_byte(self, several):
        text = FORMATS["json"].write(several)
        back = read_conversations(text, ME)
        assert back == several
        assert FORMATS["json"].write(back).encode() == text.encode()

    @given(st.lists(conversations(), max_size=3, unique_by=lambda c: c.id))
    def test_the_same_comes_back_by_way_of_the_store(self, several):
        text = FORMATS["json"].write(several)
        store = Store()
        ids = store.add(read_conversations(text, ME))
        assert ids == [c.id for c in several]
        assert FORMATS["json"].write(store.open(ME, i) for i in ids).encode() == text.encode()
        again = store.add(read_conversations(text, "account:ann"))
        assert not set(again) & set(ids)
        assert [dataclasses.replace(store.open("account:ann", i), id=c.id, owner=ME)
                for i, c in zip(again, several, strict=True)] == several  # fmt: skip
        store.close()

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, '"\\ud800"'])
    def test_numbers_and_texts_that_cannot_be_kept_are_told(self, value):
        conversation = dataclasses.replace(chat(("user", "hi")), created_at=5.5)
        text = FORMATS["json"].write([conversation]).replace('"created_at": 5.5', f'"created_at": {value}')
        assert refusal(text).line in (1, 2)

    def test_half_a_character_is_replaced_wherever_it_stands(self):
        conversation = chat(("user", "hi"), ("assistant", "there"), system_prompt="HERE")
        text = FORMATS["json"].write([conversation]).replace("HERE", r"\ud83c x").replace("A title", r"\udf89")
        [back] = read_conversations(text, ME)
        store = Store()
        store.add([back])
        assert store.open(ME, back.id) == back
        assert (back.title, back.path()[-1].settings["system_prompt"]) == ("�", "� x")
        store.close()

    def test_it_belongs_to_whoever_imports_it(self):
        [back] = read_conversations(FORMATS["json"].write([chat(("user", "hi"))]), "account:ann")
        assert back.owner == "account:ann"
        assert ME not in FORMATS["json"].write([chat(("user", "hi"))])

    def test_a_reply_that_is_being_written_comes_back_as_cut_off(self):
        conversation = chat(("user", "hi"))
        conversation = conversation.add(Message(role="assistant", content="Hel", parent=conversation.leaf))
        text = FORMATS["json"].write([conversation])
        [back] = read_conversations(text, ME)
        assert back.path()[-1].reason == "interrupted"
        assert FORMATS["json"].write([back]) == text

    def test_a_later_version_is_refused_rather_than_half_read(self):
        text = FORMATS["json"].write([]).replace('"version": 1', '"version": 2')
        assert "version 2" in str(refusal(text))

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ('"role": "assistant"', '"role": "robot"', "'role' must be user or assistant, not 'robot'"),
            ('"content": "two"', '"content": 2', "'content' must be text"),
            ('"rating": 1', '"rating": 5', "'rating' must be"),
            ('"token_ids": [7]', '"token_ids": [-7]', "'token_ids'"),
            ('"token_ids": [7]', '"token_ids": [true]', "'token_ids'"),
            ('"reason": "stop"', '"reason": "boredom"', "'reason' must be"),
            ('"parent": "q"', '"parent": "x"', "answers 'x', which does not come before it"),
            ('"id": "a"', '"id": "q"', "two messages with the id 'q'"),
            ('"in_reasoning": false, "reason": "stop"', '"reason": "stop"', "'in_reasoning' must be true or false"),
        ],
    )
    def test_a_wrong_field_is_told_with_its_line(self, old, new, words):
        question = Message(role="user", content="one", id="q", created_at=1.0)
        answer = Message(role="assistant", content="two", id="a", parent="q", created_at=2.0, reason="stop",
                         token_ids=(7,), rating=1)  # fmt: skip
        conversation = Conversation(owner=ME).add(question).add(answer)
        text = FORMATS["json"].write([chat(("user", "before")), conversation])
        assert text.count(old) == 1
        refused = refusal(text.replace(old, new))
        assert words in str(refused)
        assert refused.line == next(i for i, line in enumerate(text.split("\n"), 1) if old in line)

    def test_a_missing_leaf_is_refused(self):
        conversation = chat(("user", "hi"))
        text = FORMATS["json"].write([conversation]).replace(f'"leaf": "{conversation.leaf}"', '"leaf": "gone"')
        assert refusal(text).line == 2

    def test_what_is_cut_off_is_told_with_its_line(self):
        text = FORMATS["json"].write([chat(("user", "one"), ("assistant", "two"))])
        refused = refusal(text[: text.index('"two"')])
        assert "not JSON" in str(refused)
        assert refused.line == 4


class TestMarkdown:
    @given(st.lists(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1), min_size=1))
    def test_what_is_shown_comes_back(self, several):
        written = [chat(*turns, title=f"Title {i}") for i, turns in enumerate(several)]
        back = read_conversations(FORMATS["markdown"].write(written), ME)
        assert [shown(c) for c in back] == several
        assert [c.title for c in back] == [c.title for c in written]

    @pytest.mark.parametrize(
        "line", ["## You", "## Assistant", "\\## You", "\\\\## Assistant", BEGIN, "# Title", "---"]
    )
    def test_a_message_may_read_like_a_mark(self, line):
        turns = [("user", f"{line}\n\n{line}"), ("assistant", line), ("user", f"\n{line}\n")]
        [back] = read_conversations(FORMATS["markdown"].write([chat(*turns)]), ME)
        assert shown(back) == turns

    def test_it_reads_well(self):
        written = FORMATS["markdown"].write([chat(("user", "Hi"), ("assistant", "Hello."), title="Greetings")])
        assert written == f"{BEGIN}\n# Greetings\n\n## You\n\nHi\n\n## Assistant\n\nHello.\n\n"

    def test_a_missing_title_is_told_with_its_line(self):
        assert refusal(f"{BEGIN}\n## You\n\nHi\n").line == 2


class TestMessages:
    @pytest.mark.parametrize("name", ["openai", "sharegpt"])
    def test_what_is_shown_comes_back_with_its_system_prompt(self, name):
        several = [
            [("user", "a\nb\u2028c"), ("assistant", "ü🎉")],
            [("user", "x"), ("assistant", "y"), ("user", "z")],
        ]
        written = FORMATS[name].write([chat(*turns, system_prompt="Be brief.") for turns in several])
        assert written.count("\n") == 2
        back = read_conversations(written, ME)
        assert [shown(c) for c in back] == several
        assert FORMATS["openai"].write(back) == FORMATS["openai"].write(read_conversations(written, ME))
        assert json.loads(FORMATS["openai"].write(back).split("\n")[0])["messages"][0] == {
            "role": "system",
            "content": "Be brief.",
        }

    def test_sharegpts_usual_files_are_lists(self):
        text = json.dumps(
            [{"id": "1", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
        )
        [back] = read_conversations(text, ME)
        assert shown(back) == [("user", "q"), ("assistant", "a")]
        assert back.title == "q"

    def test_content_in_parts_is_put_together_and_tools_are_left_out(self):
        parts = [
            {"type": "text", "text": "one "},
            {"type": "image_url", "image_url": {"url": "x"}},
            {"type": "text", "text": "two"},
        ]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "Done."},
        ]
        [back] = read_conversations(json.dumps({"messages": messages}), ME)
        assert shown(back)[0] == ("user", "one two")
        assert shown(back)[-1] == ("assistant", "Done.")

    def test_a_bad_line_is_the_one_that_is_told(self):
        good = '{"messages": [{"role": "user", "content": "hi"}]}\n'
        assert refusal(good + "\n" + good + '{"messages": [}\n').line == 4
        assert refusal(good + '{"messages": [{"role": "pirate", "content": "ahoy"}]}\n').line == 2
        assert refusal(good + '{"text": "no messages"}\n').line == 2
        assert refusal(good + "[1]\n").line == 2


class TestOthers:
    def test_chatgpts_export_keeps_its_branches_and_the_path_that_was_shown(self):
        [back] = read_conversations((IMPORTS / "chatgpt.json").read_text(), ME)
        assert back.title == "Rivers of Europe"
        assert shown(back) == [
            ("user", "Which river is the longest?"),
            ("assistant", "The Volga, with 3,530 km."),
            ("user", "And this one?"),
            ("assistant", "That is the Danube 🏞️."),
        ]
        assert [m.content for m in back.siblings("a-1a")] == ["The Volga, with 3,530 km.", "The Volga."]
        assert [m.model for m in back.siblings("a-1a")] == ["gpt-4o", "gpt-4o-mini"]
        assert (back.created_at, back.updated_at) == (1718000000.123, 1718000420.5)
        assert all(m.reason == "stop" for m in back.messages.values() if m.role == "assistant")

    def test_open_webuis_export_keeps_its_branches_and_the_path_that_was_shown(self):
        [back] = read_conversations((IMPORTS / "open-webui.json").read_text(), ME)
        assert (back.title, back.pinned) == ("🌧️ Rainy Sunday", True)
        assert shown(back) == [("user", "Ideas for a rainy Sunday?"), ("assistant", "Read a book.")]
        assert [m.content for m in back.siblings("m-2")] == ["Read a book.", "Bake bread."]
        assert (back.created_at, back.updated_at) == (1731000000, 1731000061)

    @pytest.mark.parametrize("name", ["chatgpt", "open-webui"])
    def test_they_can_be_exported_again(self, name):
        several = read_conversations((IMPORTS / f"{name}.json").read_text(), ME)
        assert read_conversations(FORMATS["json"].write(several), ME) == several

    def test_a_loop_is_left_out_rather_than_walked_for_ever(self):
        nodes = {
            name: {"id": name, "parentId": parent, "role": "user", "content": name}
            for name, parent in {"a": None, "x": "y", "y": "x", "b": "a"}.items()
        }
        text = json.dumps([{"title": "", "chat": {"history": {"messages": nodes, "currentId": "b"}}}])
        [back] = read_conversations(text, ME)
        assert shown(back) == [("user", "a"), ("user", "b")]

    def test_what_is_wrong_deep_inside_is_told_with_its_line(self):
        text = (IMPORTS / "chatgpt.json").read_text()
        at = '"author": {"role": "tool", "name": "web", "metadata": {}}'
        refused = refusal(text.replace(at, '"author": {"role": 7}'))
        assert refused.line == next(i for i, line in enumerate(text.split("\n"), 1) if at in line)
        assert "'role' must be text" in str(refused)


class TestAnyFile:
    @pytest.mark.parametrize(
        "text", ["", "\n\n", "hello", "<html>", "title,text\na,b", "[1, 2]", "{}", "[", "nul", "[[]]"]
    )
    def test_what_is_no_conversation_is_refused(self, text):
        refusal(text)

    @given(texts)
    def test_nothing_breaks_it(self, text):
        for candidate in (text, "{" + text, f'{{"messages": [{text}]}}', BEGIN + text):
            assert 1 <= line_at_fault(candidate) <= candidate.count("\n") + 2

    @given(json_values, st.sampled_from(["messages", "conversations", "mapping", "chat", "history", "format"]))
    def test_no_json_breaks_it(self, value, key):
        for document in (value, {key: value}, [{key: [value]}], {key: {"a": value}}):
            text = json.dumps(document, indent=1)
            assert 1 <= line_at_fault(text) <= text.count("\n") + 1

    def test_too_much_nesting_is_refused(self):
        refusal("[" * 100_000)

    def test_a_byte_order_mark_is_no_harm(self):
        [back] = read_conversations("\ufeff" + FORMATS["json"].write([chat(("user", "hi"))]), ME)
        assert shown(back) == [("user", "hi")]


def test_feedback_is_written_with_what_it_is_about():
    conversation = chat(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    rated = dataclasses.replace(conversation.path()[1], rating=-1, note="too short", model="m", seed=3)
    conversation = conversation.change(rated)
    [line] = write_feedback([conversation, chat(("user", "x"), ("assistant", "y"))]).splitlines()
    written = json.loads(line)
    assert (written["rating"], written["note"], written["reply"], written["model"]) == (-1, "too short", "two", "m")
    assert written["messages"] == [{"role": "user", "content": "one"}]
