"""Runs that share a model's steps: each says what it says alone, whatever the others do."""

import functools
import threading

import pytest

import streaming.engine.run as run_module
from streaming.engine.base import Generation, GenerationRequest
from streaming.engine.batch import STEP_TOKENS, ForwardStep, StepBatch
from streaming.engine.batched import BatchedEngine
from streaming.engine.managed import ManagedBatch
from streaming.models.llama_step import LlamaStep
from tests.packed import WITH_STEP, pack_model, random_model
from tests.tiny import SYSTEM, SYSTEM_TEMPLATE, byte_tokenizer, loaded, tiny_llama

WAIT_S = 60
KINDS = ("compiled", "in turn", "managed")


@functools.cache
def packed():
    return pack_model(random_model(WITH_STEP["llama"]))


def eager_llama():
    """Continuous batching is not for this one."""
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def engine(kind):
    model = {"compiled": packed, "in turn": eager_llama, "managed": tiny_llama}[kind]()
    engine = BatchedEngine(lambda progress: loaded(model, byte_tokenizer(), n_context=512))
    assert engine.wait_ready(WAIT_S)
    yield engine
    engine.close()


def together(engine: BatchedEngine, requests: list[GenerationRequest]) -> list[Generation]:
    """Submit all while the first one's first step is held up, so that they are served in one batch."""
    submitted = threading.Event()
    hook = engine._loaded.model.register_forward_pre_hook(lambda *_: submitted.wait(WAIT_S) and None)
    try:
        runs = [engine.submit(request) for request in requests]
        submitted.set()
        for run in runs:
            run.log.wait_finish(WAIT_S)
    finally:
        hook.remove()
    return runs


def ask(number: int, **options) -> GenerationRequest:
    options = {"temperature": 0, "max_new_tokens": 24, "owner": str(number)} | options
    return GenerationRequest(prompt=f"person {number} asks " + "so " * number, **options)


def test_each_kind_of_model_is_served_in_its_own_way(engine, kind):
    batch = engine._batch
    if kind == "managed":
        assert isinstance(batch, ManagedBatch)
    else:
        assert isinstance(batch, StepBatch)
        assert isinstance(batch._step, LlamaStep if kind == "compiled" else ForwardStep)
    assert (engine.status().detail != "") == (kind == "in turn")


def test_everyone_gets_what_they_get_alone_and_the_streams_run_at_once(engine):
    requests = [ask(number) for number in range(8)]
    alone = [engine.submit(request).result(WAIT_S) for request in requests]
    runs = together(engine, requests)
    assert [run.result(0).token_ids for run in runs] == [result.token_ids for result in alone]
    assert [run.result(0).text for run in runs] == [result.text for result in alone]
    first_s = [next(iter(run.events())).t_s for run in runs]
    last_s = [list(run.events())[-2].t_s for run in runs]
    assert max(first_s) < min(last_s)


def test_whoever_joins_goes_on_from_what_every_chat_begins_with(kind):
    model = {"compiled": packed, "in turn": eager_llama, "managed": tiny_llama}[kind]()
    tokenizer = byte_tokenizer(SYSTEM_TEMPLATE)
    requests = [
        GenerationRequest(
            messages=[{"role": "user", "content": f"person {number}"}],
            max_new_tokens=24,
            temperature=0,
            owner=str(number),
        )
        for number in range(6)
    ]
    served = []
    for options in ({}, {"max_cache_bytes": 0}):  # one after the other: an engine owns its model
        engine = BatchedEngine(lambda progress: loaded(model, tokenizer, n_context=512), **options)
        try:
            assert engine.wait_ready(WAIT_S)
            served.append(together(engine, requests))
        finally:
            engine.close()
    shared, alone = served
    assert [run.result(0).token_ids for run in shared] == [run.result(0).token_ids for run in alone]
    n_opening = len(tokenizer(SYSTEM + "<|im_start|>user\n")["input_ids"])
    n_reused = [run.finish.n_reused_tokens for run in shared]
    assert n_reused == ([n_opening] * 6 if kind != "managed" else [n_opening] + [0] * 5)
    assert {run.finish.n_reused_tokens for run in alone} == {0}


def test_settings_seeds_and_stop_strings_are_each_ones_own(engine):
    requests = [
        ask(0, temperature=1.5, seed=7),
        ask(0, temperature=1.5, seed=8, owner="b"),
        ask(0, temperature=1.5, seed=7, owner="c"),
        ask(1, temperature=0.8, top_p=0.5, top_k=20, seed=3, repetition_penalty=1.3),
        ask(2, min_p=0.2, temperature=1.2, seed=4, max_new_tokens=3),
        ask(3),
    ]
    alone = [engine.submit(request).result(WAIT_S) for request in requests]
    runs = together(engine, requests)
    assert [run.result(0).token_ids for run in runs] == [result.token_ids for result in alone]
    assert runs[0].result(0).token_ids == runs[2].result(0).token_ids != runs[1].result(0).token_ids
    assert runs[4].finish.reason == "length"
    stop = alone[5].text[4:7]
    stopped, other = together(engine, [ask(3, stop=[stop]), ask(3, owner="b")])
    assert (stopped.result(0).text, stopped.finish.reason) == (alone[5].text[: alone[5].text.index(stop)], "stop")
    assert other.result(0).text == alone[5].text


def test_logprobs_are_the_models_own(engine):
    requests = [ask(number, logprobs=3, temperature=0.7, seed=5, max_new_tokens=6) for number in range(3)]
    alone = [list(engine.submit(request).events(timeout=WAIT_S))[:-1] for request in requests]
    for run, expected in zip(together(engine, requests), alone, strict=True):
        for event, one in zip(list(run.events())[:-1], expected, strict=True):
            assert event.logprob == pytest.approx(one.logprob, abs=2e-2)
            assert event.top[0].id == one.top[0].id


def test_a_cancelled_run_leaves_and_the_others_go_on(engine):
    requests = [ask(0, max_new_tokens=400), ask(1), ask(2)]
    expected = [engine.submit(request).result(WAIT_S).token_ids for request in requests]
    runs: list[Generation] = []

    def cancel_first():
        for event in runs[0].events(timeout=WAIT_S):
            if getattr(event, "index", 0) == 2:
                runs[0].cancel()

    submitted = threading.Event()
    hook = engine._loaded.model.register_forward_pre_hook(lambda *_: submitted.wait(WAIT_S) and None)
    runs += [engine.submit(request) for request in requests]
    canceller = threading.Thread(target=cancel_first, name="brook-test-canceller")
    canceller.start()
    submitted.set()
    results = [run.result(WAIT_S) for run in runs]
    canceller.join(WAIT_S)
    hook.remove()
    assert results[0].finish.reason == "cancelled"
    assert results[0].token_ids == expected[0][: len(results[0].token_ids)]
    assert len(results[0].token_ids) < 400
    assert [result.token_ids for result in results[1:]] == expected[1:]
    assert engine.status().n_active == 0


def test_an_error_in_one_runs_settings_ends_that_run_alone(engine, monkeypatch):
    def fail(*_):
        raise ValueError("no such token")

    expected = engine.submit(ask(1)).result(WAIT_S)
    build = run_module.build_processors

    def sabotage(sampling, *rest, **named):
        return fail if sampling.max_new_tokens == 23 else build(sampling, *rest, **named)

    monkeypatch.setattr(run_module, "build_processors", sabotage)
    runs = together(engine, [ask(1), ask(0, max_new_tokens=23), ask(1, owner="b")])
    assert [run.finish.reason for run in runs] == [expected.finish.reason, "error", expected.finish.reason]
    assert runs[1].finish.error == "The model stopped with an error (ValueError: no such token); try again."
    assert runs[0].result(0).token_ids == runs[2].result(0).token_ids == expected.token_ids


def test_more_people_than_seats_all_get_theirs():
    engine = BatchedEngine(lambda progress: loaded(packed(), byte_tokenizer(), n_context=512), n_seats=3)
    try:
        engine.wait_ready(WAIT_S)
        requests = [ask(number) for number in range(8)]
        alone = [engine.submit(request).result(WAIT_S).token_ids for request in requests]
        assert [run.result(0).token_ids for run in together(engine, requests)] == alone
    finally:
        engine.close()


def test_a_long_prompt_is_read_in_parts_beside_those_who_write():
    engine = BatchedEngine(lambda progress: loaded(packed(), byte_tokenizer(), n_context=1024))
    engine.wait_ready(WAIT_S)
    long = GenerationRequest(prompt="x" * (4 * STEP_TOKENS), max_new_tokens=4, temperature=0)
    expected = engine.submit(long).result(WAIT_S).token_ids
    step, sizes = engine._batch._step, []
    read = step.read

    def note(pieces, wanted):
        sizes.append([len(ids) for _, ids in pieces])
        return read(pieces, wanted)

    step.read = note
    try:
        writer, reader = together(engine, [ask(0, max_new_tokens=40), GenerationRequest(**as_options(long))])
    finally:
        del step.read
        engine.close()
    assert reader.result(0).token_ids == expected
    assert len(writer.result(0).token_ids) == 40
    beside = [size[1] for size in sizes if len(size) == 2 and size[0] == 1]
    assert max(beside) == STEP_TOKENS
    assert len([n for n in beside if n == STEP_TOKENS]) >= 2


def as_options(request: GenerationRequest) -> dict:
    return {"prompt": request.prompt, "max_new_tokens": request.max_new_tokens, "temperature": 0, "owner": "reader"}


def test_what_a_models_own_configuration_asks_for_holds_in_company_too(kind):
    model = {"compiled": lambda: pack_model(random_model(WITH_STEP["llama"])), "in turn": eager_llama}.get(
        kind, tiny_llama
    )()
    model.generation_config.no_repeat_ngram_size = 1
    engine = BatchedEngine(lambda progress: loaded(model, n_context=512))
    try:
        assert engine.wait_ready(WAIT_S)
        requests = [ask(number) for number in range(4)]
        alone = [engine.submit(request).result(WAIT_S).token_ids for request in requests]
        runs = together(engine, requests)
    finally:
        engine.close()
    assert [run.result(0).token_ids for run in runs] == alone
    assert all(ids and len(set(ids)) == len(ids) for ids in alone)


def test_whoever_asks_for_much_leaves_seats_for_others(monkeypatch):
    engine = BatchedEngine(lambda progress: loaded(packed(), byte_tokenizer(), n_context=512), n_seats=4)
    take, seats = engine._queue.take, []

    def note():
        run = take()
        seats.append([one.generation.request.owner for one in engine._queue.served].count("much"))
        return run

    monkeypatch.setattr(engine._queue, "take", note)
    try:
        engine.wait_ready(WAIT_S)
        much = [ask(number, owner="much", max_new_tokens=400) for number in range(6)]
        *busy, other = together(engine, [*much, ask(1)])
    finally:
        engine.close()
    assert max(seats) == 2
    assert [len(run.result(0).token_ids) for run in (*busy, other)] == [400] * 6 + [24]
    assert list(other.events())[-2].t_s < min(list(run.events())[-2].t_s for run in busy)  # it waited for none of them


def test_a_managed_run_counts_until_its_end_is_told(monkeypatch):
    """Between its seat and the line of those that are done, it was in neither: the worker left, and nobody ended it."""
    engine = BatchedEngine(lambda progress: loaded(tiny_llama(), n_context=512))
    try:
        engine.wait_ready(WAIT_S)
        manager = engine._batch._manager
        cancel_request, counts = manager.cancel_request, []

        def count(name):
            counts.append(engine._batch.n_runs)
            return cancel_request(name)

        monkeypatch.setattr(manager, "cancel_request", count)
        runs = together(engine, [ask(0, max_new_tokens=5), ask(1, max_new_tokens=9)])
        assert [len(run.result(0).token_ids) for run in runs] == [5, 9]
        assert counts == [2, 1]
    finally:
        engine.close()


def test_the_manager_is_refused_where_it_computes_something_else(monkeypatch):
    monkeypatch.setattr(ManagedBatch, "suits", lambda self, model: False)
    engine = BatchedEngine(lambda progress: loaded(tiny_llama()))
    try:
        engine.wait_ready(WAIT_S)
        assert isinstance(engine._batch, StepBatch)
        assert engine.status().detail.startswith("This model cannot be batched")
    finally:
        engine.close()


def test_the_probe_tells_a_right_computation_from_a_wrong_one():
    engine = BatchedEngine(lambda progress: loaded(tiny_llama()))
    try:
        engine.wait_ready(WAIT_S)
        batch = engine._batch
        batch._probe.clear()
        assert not batch.suits(tiny_llama(seed=1))
    finally:
        engine.close()
