"""Detokenizing: the fast, incremental way against the slow, whole one, in every family and script."""

import random
import re
import threading
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.detokenizer import Detokenizer, StopMatcher
from streaming.errors import StreamerMisuse
from tests.families import FAMILIES, TEXTS, family
from tests.tiny import CONTROL_TOKENS, byte_tokenizer

WAIT_S = 30
SKIPPING = pytest.mark.parametrize("skip", [False, True], ids=["all tokens", "special tokens skipped"])
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def encode(name: str, text: str) -> list[int]:
    return family(name)(text, add_special_tokens=False)["input_ids"]


def detokenize(tokenizer, ids, *, context_ids=(), skip=False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context_ids, skip_special_tokens=skip)
    return [*(detokenizer.feed(i) for i in ids), detokenizer.flush()]


def full_decode(name: str, ids: list[int], skip: bool) -> str:
    """The reference: one decode of everything; malformed bytes of byte fallback each on their own."""
    tokenizer = family(name)
    plain = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    if "byte fallback" not in name:
        return plain
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} if skip else set()
    pieces = []
    for is_byte, run in groupby(tokenizer.convert_ids_to_tokens([i for i in ids if i not in special]), is_byte_piece):
        these = list(run)
        pieces += replace_malformed(these) if is_byte else these
    return tokenizer.backend_tokenizer.decoder.decode(pieces)


def is_byte_piece(piece: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None


def replace_malformed(run: list[str]) -> list[str]:
    """A run of byte pieces with U+FFFD for each that belongs to no character, found by trying."""
    raw, at, pieces = bytes(int(piece[3:5], 16) for piece in run), 0, []
    while at < len(raw):
        size = next((n for n in (1, 2, 3, 4) if is_character(raw[at : at + n])), 0)
        pieces += run[at : at + size] if size else ["\ufffd"]
        at += max(1, size)
    return pieces


def is_character(raw: bytes) -> bool:
    try:
        return len(raw.decode()) == 1
    except UnicodeDecodeError:
        return False


class TestJoinedTextEqualsTheFullDecode:
    """20,800 cases: 13 families, with and without special tokens, 400 random ids and 400 cuts of texts each."""

    @SKIPPING
    @EVERY_FAMILY
    def test_of_random_ids(self, name, skip):
        chance, n_ids = random.Random(f"ids {name} {skip}"), len(family(name))
        for _ in range(400):
            # Small ids are the control tokens and, where there are any, the bytes.
            n_choice = chance.choice([n_ids, min(n_ids, 270)])
            ids = [chance.randrange(n_choice) for _ in range(chance.randrange(40))]
            assert "".join(detokenize(family(name), ids, skip=skip)) == full_decode(name, ids, skip), ids

    @SKIPPING
    @EVERY_FAMILY
    def test_of_cut_and_spliced_texts(self, name, skip):
        chance, texts = random.Random(f"cuts {name} {skip}"), [encode(name, text) for text in TEXTS.values()]
        for _ in range(400):
            ids = []
            for whole in chance.sample(texts, 3):
                start = chance.randrange(len(whole) + 1)
                ids += whole[start : start + chance.randrange(30)]
            assert "".join(detokenize(family(name), ids, skip=skip)) == full_decode(name, ids, skip), ids

    @EVERY_FAMILY
    @pytest.mark.parametrize("script", TEXTS)
    def test_of_every_script(self, name, script):
        ids = encode(name, TEXTS[script])
        whole = family(name).decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(detokenize(family(name), ids)) == whole

    @pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("slow, @@", "slow SentencePiece", "slow ByT5")])
    def test_of_ten_thousand_random_ids(self, name):
        ids = random.Random(0).choices(range(len(family(name))), k=10_000)
        assert "".join(detokenize(family(name), ids)) == full_decode(name, ids, False)


class TestTextComesAtOnce:
    @pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("slow, @@", "slow ByT5")])
    @pytest.mark.parametrize("script", TEXTS)
    def test_at_the_character(self, name, script):
        """After every token, all is shown but an unfinished character (and spaces that may be stripped)."""
        tokenizer, ids = family(name), encode(name, TEXTS[script])
        detokenizer, shown = Detokenizer(tokenizer), ""
        for n, token_id in enumerate(ids, 1):
            shown += detokenizer.feed(token_id)
            so_far = full_decode(name, ids[:n], False)
            assert shown == so_far.rstrip("\ufffd")
            assert shown + detokenizer.held == so_far

    def test_a_piece_that_changes_before_another_waits_for_it(self):
        tokenizer = family("slow, @@")
        ids = tokenizer.convert_tokens_to_ids(["re@@", "tu@@", "rn", "re@@"])
        assert detokenize(tokenizer, ids) == ["re", "tu", "rn", " re", "@@"]

    def test_a_character_cut_in_two_is_completed(self):
        ids = byte_tokenizer()("a👍b")["input_ids"]
        assert detokenize(byte_tokenizer(), ids) == ["a", "", "", "", "👍", "b", ""]
        assert detokenize(byte_tokenizer(), ids[:4]) == ["a", "", "", "", "\ufffd"]

    def test_bytes_of_a_fallback_character_show_when_it_is_whole(self):
        tokenizer = family("SentencePiece BPE, byte fallback, leading space dropped")
        ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "ភស".encode()])
        assert detokenize(tokenizer, ids) == ["", "", "ភ", "", "", "ស", ""]
        assert detokenize(tokenizer, ids[:5]) == ["", "", "ភ", "", "", "\ufffd\ufffd"]


class TestSpaces:
    @pytest.mark.parametrize("name", ["SentencePiece BPE, byte fallback, leading space dropped", "Unigram"])
    def test_the_first_is_dropped_and_no_other(self, name):
        tokenizer = family(name)
        ids = tokenizer.convert_tokens_to_ids(["▁", "▁", "d", "▁", "▁", "d"])
        assert "".join(detokenize(tokenizer, ids)) == " d  d"

    def test_the_one_after_a_newline_stays(self):
        name = "SentencePiece BPE, byte fallback, leading space dropped"
        ids = encode(name, "line\n next")
        assert "".join(detokenize(family(name), ids)) == "line\n next"

    @EVERY_FAMILY
    def test_a_word_after_context_keeps_its_own(self, name):
        """Texts of context and continuation join to the full decode, wherever the cut is."""
        for script in ("Latin", "Emoji", "Code"):
            ids = encode(name, TEXTS[script])
            whole = family(name).decode(ids, clean_up_tokenization_spaces=False)
            for cut in range(0, len(ids), 5):
                detokenizer = Detokenizer(family(name), ids[:cut])
                rest = [detokenizer.feed(token_id) for token_id in ids[cut:]]
                assert detokenizer.context_text + "".join(rest) + detokenizer.flush() == whole

    def test_spaces_at_the_end_of_a_strip_are_held(self):
        tokenizer = family("slow SentencePiece")
        ids = tokenizer.convert_tokens_to_ids(["▁", "a", "▁", "▁", "c", "▁"])
        assert detokenize(tokenizer, ids) == ["", "a", "", "", "  c", "", ""]


class TestSpecialTokens:
    def test_in_the_middle_they_are_shown_or_skipped(self):
        tokenizer = byte_tokenizer()
        ids = tokenizer("a<|im_end|>b<|endoftext|>")["input_ids"]
        assert detokenize(tokenizer, ids) == ["a", "<|im_end|>", "b", "<|endoftext|>", ""]
        assert detokenize(tokenizer, ids, skip=True) == ["a", "", "b", "", ""]

    def test_a_skipped_one_inside_a_character_does_not_break_it(self):
        tokenizer = byte_tokenizer()
        first, second = tokenizer("é")["input_ids"]
        assert detokenize(tokenizer, [first, 258, second], skip=True) == ["", "", "é", ""]

    def test_added_tokens_are_text(self):
        name = "byte-level BPE"
        ids = encode(name, "a<think>名前b")
        assert detokenize(family(name), ids, skip=True) == ["a", "<think>", "名前", "b", ""]


class TestCost:
    @pytest.mark.parametrize("name", [name for name in FAMILIES if name != "slow ByT5"])  # it ignores malformed bytes
    @pytest.mark.parametrize("kind", ["text", "random ids", "one byte that makes no character", "special tokens"])
    def test_a_token_decodes_few_pieces_however_long_the_stream(self, name, kind, monkeypatch):
        tokenizer = family(name)
        if kind == "text":
            ids = [i for text in TEXTS.values() for i in encode(name, text)]
        elif kind == "random ids":
            ids = random.Random(1).choices(range(len(tokenizer)), k=3000)
        elif kind == "special tokens":
            ids = [tokenizer.eos_token_id] * 3000
        else:
            pieces = [p for p in ("ÿ", "<0xFF>", "\xff") if p in tokenizer.get_vocab()]
            ids = [tokenizer.convert_tokens_to_ids(pieces[-1])] * 3000 if pieces else []
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=kind == "special tokens")
        join, longest = detokenizer._join, 0

        def count(pieces):
            nonlocal longest
            longest = max(longest, len(pieces))
            return join(pieces)

        monkeypatch.setattr(detokenizer, "_join", count)
        for token_id in ids:
            detokenizer.feed(token_id)
        assert longest <= 24


class TestThreads:
    def test_decoding_goes_on_while_others_encode_with_the_same_tokenizer(self):
        """Encoding changes a fast tokenizer's settings; a detokenizer must neither fail nor make that fail."""
        tokenizer = byte_tokenizer()
        ids = tokenizer("décodé 日本 " * 200)["input_ids"]
        expected = tokenizer.decode(ids)
        errors: list[BaseException] = []
        done = threading.Event()

        def encode_all_the_time() -> None:
            try:
                n = 0
                while not done.is_set():
                    n += 1
                    tokenizer("some text", truncation=True, max_length=2 + n % 5, split_special_tokens=bool(n % 2))
            except BaseException as error:
                errors.append(error)

        encoder = threading.Thread(target=encode_all_the_time, name="brook-test-encoder")
        encoder.start()
        try:
            for _ in range(20):
                assert "".join(detokenize(tokenizer, ids)) == expected
        finally:
            done.set()
            encoder.join(WAIT_S)
        assert errors == []


class TestRefusals:
    @pytest.mark.parametrize("name", ["bytes", "slow tiktoken"])
    @pytest.mark.parametrize("token_id", [-1, 10**6, 10**12])
    def test_an_id_that_the_tokenizer_does_not_have(self, name, token_id):
        with pytest.raises(StreamerMisuse, match=rf"Token id {token_id} is not one of the [\d,]+ that"):
            Detokenizer(family(name)).feed(token_id)

    @pytest.mark.parametrize("wrong", [None, "gpt2", 7])
    def test_what_is_no_tokenizer(self, wrong):
        with pytest.raises(StreamerMisuse, match=r"needs the model's tokenizer, .*got (NoneType|str|int)\."):
            Detokenizer(wrong)

    def test_a_processor_and_a_bare_tokenizer_serve_as_well(self):
        class Processor:
            tokenizer = byte_tokenizer()

        ids = byte_tokenizer()("né")["input_ids"]
        for tokenizer in (Processor(), byte_tokenizer().backend_tokenizer):
            assert "".join(detokenize(tokenizer, ids)) == "né"


class TestStopMatcher:
    @settings(max_examples=500, deadline=None)
    @given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
    def test_however_the_text_is_cut_it_ends_before_the_first_complete_stop_string(self, text, stop, size):
        matcher = StopMatcher(stop)
        given_text = ""
        for at in range(0, len(text), size):
            given_text += matcher.feed(text[at : at + size])
        given_text += matcher.flush()
        found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        assert given_text == (text[: min(found)[1]] if found else text)
        assert (matcher.matched is not None) == bool(found)

    def test_only_what_may_become_one_is_held(self):
        matcher = StopMatcher(["</s>", CONTROL_TOKENS[2]])
        assert [matcher.feed(text) for text in ("a<", "b", "</", "x", "<|im", "_end|>", "never")] == [
            "a", "<b", "", "</x", "", "", "",
        ]  # fmt: skip
        assert matcher.matched == CONTROL_TOKENS[2]
