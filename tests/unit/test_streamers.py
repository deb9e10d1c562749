"""The streamers' base and IteratorStreamer, under a real generate() and by hand."""

import asyncio
import gc
import queue
import random
import threading
import time
import weakref

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer

from streaming import IteratorStreamer
from streaming.errors import GenerationCancelled, GenerationFailed, StreamerMisuse, StreamTimeout
from streaming.events import FinishEvent, TokenEvent
from tests.tiny import ScriptedModel, byte_tokenizer, tiny_llama

WAIT_S = 30
PAD, BOS, EOS = 256, 257, 258


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def padding_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    return tokenizer


def prompt(text: str = "?") -> torch.Tensor:
    return torch.tensor([ids_of(text)])


def scripted(text: str, at=None) -> ScriptedModel:
    model = ScriptedModel(ids_of(text), at)
    model.expect(1)
    return model


def generate_kwargs(streamer, text: str = "?", **kwargs) -> dict:
    ids = prompt(text)
    return dict(inputs=ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=50, **kwargs)


def feed(streamer, text: str, prompt_text: str = "?", end: bool = True) -> None:
    """Do by hand what generate() does with one row."""
    streamer.put(prompt(prompt_text))
    for token_id in ids_of(text):
        streamer.put(torch.tensor([token_id]))
    if end:
        streamer.end()


@pytest.fixture
def background():
    """Start threads that are joined at the end, and collect what they raised."""
    threads, raised, before = [], [], threading.excepthook
    threading.excepthook = lambda args: raised.append(args.exc_value)

    def start(target, *args, **kwargs) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, kwargs=kwargs, name="brook-test-generate")
        threads.append(thread)
        thread.start()
        return thread

    start.raised = raised
    yield start
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    threading.excepthook = before


class TestStandsInForTextIteratorStreamer:
    @pytest.mark.parametrize("skip_prompt", [False, True])
    @pytest.mark.parametrize("kind", [TextIteratorStreamer, IteratorStreamer])
    def test_the_joined_text_is_the_same(self, background, kind, skip_prompt):
        streamer = kind(byte_tokenizer(), skip_prompt, WAIT_S, skip_special_tokens=True)
        background(scripted("Ünï, two\nlines 日本").generate, **generate_kwargs(streamer, "Q"))
        assert "".join(streamer) == ("" if skip_prompt else "Q") + "Ünï, two\nlines 日本"

    @pytest.mark.parametrize("kind", [AsyncTextIteratorStreamer, IteratorStreamer])
    def test_async_for_as_well(self, background, kind):
        async def read() -> str:
            streamer = kind(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S, skip_special_tokens=True)
            background(scripted("async 日本").generate, **generate_kwargs(streamer))
            return "".join([text async for text in streamer])

        assert asyncio.run(read()) == "async 日本"

    @pytest.mark.parametrize("kind", [TextIteratorStreamer, IteratorStreamer])
    def test_next_and_a_second_generation_with_the_same_streamer(self, background, kind):
        streamer = kind(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S, skip_special_tokens=True)
        for text in ("one two ", "three four "):
            thread = background(scripted(text).generate, **generate_kwargs(streamer))
            assert next(streamer) + "".join(streamer) == text
            thread.join(WAIT_S)

    @pytest.mark.parametrize("kind", [TextIteratorStreamer, IteratorStreamer])
    def test_a_timeout_raises_queue_empty_and_reading_goes_on_after_it(self, kind):
        streamer = kind(byte_tokenizer(), skip_prompt=True, timeout=0.01)
        streamer.put(prompt())
        streamer.put(torch.tensor(ids_of("a ")))
        assert next(iter(streamer)) in ("a ", "a")
        with pytest.raises(queue.Empty):
            for _ in streamer:
                pass
        streamer.put(torch.tensor(ids_of("b")))
        streamer.end()
        assert "".join(streamer) == "b"

    def test_async_a_timeout_raises_timeout_error_and_reading_goes_on_after_it(self):
        async def read() -> str:
            streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=0.01)
            feed(streamer, "a", end=False)
            assert await anext(streamer) == "a"
            with pytest.raises(TimeoutError):
                await anext(streamer)
            streamer.put(torch.tensor(ids_of("b")))
            streamer.end()
            return "".join([text async for text in streamer])

        assert asyncio.run(read()) == "b"

    def test_a_reader_may_iterate_again_before_the_next_generation_begins(self, background):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        feed(streamer, "first")
        assert "".join(streamer) == "first"
        read: list[str] = []
        reader = background(lambda: read.extend(streamer))
        feed(streamer, "second")
        reader.join(WAIT_S)
        assert "".join(read) == "second"


class TestStream:
    def test_the_texts_of_the_token_events_join_to_the_decode(self):
        for cut in range(1, 11):
            streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True)
            ids = ids_of("aé日👍")[:cut]
            streamer.put(prompt())
            streamer.put(torch.tensor(ids))
            streamer.end()
            *tokens, finish = streamer.events()
            assert "".join(event.text for event in tokens) == byte_tokenizer().decode(ids)
            assert [event.id for event in tokens] == ids
            assert (finish.reason, finish.n_prompt_tokens, finish.n_generated_tokens) == ("length", 1, cut)

    def test_a_word_after_the_prompt_keeps_its_space_and_a_split_character_is_completed(self):
        first, second = ids_of("é")
        streamer = IteratorStreamer(byte_tokenizer())
        streamer.put(torch.tensor([[*ids_of("caf"), first]]))
        streamer.put(torch.tensor([second]))
        streamer.end()
        assert list(streamer) == ["caf", "é"]

    def test_any_number_of_readers_from_any_offset(self, background):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True)
        read: list[list[str]] = [[], []]
        for out in read:
            background(lambda out=out: out.extend(streamer.texts()))
        feed(streamer, "many readers")
        late = list(streamer.events())
        assert list(streamer.events(after=5)) == late[5:]
        assert streamer.log.text() == "".join(streamer.texts()) == "many readers"
        for thread in threading.enumerate():
            if thread.name == "brook-test-generate":
                thread.join(WAIT_S)
        assert ["".join(texts) for texts in read] == ["many readers"] * 2

    @pytest.mark.parametrize("ending", [EOS, None])
    def test_the_finish_says_stop_after_the_end_token_and_length_otherwise(self, ending):
        streamer = IteratorStreamer(byte_tokenizer(), skip_special_tokens=True)
        feed(streamer, "ab", end=False)
        if ending is not None:
            streamer.put(torch.tensor([ending]))
        streamer.end()
        assert streamer.log.finish.reason == ("length" if ending is None else "stop")

    def test_an_end_token_that_only_the_model_knows(self):
        streamer = IteratorStreamer(byte_tokenizer(), eos_token_id=[BOS, ids_of("!")[0]])
        feed(streamer, "ab!")
        assert streamer.log.finish.reason == "stop"

    def test_tokens_accepted_several_at_once_are_shown_in_order(self):
        """Assisted decoding hands `(1, n)` at each step."""
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True)
        streamer.put(prompt())
        for piece in ("abc", "d", "日本e"):
            streamer.put(torch.tensor([ids_of(piece)]))
        streamer.end()
        assert "".join(streamer) == "abcd日本e"

    def test_it_goes_when_nobody_needs_it(self):
        streamer = IteratorStreamer(byte_tokenizer())
        feed(streamer, "x", end=False)
        gone = weakref.ref(streamer)
        del streamer
        gc.collect()
        assert gone() is None


class TestBatch:
    def test_each_row_is_a_stream_that_ends_on_its_own_without_padding(self):
        streamer = IteratorStreamer(padding_tokenizer())
        streamer.put(torch.tensor([[PAD, PAD, *ids_of("A")], ids_of("BCD")]))
        for tokens in zip([*ids_of("né"), EOS, PAD, PAD], ids_of("日本"), strict=True):
            streamer.put(torch.tensor(tokens))
        streamer.end()
        assert ["".join(streamer.texts(row)) for row in (0, 1)] == ["Ané<|im_end|>", "BCD日本"]
        finishes = [list(streamer.events(row=row))[-1] for row in (0, 1)]
        assert [f.reason for f in finishes] == ["stop", "length"]
        assert [(f.n_prompt_tokens, f.n_generated_tokens) for f in finishes] == [(1, 4), (3, 6)]

    def test_a_row_that_ended_is_told_while_others_go_on(self):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True)
        streamer.put(torch.tensor([[1], [1]]))
        streamer.put(torch.tensor([EOS, ids_of("x")[0]]))
        assert next(iter(streamer.events(after=1, row=0))).reason == "stop"
        assert streamer._state == "open"
        streamer.end()

    def test_padding_ends_a_row_whose_end_token_is_unknown_here(self):
        streamer = IteratorStreamer(padding_tokenizer(), skip_prompt=True)
        streamer.put(torch.tensor([[1], [1]]))
        for tokens in ((*ids_of("a"), *ids_of("x")), (BOS, *ids_of("y")), (PAD, *ids_of("z"))):
            streamer.put(torch.tensor(tokens))
        streamer.end()
        assert "".join(streamer.texts(0)) == "a<|im_start|>"
        assert list(streamer.events(row=0))[-1].reason == "stop"

    def test_a_real_batch_gives_what_each_row_gives_alone(self):
        tokenizer, model = padding_tokenizer(), tiny_llama()
        inputs = tokenizer(["one", "a longer prompt", "日本"], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        streamer = IteratorStreamer(tokenizer, skip_prompt=True)
        streamer.run(model.generate, **inputs, max_new_tokens=30, do_sample=False, pad_token_id=PAD)
        alone = model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=PAD)
        for row in range(3):
            ids = alone[row, inputs["input_ids"].shape[1] :].tolist()
            shown = ids[: ids.index(EOS) + 1] if EOS in ids else ids
            assert "".join(streamer.texts(row)) == tokenizer.decode(shown)
            assert [e.id for e in streamer.events(row=row) if isinstance(e, TokenEvent)] == shown

    def test_iterating_needs_a_row_and_a_row_that_is_not_there_ends_at_once(self):
        streamer = IteratorStreamer(byte_tokenizer())
        early = streamer.events(row=5)
        streamer.put(torch.tensor([[1], [2]]))
        streamer.put(torch.tensor([3, 4]))
        with pytest.raises(StreamerMisuse, match=r"The batch has 2 rows; follow each with texts\(row\)"):
            next(streamer)
        for events in (early, streamer.events(row=2)):
            assert [event.error for event in events] == ["The batch has 2 rows only."]
        streamer.end()


class TestErrors:
    def test_of_a_bare_thread_reach_the_reader(self, background):
        def fail():
            raise ValueError("boom")

        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        background(scripted("abc", {2: fail}).generate, **generate_kwargs(streamer))
        assert next(streamer) + next(streamer) == "ab"
        with pytest.raises(GenerationFailed, match=r"generate\(\) raised, and its thread ended"):
            next(streamer)
        assert [str(error) for error in background.raised] == ["boom"]

    @pytest.mark.parametrize("at", [0, 2])
    def test_with_run_they_come_with_their_cause_and_nothing_is_printed(self, background, at):
        def fail():
            raise ValueError("boom")

        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        background(streamer.run, scripted("abc", {at: fail}).generate, **generate_kwargs(streamer))
        with pytest.raises(GenerationFailed, match="ValueError: boom") as caught:
            list(streamer)
        assert isinstance(caught.value.__cause__, ValueError)
        assert background.raised == []
        *tokens, finish = streamer.events()
        assert ("".join(event.text for event in tokens), finish.reason) == ("abc"[:at], "error")

    def test_with_run_also_before_generate_calls_the_streamer(self, background):
        streamer = IteratorStreamer(byte_tokenizer(), timeout=WAIT_S)
        background(streamer.run, tiny_llama().generate, inputs=prompt(), no_such_option=1)
        with pytest.raises(GenerationFailed, match="no_such_option"):
            list(streamer)

    def test_beam_search_is_refused_for_its_reason(self):
        streamer = IteratorStreamer(byte_tokenizer(), timeout=WAIT_S)
        streamer.run(tiny_llama().generate, inputs=prompt(), num_beams=3)
        with pytest.raises(GenerationFailed, match=r"num_beams=3\) cannot be streamed: until the end it may drop"):
            list(streamer)

    def test_end_releases_the_readers_of_a_generation_that_never_began(self):
        streamer = IteratorStreamer(byte_tokenizer(), timeout=WAIT_S)
        streamer.end()
        assert list(streamer) == []

    def test_fail_after_the_end_changes_nothing(self):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True)
        feed(streamer, "ok")
        streamer.fail(ValueError("late"))
        streamer.end()
        assert list(streamer) == ["o", "k"]

    def test_the_streamer_serves_again_after_a_failure(self, background):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        feed(streamer, "lost", end=False)
        streamer.fail(ValueError("boom"))
        with pytest.raises(GenerationFailed):
            list(streamer)
        feed(streamer, "again")
        assert "".join(streamer) == "again"

    def test_a_generation_that_went_away_in_the_same_thread_ends_when_the_next_begins(self):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        feed(streamer, "lost", end=False)
        lost = streamer.log
        feed(streamer, "again")
        assert (lost.text(), lost.finish.reason) == ("lost", "error")
        assert streamer.log.text() == "again"


class TestCancel:
    def test_a_bare_thread_ends_within_one_token_and_quietly(self, background):
        read_three = threading.Event()
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        model = scripted("abcdef", {3: lambda: read_three.wait(WAIT_S)})
        thread = background(model.generate, **generate_kwargs(streamer))
        text = next(streamer) + next(streamer) + next(streamer)
        streamer.cancel()
        read_three.set()
        thread.join(WAIT_S)
        assert text + "".join(streamer) == "abc"
        assert (streamer.log.finish.reason, streamer.cancelled) == ("cancelled", True)
        assert background.raised == []

    def test_before_the_first_token(self, background):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        streamer.cancel()
        model = scripted("abc")
        assert streamer.run(model.generate, **generate_kwargs(streamer)) is None
        assert (list(streamer), model.n_forwards) == ([], 0)
        assert [event.reason for event in streamer.events()] == ["cancelled"]

    def test_it_is_for_the_generation_and_not_for_the_next(self):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        feed(streamer, "done")
        streamer.cancel()
        feed(streamer, "more")
        assert streamer.log.finish.reason == "length"
        streamer.put(prompt())
        streamer.cancel()
        with pytest.raises(GenerationCancelled):
            streamer.put(torch.tensor([1]))
        feed(streamer, "again")
        assert streamer.log.text() == "again"
        assert not streamer.cancelled

    def test_from_many_threads_at_random_moments_every_stream_ends_once(self, background):
        chance = random.Random(0)
        for _ in range(30):
            streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
            background(streamer.run, scripted("x" * 40).generate, **generate_kwargs(streamer))
            cancellers = [threading.Timer(chance.random() * 0.05, streamer.cancel) for _ in range(3)]
            for timer in cancellers:
                timer.start()
            *tokens, finish = streamer.events(timeout=WAIT_S)
            assert finish.reason in ("cancelled", "stop")
            assert all(isinstance(event, TokenEvent) for event in tokens)
            for timer in cancellers:
                timer.join(WAIT_S)


class TestRefusals:
    @pytest.mark.parametrize(
        "value",
        [torch.zeros(1, 1, 1).long(), torch.tensor(5), torch.tensor([[0.5]]), [[1]], torch.zeros(0, 3).long()],
        ids=["3-D", "0-D", "float", "list", "no rows"],
    )
    def test_a_prompt_of_the_wrong_shape(self, value):
        streamer = IteratorStreamer(byte_tokenizer(), timeout=WAIT_S)
        with pytest.raises(StreamerMisuse):
            streamer.put(value)
        with pytest.raises(GenerationFailed):
            list(streamer)

    @pytest.mark.parametrize("value", [torch.tensor([1, 2, 3]), torch.tensor([1]), torch.tensor([[[1], [2]]])])
    def test_a_step_of_another_size_than_the_batch(self, value):
        streamer = IteratorStreamer(byte_tokenizer())
        streamer.put(torch.tensor([[1], [2]]))
        with pytest.raises(StreamerMisuse):
            streamer.put(value)
        assert [list(streamer.events(row=row))[-1].reason for row in (0, 1)] == ["error"] * 2

    def test_a_first_put_without_a_prompt(self):
        with pytest.raises(StreamerMisuse, match="must bring the prompt"):
            IteratorStreamer(byte_tokenizer()).put(torch.tensor([1]))

    def test_put_after_end(self):
        streamer = IteratorStreamer(byte_tokenizer())
        feed(streamer, "a")
        with pytest.raises(StreamerMisuse, match="after the end"):
            streamer.put(torch.tensor([1]))

    @pytest.mark.parametrize("skip_prompt", [False, True])
    def test_ids_out_of_range(self, background, skip_prompt):
        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt, WAIT_S)
        streamer.put(prompt())
        with pytest.raises(StreamerMisuse, match="Token id 999 is not one of the 259"):
            streamer.put(torch.tensor([999]))
        with pytest.raises(GenerationFailed, match="Token id 999"):
            list(streamer)

    def test_two_generations_at_once(self, background):
        holding, hold = threading.Event(), threading.Event()

        def wait():
            holding.set()
            assert hold.wait(WAIT_S)

        streamer = IteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=WAIT_S)
        background(streamer.run, scripted("first", {2: wait}).generate, **generate_kwargs(streamer))
        assert holding.wait(WAIT_S)
        with pytest.raises(StreamerMisuse, match="follows a generate"):
            scripted("second").generate(**generate_kwargs(streamer))
        hold.set()
        assert "".join(streamer.texts()) == "first<|im_end|>"

    def test_no_tokenizer(self):
        with pytest.raises(StreamerMisuse, match="needs the model's tokenizer"):
            IteratorStreamer(None)

    def test_a_reader_that_waits_too_long(self):
        streamer = IteratorStreamer(byte_tokenizer())
        started = time.monotonic()
        with pytest.raises(StreamTimeout):
            next(streamer.events(timeout=0.05))
        assert time.monotonic() - started < WAIT_S


class TestFinishIsAlwaysOneAndLast:
    def test_whatever_is_called_in_whatever_order(self):
        """500 random sequences of ten calls: every log ends with its one FinishEvent, and nothing but a BrookError."""
        for seed in range(500):
            chance = random.Random(seed)
            streamer = IteratorStreamer(byte_tokenizer(), chance.random() < 0.5)
            logs = {id(streamer.log): streamer.log}
            for _ in range(10):
                call = chance.choice(["prompt", "batch", "step", "wide", "end", "fail", "cancel"])
                try:
                    if call == "prompt":
                        streamer.put(prompt())
                    elif call == "batch":
                        streamer.put(torch.tensor([[1, 2], [3, 4]]))
                    elif call == "step":
                        streamer.put(torch.tensor([chance.randrange(300)]))
                    elif call == "wide":
                        streamer.put(torch.tensor([[chance.randrange(259) for _ in range(3)]]))
                    elif call == "end":
                        streamer.end()
                    elif call == "fail":
                        streamer.fail(ValueError("x"))
                    else:
                        streamer.cancel()
                except (StreamerMisuse, GenerationCancelled):
                    pass
                logs[id(streamer.log)] = streamer.log
            streamer.end()
            for log in logs.values():
                events = log.snapshot()
                assert [isinstance(event, FinishEvent) for event in events] == [False] * (len(events) - 1) + [True]
