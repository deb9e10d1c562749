"""The lean loop says what generate() says with the same model, and keeps its protocol."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from streaming.engine.decode_loop import decode_loop
from streaming.models import llama_step
from streaming.models.kv_cache import BLOCK_TOKENS, GrowingLayer, copy_beginning, is_continuable
from streaming.models.llama_step import LlamaStep, step_of
from tests.packed import WITH_STEP, WITHOUT_STEP, pack_model, random_model

PROMPT = torch.tensor([[257, 5, 80, 13, 200, 7]])


class Recorder(LogitsProcessor):
    """Keeps the logits of every step."""

    def __init__(self):
        self.logits = []

    def __call__(self, input_ids, scores):
        self.logits.append(scores.clone())
        return scores


class Log:
    """A streamer that keeps what it is given; raises at put number `fail_at`."""

    def __init__(self, fail_at=None):
        self.puts, self.ended, self.fail_at = [], 0, fail_at

    def put(self, value):
        if len(self.puts) == self.fail_at:
            raise InterruptedError
        self.puts.append(value.clone())

    def end(self):
        self.ended += 1


@functools.cache
def packed(name):
    return pack_model(random_model((WITH_STEP | WITHOUT_STEP)[name]))


def generate(model, ids=PROMPT, lean=True, streamer=None, **options):
    recorder = Recorder()
    custom = {"custom_generate": functools.partial(decode_loop, streamer=streamer)} if lean else {}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=LogitsProcessorList([*options.pop("processors", ()), recorder]),
        streamer=streamer,
        **{"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, **options, **custom},
    )
    return out, torch.cat(recorder.logits)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("name", WITH_STEP)
def test_the_compiled_step_computes_the_models_own_logits(name, n_threads):
    model = packed(name)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        lean_ids, lean = generate(model)
        ids, stock = generate(model, lean=False)
    finally:
        torch.set_num_threads(before)
    assert step_of(model) is not None
    assert torch.equal(lean_ids, ids)
    assert (lean - stock).abs().max() < 2e-3 * stock.abs().max()


@pytest.mark.parametrize("name", WITHOUT_STEP)
def test_models_without_a_step_are_left_to_generate(name):
    model = packed(name)
    assert step_of(model) is None
    log = Log()
    lean_ids, lean = generate(model, streamer=log)
    ids, stock = generate(model, lean=False)
    assert torch.equal(lean_ids, ids)
    assert torch.equal(lean, stock)
    assert torch.equal(torch.cat([log.puts[0][0], *log.puts[1:]]), ids[0])
    assert log.ended == 1


def test_float_models_are_left_to_generate():
    model = random_model(WITH_STEP["llama"])
    assert torch.equal(generate(model)[0], generate(model, lean=False)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_settings_beyond_one_plain_sequence_are_left_to_generate(options):
    torch.manual_seed(0)
    lean = generate(packed("llama"), **options)[0]
    torch.manual_seed(0)
    assert torch.equal(lean, generate(packed("llama"), lean=False, **options)[0])


def test_recorded_scores_are_left_to_generate():
    out, _ = generate(packed("llama"), return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 40


def test_generate_gives_a_custom_loop_no_streamer():
    """Contract with transformers 5.23: why the streamer is named twice. If this fails, name it once."""
    given_streamers = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **kwargs):
        given_streamers.append(streamer)
        return input_ids

    packed("llama").generate(PROMPT, custom_generate=loop, streamer=Log())
    assert given_streamers == [None]


def test_the_streamer_gets_the_prompt_once_then_every_token_then_the_end():
    log = Log()
    ids, _ = generate(packed("llama"), streamer=log)
    assert torch.equal(log.puts[0], PROMPT)
    assert [put.shape for put in log.puts[1:]] == [(1,)] * 40
    assert torch.equal(torch.cat(log.puts[1:]), ids[0, PROMPT.shape[1] :])
    assert log.ended == 1


def test_sampling_draws_what_generate_draws():
    for seed in range(3):
        torch.manual_seed(seed)
        lean = generate(packed("llama"), do_sample=True, temperature=0.8, top_k=20)[0]
        torch.manual_seed(seed)
        assert torch.equal(lean, generate(packed("llama"), lean=False, do_sample=True, temperature=0.8, top_k=20)[0])


def test_processors_see_the_ids_and_their_scores_are_used():
    class Count(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[0, input_ids.shape[1]] = 0.0
            return forced

    ids, _ = generate(packed("llama"), processors=[Count()], max_new_tokens=5)
    assert ids[0, PROMPT.shape[1] :].tolist() == [6, 7, 8, 9, 10]


def test_an_end_token_and_a_criterion_stop_the_loop():
    class AtTen(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 10])

    free = generate(packed("llama"))[0][0, PROMPT.shape[1] :].tolist()
    end = free[4]
    ids, _ = generate(packed("llama"), eos_token_id=end)
    assert ids[0, PROMPT.shape[1] :].tolist() == free[: free.index(end) + 1]
    ids, _ = generate(packed("llama"), stopping_criteria=StoppingCriteriaList([AtTen()]))
    assert ids.shape[1] == 10


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_prompt_longer_than_a_block_and_a_reply_across_blocks(chunk):
    ids = torch.arange(BLOCK_TOKENS + 10)[None] % 250
    cache = DynamicCache(config=packed("llama").config)
    options = {"max_new_tokens": BLOCK_TOKENS, "prefill_chunk_size": chunk, "past_key_values": cache}
    lean_ids, lean = generate(packed("llama"), ids, **options)
    stock_ids, stock = generate(packed("llama"), ids, lean=False)
    same = (lean_ids[:, : stock_ids.shape[1]] == stock_ids).all()
    assert same
    assert (lean[:40] - stock).abs().max() < 2e-3 * stock.abs().max()
    assert lean_ids.shape[1] == ids.shape[1] + BLOCK_TOKENS


@pytest.mark.parametrize("fail_at", [1, 2, 17])
def test_a_streamer_that_raises_leaves_a_cache_that_goes_on(fail_at):
    model, cache = packed("llama"), DynamicCache(config=packed("llama").config)
    log = Log(fail_at)
    with pytest.raises(InterruptedError):
        generate(model, streamer=log, past_key_values=cache)
    assert log.ended == 0
    known = torch.cat([log.puts[0][0], *log.puts[1:]])
    assert cache.get_seq_length() == len(known)
    whole, _ = generate(model)
    assert torch.equal(known, whole[0, : len(known)])

    n_kept = len(PROMPT[0]) - 2
    cache.crop(-(len(known) - n_kept))
    again, _ = generate(model, whole[:, : len(known)], past_key_values=cache, max_new_tokens=10)
    assert torch.equal(again, whole[:, : len(known) + 10])


def test_two_caches_in_turn_do_not_mix():
    model = packed("llama")
    other = PROMPT.flip(1)
    expected = [generate(model, ids)[0] for ids in (PROMPT, other)]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    firsts = [
        generate(model, ids, past_key_values=cache, max_new_tokens=10)[0]
        for ids, cache in zip((PROMPT, other), caches, strict=True)
    ]
    for first, cache, whole in zip(firsts, caches, expected, strict=True):
        branch = copy_beginning(cache, cache.get_seq_length())
        for kept in (cache, branch):
            assert torch.equal(generate(model, first, past_key_values=kept, max_new_tokens=30)[0], whole)


def test_windows_and_other_caches_are_not_continued():
    assert is_continuable(DynamicCache(config=WITH_STEP["llama"]))
    assert not is_continuable(DynamicCache(config=WITHOUT_STEP["mistral with a window"]))
    assert not is_continuable(None)


@given(st.lists(st.integers(-300, 300), min_size=1, max_size=8))
def test_a_growing_layer_is_a_dynamic_layer(steps):
    """Positive steps append that many positions, negative ones crop."""
    torch.manual_seed(0)
    plain, growing, halves = DynamicLayer(), GrowingLayer(), GrowingLayer(torch.float16)
    for step in steps:
        if step > 0:
            states = torch.randn(2, 1, 2, step, 4)
            expected, result = plain.update(*states), growing.update(*states)
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
            rounded = halves.update(*states)
            assert all(torch.equal(a.half().float(), b) for a, b in zip(expected, rounded, strict=True))
        else:
            n = min(-step, plain.get_seq_length())
            plain.crop(-n)
            growing.crop(-n)
            halves.crop(-n)
            growing = growing.copy_beginning(growing.length)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(3) == plain.get_mask_sizes(3)
        if plain.is_initialized:
            assert torch.equal(growing.keys, plain.keys)
            assert torch.equal(growing.values, plain.values)
    growing.reset()
    assert growing.get_seq_length() == 0
    with pytest.raises(ValueError, match="negative number"):
        growing.crop(3)


def test_a_copy_of_a_growing_layer_goes_on_by_itself_and_takes_no_more_room_than_it_needs():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 1, 2, 3 * BLOCK_TOKENS, 4))
    before = layer.keys.clone()
    twin = layer.copy_beginning(5)
    assert torch.equal(twin.keys, before[:, :, :5])
    twin.update(*torch.randn(2, 1, 2, 1, 4))
    assert (layer.get_seq_length(), twin.get_seq_length(), twin.capacity) == (3 * BLOCK_TOKENS, 6, BLOCK_TOKENS)
    twin.keys[:] = 0
    assert torch.equal(layer.keys, before)
    assert GrowingLayer().copy_beginning(0).get_seq_length() == 0


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("name", WITH_STEP)
def test_rows_of_several_sequences_and_of_one_are_computed_as_if_alone(name, n_threads):
    """Prompts of 1 to 7 tokens read in one step, in two, then a token each: the same logits as the model's own."""
    model = packed(name)
    prompts = [list(range(10 * n, 11 * n)) for n in range(1, 8)]
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        step = step_of(model)
        caches = [step.open(DynamicCache(config=model.config)) for _ in prompts]
        step.read([(cache, ids[:3]) for cache, ids in zip(caches, prompts, strict=True)], [])
        rest = [(cache, ids[3:]) for cache, ids in zip(caches, prompts, strict=True) if ids[3:]]
        ends = [sum(len(ids) for _, ids in rest[: n + 1]) - 1 for n in range(len(rest))]
        after_prompts = step.read(rest, ends)
        after_more = step.read([(cache, [77]) for cache in caches], range(len(caches)))
    finally:
        torch.set_num_threads(before)
    assert [cache.length for cache in caches] == [len(ids) + 1 for ids in prompts]
    with torch.no_grad():
        stock = [model(torch.tensor([[*ids, 77]])).logits[0] for ids in prompts]
    for logits, expected in (
        *zip(after_prompts, [logits[-2] for logits, ids in zip(stock, prompts, strict=True) if ids[3:]], strict=True),
        *zip(after_more, [logits[-1] for logits in stock], strict=True),
    ):
        assert (logits - expected).abs().max() < 2e-3 * expected.abs().max()


def test_two_threads_that_read_with_one_model_get_what_each_gets_alone():
    """Its buffers are the model's: two readers at once wrote past each other's, into whatever lay behind."""
    model = pack_model(random_model(WITH_STEP["llama"]))
    step = step_of(model)

    def read(lengths):
        return [step.read_on(DynamicCache(config=model.config), range(length)) for length in lengths]

    growing, shrinking = range(1, 200), range(199, 0, -1)
    with ThreadPoolExecutor(2, thread_name_prefix="brook-test-reader") as readers:
        together = [*readers.map(read, [growing, shrinking], timeout=60)]
    for lengths, logits in zip((growing, shrinking), together, strict=True):
        assert all(map(torch.equal, logits, read(lengths)))


@pytest.mark.parametrize("n_cached", [2, 4])
@pytest.mark.parametrize("config", [None, WITH_STEP["llama"]], ids=["no layers yet", "layers"])
def test_a_cache_and_only_what_comes_after_it_says_what_the_whole_sequence_says(n_cached, config):
    """transformers' other way to go on from a cache: the new ids with a mask of the whole length."""
    model = packed("llama")
    said = []
    for lean in (True, False):
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(PROMPT[:, :n_cached], past_key_values=cache, use_cache=True)
        new_ids = PROMPT[:, n_cached:]
        custom = {"custom_generate": decode_loop} if lean else {}
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **custom}
        said.append(model.generate(new_ids, attention_mask=torch.ones_like(PROMPT), past_key_values=cache, **options))
    assert torch.equal(*said)
    whole, _ = generate(model, lean=False, max_new_tokens=20)
    assert torch.equal(said[0], whole[:, n_cached:])


def test_a_cache_without_layers_goes_to_generate():
    model = packed("llama")
    cache = DynamicCache()
    assert torch.equal(generate(model, past_key_values=cache)[0], generate(model)[0])


def test_what_others_set_for_the_whole_process_changes_nothing():
    """transformers sets torch's default dtype while it makes a model, whoever is decoding in another thread."""
    ids, expected = generate(packed("llama"))
    model = pack_model(random_model(WITH_STEP["llama"]))
    step = step_of(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rows = model.model.embed_tokens(ids)
        logits = step.read_on(DynamicCache(config=model.config), ids[0].tolist())
        product = model.model.layers[0].mlp.up_proj(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows.dtype == product.dtype == logits.dtype == torch.float32
    assert torch.equal(product, model.model.layers[0].mlp.up_proj(rows))
    assert torch.equal(logits, step.read_on(DynamicCache(config=model.config), ids[0].tolist()))
    assert torch.equal(generate(model)[1], expected)


def test_memory_that_runs_out_while_a_step_makes_room_costs_that_step_alone(monkeypatch):
    model = pack_model(random_model(WITH_STEP["llama"]))
    step = step_of(model)
    few, many = [7, 8], list(range(100))
    expected = [step.read_on(DynamicCache(config=model.config), ids) for ids in (few, many)]
    step = LlamaStep(model)
    step.read_on(DynamicCache(config=model.config), few)
    floats, n_made = llama_step._floats, 0

    def fail_at_the_fourth(*shape):
        nonlocal n_made
        n_made += 1
        if n_made == 4:
            raise MemoryError
        return floats(*shape)

    cache = DynamicCache(config=model.config)
    opened = step.open(cache)
    monkeypatch.setattr(llama_step, "_floats", fail_at_the_fourth)
    with pytest.raises(MemoryError):
        step.read([(opened, many)], [99])
    monkeypatch.undo()
    assert opened.length == 0
    assert torch.equal(step.read_on(DynamicCache(config=model.config), few), expected[0])
    assert torch.equal(step.read([(opened, many)], [99]), expected[1])


def test_a_step_reads_the_weights_that_it_was_made_for_whatever_becomes_of_the_model():
    model = pack_model(random_model(WITH_STEP["qwen 3 (norms of heads)"]))
    step = step_of(model)
    expected = step.read_on(DynamicCache(config=model.config), [5, 6, 7])
    places = {parameter.data_ptr() for parameter in model.parameters()}
    model.bfloat16()
    new = [torch.full((1 << 12,), torch.nan) for _ in range(100)]  # takes whatever place was let go of
    assert places.isdisjoint(tensor.data_ptr() for tensor in new)
    assert torch.equal(step.read_on(DynamicCache(config=model.config), [5, 6, 7]), expected)
