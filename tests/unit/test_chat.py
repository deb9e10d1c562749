"""Messages become ids: text stays text, turns stay token-exact, old turns leave first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.chat import encode_chat, encode_opening, encode_text
from streaming.errors import InvalidRequest, PromptTooLong
from tests.tiny import CONTROL_TOKENS, SYSTEM_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
START, END = 257, 258
NO_LIMIT = 10**9


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def reply(text: str, token_ids: list[int] | None = None) -> dict:
    return {"role": "assistant", "content": text, "token_ids": token_ids}


def plain(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)


def turn(role: str, ids: list[int]) -> list[int]:
    return [START, *plain(f"{role}\n"), *ids, END, *plain("\n")]


OPENING = [START, *plain("assistant\n")]


def test_the_template_is_the_models():
    ids = encode_chat(TOKENIZER, [user("hi")], NO_LIMIT).ids
    assert list(ids) == [*turn("user", plain("hi")), *OPENING]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3))
def test_the_opening_is_what_every_chat_begins_with(texts):
    tokenizer = byte_tokenizer(SYSTEM_TEMPLATE)
    opening = encode_opening(tokenizer, (), NO_LIMIT)
    assert list(opening) == [*turn("system", plain("You are a helpful model.")), START, *plain("user\n")]
    ids = encode_chat(tokenizer, [message for text in texts for message in (user(text), reply("so"))], NO_LIMIT).ids
    assert ids[: len(opening)] == opening


@given(st.text(max_size=40), st.sampled_from(CONTROL_TOKENS), st.text(max_size=40))
def test_text_never_becomes_a_control_token(before, token, after):
    message = before + token + after
    assert list(encode_chat(TOKENIZER, [user(message)], NO_LIMIT).ids).count(END) == 1
    assert not {256, 257, 258} & set(encode_text(TOKENIZER, message, NO_LIMIT))


def test_a_reply_is_carried_on_as_the_ids_that_were_generated():
    unusual = [*plain("4"), *plain("2")]  # ids that no encoding of the text would give, were they merged
    odd = [10, 20, 30]
    messages = [user("one"), reply("42", unusual), user("two"), reply("text that differs", odd), user("three")]
    ids = encode_chat(TOKENIZER, messages, NO_LIMIT).ids
    assert list(ids) == [
        *turn("user", plain("one")),
        *turn("assistant", unusual),
        *turn("user", plain("two")),
        *turn("assistant", odd),
        *turn("user", plain("three")),
        *OPENING,
    ]


def test_a_reply_without_ids_is_encoded_from_its_text():
    messages = [user("one"), reply("first", [1, 2]), user("two"), reply("second"), user("three")]
    ids = encode_chat(TOKENIZER, messages, NO_LIMIT).ids
    assert list(ids) == [
        *turn("user", plain("one")),
        *turn("assistant", [1, 2]),
        *turn("user", plain("two")),
        *turn("assistant", plain("second")),
        *turn("user", plain("three")),
        *OPENING,
    ]


MIXED = st.lists(st.sampled_from(["<|im_end|>", "x", " "]), max_size=6).map("".join)


@settings(max_examples=50)
@given(st.lists(MIXED, min_size=2, max_size=5))
def test_nobody_can_write_what_stands_in_for_a_reply(texts):
    messages = [m for text in texts for m in (user(text), reply("r", [7]))]
    ids = list(encode_chat(TOKENIZER, [*messages, user("end")], NO_LIMIT).ids)
    expected = [i for text in texts for i in (*turn("user", plain(text)), *turn("assistant", [7]))]
    assert ids == [*expected, *turn("user", plain("end")), *OPENING]


def test_a_template_that_changes_replies_is_obeyed():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'].strip()")
    messages = [user("one"), reply(" spaced ", plain(" spaced ")), user("two")]
    assert list(encode_chat(tokenizer, messages, NO_LIMIT).ids) == [
        *turn("user", plain("one")),
        *turn("assistant", plain("spaced")),
        *turn("user", plain("two")),
        *OPENING,
    ]


def test_a_model_without_a_template_gets_plain_turns():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "system", "content": "Be kind."}, user("hi"), reply("hello", plain("hello")), user("bye")]
    ids = encode_chat(tokenizer, messages, NO_LIMIT).ids
    assert tokenizer.decode(ids) == "Be kind.\n\nUser: hi\nAssistant: hello\nUser: bye\nAssistant:"


class TestFitting:
    system = {"role": "system", "content": "stay"}  # noqa: RUF012 - never changed

    def n_tokens(self, messages):
        return len(encode_chat(TOKENIZER, messages, NO_LIMIT).ids)

    def test_the_oldest_turns_leave_first_and_are_counted(self):
        chat = [
            self.system,
            *(m for i in range(6) for m in (user(f"question {i}"), reply(f"answer {i}"))),
            user("last"),
        ]
        kept = [self.system, *chat[9:]]
        fitted = encode_chat(TOKENIZER, chat, self.n_tokens(kept))
        assert fitted.ids == encode_chat(TOKENIZER, kept, NO_LIMIT).ids
        assert fitted.n_dropped_messages == 8
        tighter = encode_chat(TOKENIZER, chat, self.n_tokens(kept) - 1)
        assert tighter.n_dropped_messages == 10

    def test_the_system_prompt_and_the_last_message_always_stay(self):
        chat = [self.system, user("x" * 500), reply("y" * 500), user("last")]
        fitted = encode_chat(TOKENIZER, chat, self.n_tokens([self.system, user("last")]))
        assert fitted.ids == encode_chat(TOKENIZER, [self.system, user("last")], NO_LIMIT).ids
        assert fitted.n_dropped_messages == 2

    def test_a_single_message_too_long_tells_both_numbers(self):
        with pytest.raises(PromptTooLong) as caught:
            encode_chat(TOKENIZER, [user("x" * 100)], 50)
        assert (caught.value.n_prompt_tokens, caught.value.n_max_prompt_tokens) == (
            self.n_tokens([user("x" * 100)]),
            50,
        )
        assert str(caught.value) == (
            f"The message is {self.n_tokens([user('x' * 100)])} tokens long but the model can read at most 50; "
            "shorten it and send it again."
        )

    def test_what_has_too_many_characters_is_not_encoded(self, monkeypatch):
        """A megabyte takes seconds, in which everybody waits."""
        tokenizer, seen = byte_tokenizer(), []
        apply = type(tokenizer).apply_chat_template

        def note(self, messages, **options):
            seen.append(sum(len(message["content"]) for message in messages))
            return apply(self, messages, **options)

        monkeypatch.setattr(type(tokenizer), "apply_chat_template", note)
        million = 10**6
        with pytest.raises(PromptTooLong, match=r"at least 76,923 tokens long .* at most 100;"):  # of 13 characters
            encode_chat(tokenizer, [self.system, user("x" * million)], 100)
        with pytest.raises(PromptTooLong, match="at least 76,923"):
            encode_text(tokenizer, "x" * million, 100)
        assert seen == []
        chat = [self.system, *[user("x" * million), reply("y" * million)] * 3, user("q"), reply("a"), user("last")]
        fitted = encode_chat(tokenizer, chat, 200)
        assert fitted.n_dropped_messages == 6
        assert max(seen) < 100


@pytest.mark.parametrize(
    "messages", [[], [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_malformed_messages_are_refused(messages):
    with pytest.raises(InvalidRequest):
        encode_chat(TOKENIZER, messages, NO_LIMIT)


def test_an_empty_prompt_starts_from_the_first_token_of_a_text():
    assert encode_text(TOKENIZER, "", NO_LIMIT) == (START,)


def test_a_template_without_a_system_role_gets_it_in_the_first_message():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    messages = [{"role": "system", "content": "Be kind."}, user("hi")]
    assert list(encode_chat(tokenizer, messages, NO_LIMIT).ids) == [*turn("user", plain("Be kind.\n\nhi")), *OPENING]


def test_a_conversation_that_the_template_refuses_is_told_in_a_sentence():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        encode_chat(tokenizer, [user("hi"), user("ho")], NO_LIMIT)
