"""What every engine promises, on a tiny random Llama and on a scripted model.

Each test is named by the property that it shows; the engines are real, only the weights are small. The remote engine
asks Brook's own API on this machine, behind which is a LocalEngine.
"""

import threading
import traceback
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, closing

import pytest
import torch
from transformers import Lfm2Config, MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from streaming.engine.base import Engine, Generation, GenerationRequest, GenerationResult
from streaming.engine.batched import BatchedEngine
from streaming.engine.generate import PREFILL_CHUNK_TOKENS
from streaming.engine.local import LocalEngine
from streaming.engine.prefix_cache import NOBODY
from streaming.engine.remote import RemoteEngine
from streaming.errors import (
    EngineBusy,
    EngineClosed,
    InvalidRequest,
    ModelUnavailable,
    NotACausalLM,
    PromptTooLong,
    StreamTimeout,
)
from streaming.events import FinishEvent, TokenEvent
from streaming.models.kv_cache import BLOCK_TOKENS, GrowingLayer
from tests.serving import WAIT_S, serving_api, wait_for
from tests.tiny import N_CONTEXT, SYSTEM, SYSTEM_TEMPLATE, ScriptedModel, byte_tokenizer, loaded, tiny_llama

EOS = 258
HELLO = [{"role": "user", "content": "hello"}]


def kind_of(engine: type[Engine]) -> str:
    return engine.kind


@pytest.fixture(params=[LocalEngine, BatchedEngine, RemoteEngine], ids=kind_of)
def serve(request):
    """Start engines of each kind on models, and close them at the end."""
    with ExitStack() as stack:

        def start(
            model, n_context=N_CONTEXT, one_seat=False, tokenizer=None, max_cache_bytes=None, **options
        ) -> Engine:
            def start_here(kind, **options) -> Engine:
                engine = kind(lambda _: loaded(model, tokenizer, n_context), max_cache_bytes=max_cache_bytes, **options)
                return stack.enter_context(closing(engine))

            if one_seat and request.param is not LocalEngine:
                options["n_seats"] = 1
            if request.param is not RemoteEngine:
                return start_here(request.param, **options)
            server = start_here(LocalEngine)
            server.wait_ready(WAIT_S)
            url = stack.enter_context(serving_api(server))
            return stack.enter_context(closing(RemoteEngine(f"{url}v1", **options)))

        yield start


def only_here(_because: str) -> pytest.MarkDecorator:
    """Leave out the remote engine, which cannot have a property."""
    return pytest.mark.parametrize("serve", [LocalEngine, BatchedEngine], indirect=True, ids=kind_of)


of_token_ids = only_here("servers give text and continue text: the ids are theirs")
of_places = only_here("servers tell neither places in their queue nor how much of a prompt they have read")
of_chunks = only_here("a server stops once it notices that nobody listens, which its model does not wait for")
of_refusals_at_once = only_here("a server's refusal is the finish of the stream: submit() does not wait for it")


def scripted(text: str, at=None) -> ScriptedModel:
    """Give a model that says a text after a prompt of one token."""
    model = ScriptedModel(byte_tokenizer()(text)["input_ids"], at)
    model.expect(1)
    return model


def say(engine: Engine, **options) -> Generation:
    """Ask a scripted model to speak, from a prompt of one token."""
    return engine.submit(GenerationRequest(prompt="?", temperature=0, **options))


def chat_ids(messages: Sequence[dict[str, str]]) -> list[int]:
    """Give what a model reads before it replies."""
    return byte_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def generated(prompt_ids: Sequence[int], n_tokens: int) -> list[int]:
    """Give the ids that bare `generate()` of the tiny Llama writes, greedily."""
    ids = torch.tensor([prompt_ids])
    written = tiny_llama().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False)
    return written[0, ids.shape[1] :].tolist()


def text_of(token_ids: Sequence[int]) -> str:
    return byte_tokenizer().decode(token_ids, skip_special_tokens=True)


class TestStream:
    def test_says_what_generate_says(self, serve):
        engine = serve(tiny_llama())
        for prompt in ("one, two,", "x" * 300, "日本語"):
            ids = byte_tokenizer()(prompt)["input_ids"]
            for source in ({"prompt": prompt}, {"prompt_ids": ids}):
                run = engine.submit(GenerationRequest(**source, max_new_tokens=40, temperature=0))
                assert run.result(WAIT_S).text == text_of(generated(ids, 40))

    @of_token_ids
    def test_equals_generate_token_for_token(self, serve):
        engine = serve(tiny_llama())
        for prompt in ("one, two,", "x" * 300, "日本語"):
            run = engine.submit(GenerationRequest(prompt=prompt, max_new_tokens=40, temperature=0))
            assert run.result(WAIT_S).token_ids == generated(run.prompt_ids, 40)

    def test_is_token_events_then_one_finish(self, serve):
        run = say(serve(scripted("hello")), max_new_tokens=20)
        *tokens, finish = list(run.events(timeout=WAIT_S))
        assert all(isinstance(event, TokenEvent) for event in tokens)
        assert isinstance(finish, FinishEvent)
        assert [event.index for event in tokens] == list(range(len(tokens)))
        assert [event.text for event in tokens if event.text] == ["h", "e", "l", "l", "o"]
        assert (finish.reason, finish.error, finish.n_prompt_tokens, finish.n_generated_tokens) == ("stop", None, 1, 6)
        assert finish.timings.ttft_s > 0
        assert finish.timings.tokens_per_s > 0

    @of_token_ids
    def test_has_an_event_for_each_token_with_its_id(self, serve):
        *tokens, _ = say(serve(scripted("hi")), max_new_tokens=20, logprobs=2).events(timeout=WAIT_S)
        assert [(event.id, event.text) for event in tokens] == [(71, "h"), (72, "i"), (EOS, "")]
        assert [event.top[0].id for event in tokens] == [event.id for event in tokens]

    def test_texts_join_to_the_full_decode_in_every_script(self, serve):
        text = "Zwölf 日本語 ไทย العربية 👩‍👩‍👧‍👦 🇩🇪 end"
        run = say(serve(scripted(text)), max_new_tokens=200)
        assert "".join(e.text for e in run.events(timeout=WAIT_S) if isinstance(e, TokenEvent)) == text

    def test_an_unfinished_character_at_the_end_is_as_the_full_decode_has_it(self, serve):
        run = say(serve(scripted("ok 👍")), max_new_tokens=5)
        result = run.result(WAIT_S)
        assert result.text == text_of(byte_tokenizer()("ok 👍")["input_ids"][:5]) == "ok \ufffd"
        assert result.finish.reason == "length"

    def test_a_late_reader_and_two_at_once_see_the_same(self, serve):
        run = say(serve(scripted("two readers, one stream")), max_new_tokens=50)
        seen: list[list] = [[], []]
        readers = [
            threading.Thread(target=lambda out=out: out.extend(run.events(timeout=WAIT_S)), name="brook-test-reader")
            for out in seen
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(WAIT_S)
        late = list(run.events(timeout=WAIT_S))
        assert seen[0] == seen[1] == late
        assert list(run.events(after=10, timeout=WAIT_S)) == late[10:]

    def test_the_finish_is_the_length_limit_or_the_end_token(self, serve):
        engine = serve(scripted("abc"))
        assert say(engine, max_new_tokens=2).result(WAIT_S).finish.reason == "length"
        assert say(engine, max_new_tokens=3).result(WAIT_S).finish.reason == "length"
        assert say(engine, max_new_tokens=4).result(WAIT_S).finish.reason == "stop"


class TestStopStrings:
    @pytest.mark.parametrize(
        ("stop", "text"),
        [
            (["END"], "abc "),
            (["c E"], "ab"),
            (["zzz", " END"], "abc"),
            (["bcd"], "abc END def"),
            (["def", "END"], "abc "),
        ],
    )
    def test_text_ends_before_the_first_one(self, serve, stop, text):
        run = say(serve(scripted("abc END def")), max_new_tokens=50, stop=stop)
        result = run.result(WAIT_S)
        assert (result.text, result.finish.reason) == (text, "stop")

    def test_what_may_become_one_is_shown_once_it_cannot(self, serve):
        run = say(serve(scripted("xEN")), max_new_tokens=3, stop=["END"])
        assert run.result(WAIT_S).text == "xEN"


class TestPenalties:
    """A scripted token's logit is 10 and every other's 0: a penalty of 2 a time lets it come five times."""

    def test_a_token_comes_until_its_penalty_outweighs_it(self, serve):
        engine = serve(scripted("a" * 20))
        assert say(engine, max_new_tokens=8).result(WAIT_S).text == "a" * 8
        assert say(engine, max_new_tokens=8, presence_penalty=2.0).result(WAIT_S).text == "a" * 8
        text = say(engine, max_new_tokens=8, frequency_penalty=2.0).result(WAIT_S).text
        assert (text.count("a"), text[:5]) == (5, "aaaaa")

    def test_what_a_continued_reply_has_already_counts(self, serve):
        model = scripted("a" * 20)
        model.expect(len(chat_ids(HELLO)) + len("aaa"))
        options = {"max_new_tokens": 8, "temperature": 0, "frequency_penalty": 2.0}
        run = serve(model).submit(GenerationRequest(messages=HELLO, prefix_text="aaa", **options))
        assert run.result(WAIT_S).text.count("a") == 2


class TestErrors:
    @pytest.mark.parametrize("k", [0, 1, 7])
    def test_an_exception_at_token_k_gives_k_tokens_then_one_error_finish(self, serve, k):
        def fail():
            raise ValueError("the model broke")

        model = scripted("abcdefghij", {k: fail})
        engine = serve(model)
        events = list(say(engine, max_new_tokens=20).events(timeout=WAIT_S))
        assert "".join(e.text for e in events[:-1]) == "abcdefghij"[:k]
        assert events[-1].reason == "error"
        assert "The model stopped with an error (ValueError: the model broke)" in events[-1].error
        assert events[-1].error.count("try again") == 1
        model.at.clear()
        assert say(engine, max_new_tokens=20).result(WAIT_S).text == "abcdefghij"

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    )
    def test_out_of_memory_says_what_to_do_and_frees_the_engine(self, serve, error):
        def fail():
            raise error

        model = scripted("abc", {1: fail})
        engine = serve(model)
        finish = say(engine).result(WAIT_S).finish
        assert "The machine ran out of memory; shorten the conversation or lower max new tokens" in finish.error
        model.at.clear()
        assert say(engine).result(WAIT_S).text == "abc"

    def test_even_a_system_exit_in_the_model_ends_only_that_run(self, serve):
        def leave():
            raise SystemExit(3)

        model = scripted("abc", {1: leave})
        engine = serve(model)
        assert say(engine).result(WAIT_S).finish.reason == "error"
        model.at.clear()
        assert say(engine).result(WAIT_S).text == "abc"


class TestCancel:
    def test_while_decoding_it_takes_effect_within_one_token(self, serve):
        run = None
        asked = threading.Event()

        def cancel():
            assert asked.wait(WAIT_S)
            wait_for(lambda: len(run.log) == 4)
            run.cancel()

        model = scripted("abcdefghij", {4: cancel})
        engine = serve(model)
        run = say(engine, max_new_tokens=50)
        asked.set()
        result = run.result(WAIT_S)
        assert (result.text, result.finish.reason) == ("abcd", "cancelled")
        model.at.clear()
        assert say(engine).result(WAIT_S).text == "abcdefghij"

    def test_at_once_and_twice_is_one_finish(self, serve):
        hold = threading.Event()
        engine = serve(scripted("abc", {0: lambda: hold.wait(WAIT_S)}))
        run = say(engine)
        run.cancel()
        run.cancel()
        hold.set()
        assert [(event.type, event.reason) for event in run.events(timeout=WAIT_S)] == [("finish", "cancelled")]
        assert say(engine).result(WAIT_S).text == "abc"

    @of_chunks
    def test_while_reading_the_prompt_it_takes_effect_within_one_chunk(self, serve):
        n_prompt = 4 * PREFILL_CHUNK_TOKENS
        model = scripted("never said")
        engine = serve(model, n_context=8192)
        engine.wait_ready(WAIT_S)
        model.expect(n_prompt)
        run = None
        submitted = threading.Event()

        def cancel_in_first_chunk(module, args, kwargs, output):
            assert submitted.wait(WAIT_S)
            run.cancel()

        model.register_forward_hook(cancel_in_first_chunk, with_kwargs=True)
        run = engine.submit(GenerationRequest(prompt="x" * n_prompt, temperature=0))
        submitted.set()
        result = run.result(WAIT_S)
        assert (result.token_ids, result.finish.reason, model.n_forwards) == ([], "cancelled", 1)

    def test_while_queued_it_leaves_at_once(self, serve):
        started, hold = threading.Event(), threading.Event()

        def wait():
            started.set()
            assert hold.wait(WAIT_S)

        engine = serve(scripted("abc", {1: wait}), one_seat=True)
        first = say(engine)
        assert started.wait(WAIT_S)
        second, third = say(engine), say(engine)
        second.cancel()
        assert second.result(WAIT_S).finish.reason == "cancelled"
        assert first.finish is None
        hold.set()
        assert [first.result(WAIT_S).text, second.result(0).text, third.result(WAIT_S).text] == ["abc", "", "abc"]

    def test_after_the_end_it_changes_nothing(self, serve):
        run = say(serve(scripted("abc")))
        before = run.result(WAIT_S)
        run.cancel()
        assert run.result(0) == before

    def test_closing_the_engine_ends_every_run(self, serve):
        hold = threading.Event()
        engine = serve(scripted("abc", {1: lambda: hold.wait(WAIT_S)}), one_seat=True)
        runs = [say(engine) for _ in range(3)]
        closer = threading.Thread(target=engine.close, name="brook-test-closer")
        closer.start()
        assert runs[2].result(WAIT_S).finish.reason == "cancelled"
        hold.set()
        closer.join(WAIT_S)
        assert [run.result(0).finish.reason for run in runs] == ["cancelled"] * 3
        assert engine.status().state == "closed"
        with pytest.raises(EngineClosed):
            engine.submit(GenerationRequest(prompt="x"))
        runs[0].cancel()
        engine.close()


class TestQueue:
    @of_places
    def test_places_are_told_and_requests_run_in_order(self, serve):
        started, hold = threading.Event(), threading.Event()
        states = []  # of all, whenever one begins

        def wait():
            started.set()
            assert hold.wait(WAIT_S)
            states.append([run.progress.state for run in runs])

        engine = serve(scripted("abc", {0: wait}), one_seat=True)
        runs = [say(engine) for _ in range(3)]
        assert started.wait(WAIT_S)
        assert [(run.progress.state, run.progress.n_ahead) for run in runs] == [
            ("reading", 0),
            ("waiting", 1),
            ("waiting", 2),
        ]
        assert (engine.status().n_active, engine.status().n_queued) == (1, 2)
        hold.set()
        for run in runs:
            run.result(WAIT_S)
        assert states == [
            ["reading", "waiting", "waiting"],
            ["done", "reading", "waiting"],
            ["done", "done", "reading"],
        ]
        assert [run.progress.state for run in runs] == ["done"] * 3

    @of_places
    def test_people_take_turns_and_their_places_move(self, serve):
        started, hold = threading.Event(), threading.Semaphore(0)
        states = []  # of those that waited, whenever one begins

        def wait():
            started.set()
            assert hold.acquire(timeout=WAIT_S)
            states.append([run.progress.state for run in runs])

        engine = serve(scripted("a", {0: wait}), one_seat=True)
        first = say(engine, owner="ann")
        assert started.wait(WAIT_S)
        runs = [say(engine, owner=owner) for owner in ("ann", "ann", "bob")]
        assert [run.progress.n_ahead for run in runs] == [1, 3, 2]
        runs[0].cancel()
        assert runs[0].result(timeout=0).finish.timings.queued_s > 0
        assert [run.progress.n_ahead for run in runs] == [0, 1, 2]
        hold.release(3)
        for run in [first, *runs]:
            run.result(WAIT_S)
        assert states[1:] == [["done", "reading", "waiting"], ["done", "done", "reading"]]

    def test_beyond_the_limits_it_says_so_and_goes_on(self, serve):
        started, hold = threading.Event(), threading.Event()

        def wait():
            started.set()
            assert hold.wait(WAIT_S)

        engine = serve(scripted("a", {0: wait}), one_seat=True, max_active=2, max_queued=2)
        runs = [say(engine, owner="ann")]
        assert started.wait(WAIT_S)
        runs.append(say(engine, owner="ann"))
        with pytest.raises(EngineBusy, match=r"one person may \(2\)"):
            say(engine, owner="ann")
        runs.append(say(engine, owner="bob"))
        with pytest.raises(EngineBusy, match="try again in a minute"):
            say(engine, owner="cat")
        assert engine.status().n_queued == 2
        hold.set()
        assert [run.result(WAIT_S).text for run in runs] == ["a", "a", "a"]
        assert say(engine, owner="ann").result(WAIT_S).text == "a"

    @of_places
    def test_reading_the_prompt_shows_how_far_it_is(self, serve):
        n_prompt = 3 * PREFILL_CHUNK_TOKENS
        model = scripted("a")
        engine = serve(model, n_context=8192)
        engine.wait_ready(WAIT_S)
        model.expect(n_prompt)
        seen = []
        submitted = threading.Event()

        def note(module, args, kwargs):
            assert submitted.wait(WAIT_S)
            seen.append((run.progress.state, run.progress.n_read, run.progress.n_to_read))

        model.register_forward_pre_hook(note, with_kwargs=True)
        run = engine.submit(GenerationRequest(prompt="x" * n_prompt, temperature=0))
        submitted.set()
        run.result(WAIT_S)
        assert seen[:3] == [("reading", 0, 768), ("reading", 256, 768), ("reading", 512, 768)]
        assert seen[3] == ("writing", 768, 768)

    def test_hundreds_of_generations_leave_no_thread(self, serve):
        engine = serve(scripted("ab"))
        say(engine).result(WAIT_S)
        before = threading.active_count()
        for _ in range(300):
            assert say(engine).result(WAIT_S).text == "ab"
        assert threading.active_count() < before + 10  # a server's pool may grow

    def test_eight_people_at_once_each_get_their_own(self, serve):
        engine = serve(tiny_llama())
        prompts = [f"person {i} asks {i * 7}" for i in range(8)]
        alone = [
            engine.submit(GenerationRequest(prompt=p, max_new_tokens=20, temperature=0)).result(WAIT_S) for p in prompts
        ]
        runs: dict[str, GenerationResult] = {}

        def ask(prompt: str) -> None:
            run = engine.submit(GenerationRequest(prompt=prompt, max_new_tokens=20, temperature=0))
            runs[prompt] = run.result(WAIT_S)

        threads = [threading.Thread(target=ask, args=(p,), name="brook-test-person") for p in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        for prompt, expected in zip(prompts, alone, strict=True):
            assert (runs[prompt].text, runs[prompt].token_ids) == (expected.text, expected.token_ids)


class TestSampling:
    def test_a_seed_reproduces_and_a_fresh_one_is_reported(self, serve):
        engine = serve(tiny_llama())

        def ask(seed: int | None) -> Generation:
            return engine.submit(GenerationRequest(prompt="go", max_new_tokens=30, temperature=1.5, seed=seed))

        fresh = ask(None)
        again = ask(fresh.seed)
        other = ask(fresh.seed + 1)
        assert fresh.result(WAIT_S).text == again.result(WAIT_S).text
        assert fresh.result(WAIT_S).text != other.result(WAIT_S).text

    def test_the_global_random_generator_is_left_alone(self, serve):
        engine = serve(tiny_llama())
        engine.wait_ready(WAIT_S)
        state = torch.random.get_rng_state()
        engine.submit(GenerationRequest(prompt="go", max_new_tokens=10, temperature=1)).result(WAIT_S)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_logprobs_are_the_models_own(self, serve):
        """Of the likeliest token alone (`top_k` 1): the settings would give it a logprob of 0."""
        request = GenerationRequest(messages=HELLO, max_new_tokens=8, temperature=0.7, top_k=1, logprobs=3)
        *tokens, _ = serve(tiny_llama()).submit(request).events(timeout=WAIT_S)
        prompt_ids = chat_ids(HELLO)
        written = generated(prompt_ids, 8)
        with torch.no_grad():
            logits = tiny_llama()(torch.tensor([[*prompt_ids, *written]])).logits[0, len(prompt_ids) - 1 : -1]
        for event, token_id, row in zip(tokens, written, logits.log_softmax(-1), strict=True):
            assert event.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
            assert [top.logprob for top in event.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "options"),
        [
            ("temperature", {"temperature": -1}),
            ("temperature", {"temperature": float("nan")}),
            ("top_p", {"top_p": 1.5}),
            ("max_new_tokens", {"max_new_tokens": 0}),
            ("stop", {"stop": [""]}),
            ("stop", {"stop": ["x" * 257]}),
            ("prompt", {"messages": [{"role": "user", "content": "x"}]}),
        ],
    )
    def test_a_value_out_of_range_names_its_field(self, field, options):
        with pytest.raises(InvalidRequest) as caught:
            GenerationRequest(prompt="x", **options)
        assert caught.value.field == field

    @of_refusals_at_once
    def test_ids_that_the_model_does_not_have(self, serve):
        with pytest.raises(InvalidRequest, match="0 to 258"):
            serve(tiny_llama()).submit(GenerationRequest(prompt_ids=[1, 999]))

    @of_refusals_at_once
    def test_a_prompt_too_long_tells_both_numbers(self, serve):
        with pytest.raises(PromptTooLong, match=r"600 tokens.*at most 502") as caught:
            serve(tiny_llama()).submit(GenerationRequest(prompt="x" * 600, max_new_tokens=10))
        assert (caught.value.n_prompt_tokens, caught.value.n_max_prompt_tokens) == (600, 502)

    def test_a_reader_that_waits_too_long_is_told(self, serve):
        hold = threading.Event()
        engine = serve(scripted("abc", {0: lambda: hold.wait(WAIT_S)}))
        run = say(engine)
        with pytest.raises(StreamTimeout):
            next(run.events(timeout=0.05))
        with pytest.raises(StreamTimeout):
            run.result(timeout=0.05)
        hold.set()
        assert run.result(WAIT_S).text == "abc"


class TestContinue:
    @of_token_ids
    def test_prefix_ids_go_on_exactly_where_the_reply_stopped(self, serve):
        engine = serve(tiny_llama())
        whole = engine.submit(GenerationRequest(messages=HELLO, max_new_tokens=30, temperature=0)).result(WAIT_S)
        rest = engine.submit(
            GenerationRequest(messages=HELLO, prefix_ids=whole.token_ids[:11], max_new_tokens=19, temperature=0)
        )
        assert rest.prompt_ids == (*chat_ids(HELLO), *whole.token_ids[:11])
        assert whole.token_ids[:11] + rest.result(WAIT_S).token_ids == whole.token_ids
        assert rest.prefix_text + rest.result(WAIT_S).text == whole.text

    def test_a_prefix_of_text_is_read_as_the_reply_so_far(self, serve):
        engine, text = serve(tiny_llama()), "so <|im_end|> far"  # control tokens in it are text
        run = engine.submit(GenerationRequest(messages=HELLO, prefix_text=text, max_new_tokens=5, temperature=0))
        ids = byte_tokenizer()(text, split_special_tokens=True)["input_ids"]
        assert EOS not in ids
        assert run.prefix_text == text
        assert run.result(WAIT_S).text == text_of(generated([*chat_ids(HELLO), *ids], 5))


class TestReuse:
    @of_token_ids
    def test_the_next_turn_reads_only_what_is_new_and_says_the_same(self, serve):
        engine, fresh = serve(tiny_llama()), serve(tiny_llama())
        messages = [{"role": "user", "content": "hello there"}]
        n_known = 0
        for turn in range(4):
            request = GenerationRequest(messages=messages, max_new_tokens=16, temperature=0, owner="me")
            run = engine.submit(request)
            result = run.result(WAIT_S)
            again = fresh.submit(GenerationRequest(prompt_ids=run.prompt_ids, max_new_tokens=16, temperature=0))
            assert result.token_ids == again.result(WAIT_S).token_ids
            assert result.finish.n_reused_tokens == n_known
            n_known = len(run.prompt_ids) + len(result.token_ids) - 1
            messages += [
                {"role": "assistant", "content": result.text, "token_ids": result.token_ids},
                {"role": "user", "content": f"and {turn}?"},
            ]

    def test_what_was_read_for_one_owner_is_reused_for_that_owner_alone(self, serve):
        engine = serve(tiny_llama())

        def n_reused(owner: str) -> int:
            run = engine.submit(GenerationRequest(prompt="x" * 100, max_new_tokens=4, temperature=0, owner=owner))
            return run.result(WAIT_S).finish.n_reused_tokens

        assert (n_reused("ann"), n_reused("bob"), n_reused("ann")) == (0, 0, 99)

    @of_token_ids
    def test_of_two_owners_chats_only_what_every_chat_begins_with_is_read_once(self, serve):
        engine, fresh = (serve(tiny_llama(), tokenizer=byte_tokenizer(SYSTEM_TEMPLATE)) for _ in range(2))
        opening = byte_tokenizer()(SYSTEM + "<|im_start|>user\n")["input_ids"]
        chat = {"messages": [{"role": "user", "content": "the same words of both"}]}
        options = {"max_new_tokens": 8, "temperature": 0}
        n_reused = []
        for owner in ("ann", "bob", "bob"):
            run = engine.submit(GenerationRequest(**chat, **options, owner=owner))
            result = run.result(WAIT_S)
            again = fresh.submit(GenerationRequest(prompt_ids=run.prompt_ids, **options, owner=str(len(n_reused))))
            assert list(run.prompt_ids[: len(opening)]) == opening
            assert again.result(WAIT_S).finish.n_reused_tokens == 0
            assert result.token_ids == again.result(WAIT_S).token_ids
            n_reused.append(result.finish.n_reused_tokens)
        assert n_reused == [len(opening), len(opening), len(run.prompt_ids) - 1]
        for_all = [entry.ids for entry in engine._reading.prefixes._entries if entry.owner is NOBODY]
        assert for_all == [tuple(opening)]

    def test_a_system_prompt_of_ones_own_is_read_for_nobody_else(self, serve):
        engine = serve(tiny_llama(), tokenizer=byte_tokenizer(SYSTEM_TEMPLATE))
        engine.submit(GenerationRequest(messages=[{"role": "user", "content": "x"}], max_new_tokens=1)).result(WAIT_S)
        chat = [{"role": "system", "content": "Only we two say this."}, {"role": "user", "content": "hello"}]
        for owner in ("ann", "bob"):
            run = engine.submit(GenerationRequest(messages=chat, max_new_tokens=2, temperature=0, owner=owner))
            assert run.result(WAIT_S).finish.n_reused_tokens == len("<system\n")

    def test_with_no_room_for_prefixes_every_chat_is_read_whole(self, serve):
        engine = serve(tiny_llama(), tokenizer=byte_tokenizer(SYSTEM_TEMPLATE), max_cache_bytes=0)
        for _ in range(2):
            run = engine.submit(GenerationRequest(messages=[{"role": "user", "content": "x"}], max_new_tokens=1))
            assert run.result(WAIT_S).finish.n_reused_tokens == 0

    @of_token_ids
    def test_after_a_cancel_what_was_read_is_still_good(self, serve):
        engine = serve(tiny_llama())
        run = engine.submit(GenerationRequest(prompt="x" * 100, max_new_tokens=400, temperature=0))
        next(run.events(timeout=WAIT_S))
        run.cancel()
        ids = run.result(WAIT_S).token_ids
        rest = engine.submit(GenerationRequest(prompt="x" * 100, prefix_ids=ids, max_new_tokens=5, temperature=0))
        whole = engine.submit(
            GenerationRequest(prompt="x" * 100, max_new_tokens=len(ids) + 5, temperature=0, owner="another")
        )
        assert ids + rest.result(WAIT_S).token_ids == whole.result(WAIT_S).token_ids
        assert rest.result(WAIT_S).finish.n_reused_tokens >= 99


HYBRID = Lfm2Config(
    vocab_size=259,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    layer_types=["conv", "full_attention"],
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)


@of_token_ids
def test_a_model_whose_cache_cannot_be_cut_answers_every_time(serve):
    """Half of its layers keep a state instead of keys and values: nothing is kept of it, and nothing is lost."""
    torch.manual_seed(0)
    engine = serve(AutoModelForCausalLM.from_config(HYBRID, dtype=torch.float32).eval())
    results = [
        engine.submit(GenerationRequest(prompt="hello", max_new_tokens=5, temperature=0)).result(WAIT_S)
        for _ in range(3)
    ]
    assert [result.finish.reason for result in results] == ["length"] * 3
    assert len(results[0].token_ids) == 5
    assert results[0].token_ids == results[1].token_ids == results[2].token_ids
    assert {result.finish.n_reused_tokens for result in results} == {0}


@pytest.mark.parametrize("kind", [LocalEngine, BatchedEngine], ids=kind_of)
def test_a_model_without_attention_is_refused_in_a_sentence(kind):
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=259))
    with closing(kind(lambda _: loaded(model))) as engine:
        with pytest.raises(NotACausalLM, match=r"^tiny is a recurrent model without attention, .*; choose another\.$"):
            engine.wait_ready(WAIT_S)
        assert engine.status().state == "failed"


@pytest.mark.parametrize("kind", [LocalEngine, BatchedEngine], ids=kind_of)
def test_code_of_a_model_that_ends_the_process_ends_the_loading_alone(kind):
    def leave(_progress):
        raise SystemExit("see you")

    with closing(kind(leave)) as engine:
        refusals = []
        for _ in range(3):
            with pytest.raises(ModelUnavailable, match=r"could not be loaded \(SystemExit: see you\)") as caught:
                engine.wait_ready(WAIT_S)
            refusals.append(len(traceback.extract_tb(caught.tb)))
        assert len(set(refusals)) == 1  # else each holds what the one before held, requests among it


@of_token_ids
def test_what_cannot_be_kept_costs_nobody_an_answer(serve, monkeypatch):
    engine = serve(tiny_llama())
    monkeypatch.setattr(engine._reading.prefixes, "keep", lambda *_: 1 / 0)
    for _ in range(2):
        assert say(engine, max_new_tokens=3).result(WAIT_S).finish.reason == "length"


@of_token_ids
def test_a_mistake_in_the_engine_is_told_and_the_next_request_is_served(serve, monkeypatch):
    engine = serve(tiny_llama())
    expected = say(engine, max_new_tokens=3).result(WAIT_S).token_ids
    monkeypatch.setattr(engine, "_serve", lambda *_: 1 / 0)
    failed = say(engine, max_new_tokens=3).result(WAIT_S)
    assert (failed.finish.reason, failed.token_ids) == ("error", [])
    assert "ZeroDivisionError" in failed.finish.error
    monkeypatch.undo()
    assert say(engine, max_new_tokens=3).result(WAIT_S).token_ids == expected
    assert engine.status().n_active == 0


@of_token_ids
def test_closing_lets_go_of_what_was_kept(serve):
    """Whoever keeps a generation keeps its engine: not also the memory."""
    engine = serve(tiny_llama())
    run = say(engine, max_new_tokens=3)
    run.result(WAIT_S)
    cache = weakref.ref(engine._reading.prefixes._entries[0].cache)
    engine.close()
    assert cache() is None
    assert engine._reading.prefixes.n_bytes == 0


@of_token_ids
def test_ids_of_a_reply_that_are_not_the_models_are_not_shown_to_it(serve):
    """A conversation that was imported may say anything: its text then counts."""
    engine = serve(tiny_llama())
    wrong = [HELLO[0], {"role": "assistant", "content": "hi", "token_ids": [5, 2**32 - 1]}, HELLO[0]]
    run = engine.submit(GenerationRequest(messages=wrong, max_new_tokens=2))
    assert run.result(WAIT_S).finish.reason == "length"
    plain = [{"role": message["role"], "content": message["content"]} for message in wrong]
    assert list(run.prompt_ids) == chat_ids(plain)


@of_token_ids
def test_a_limit_refuses_before_the_text_is_looked_at(serve, monkeypatch):
    reading = threading.Event()
    engine = serve(scripted("abc", {1: lambda: reading.wait(WAIT_S) and None}), max_active=1)
    first = say(engine)
    monkeypatch.setattr(type(engine.tokenizer), "__call__", lambda *_, **__: pytest.fail("the text was encoded"))
    with pytest.raises(EngineBusy):
        say(engine)
    reading.set()
    assert first.result(WAIT_S).text == "abc"


@of_token_ids
def test_what_is_kept_grows_in_blocks(serve):
    """A token costs its own bytes, not a copy of all before it."""
    engine = serve(tiny_llama())
    say(engine, max_new_tokens=20).result(WAIT_S)
    (entry,) = engine._reading.prefixes._entries
    assert [type(layer) for layer in entry.cache.layers] == [GrowingLayer] * 2
    assert {layer.capacity for layer in entry.cache.layers} == {BLOCK_TOKENS}
    assert {layer.keys.dtype for layer in entry.cache.layers} == {torch.float32}
