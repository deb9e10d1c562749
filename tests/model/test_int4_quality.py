"""With 4-bit weights the default model stays the model it was, and fits."""

import pytest
import torch
from transformers import DynamicCache

from benchmarks.lookup import tasks
from benchmarks.quality import CHUNK, by_step, compare, in_chunks, texts
from streaming import GenerationRequest
from streaming.engine.local import LocalEngine
from streaming.errors import ModelUnavailable
from streaming.models.int4 import PackedEmbedding, PackedLinear
from streaming.models.llama_step import LlamaStep, step_of
from streaming.models.loading import load_model
from streaming.models.packing import unpack
from tests.conftest import skip_or_fail
from tests.memory import mb_to_load

pytestmark = pytest.mark.model

FILE_MB = 98.4


@pytest.fixture(scope="module")
def packed():
    try:
        return load_model(quantize="int4")
    except ModelUnavailable as error:
        skip_or_fail(f"the default model is not here: {error}")


@pytest.fixture(scope="module")
def exact(packed):
    return load_model(quantize="none", dtype="float32")


def test_every_packed_weight_has_the_values_of_the_file(packed, exact):
    n_compared = 0
    for name, module in packed.model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            expected = exact.model.get_submodule(name).weight
            assert torch.equal(unpack(module.weight, len(expected)), expected), name
            n_compared += 1
    assert n_compared == 30 * 7 + 2


@pytest.mark.parametrize("kind", ["prose", "code", "chat"])
def test_reading_and_decoding_predict_what_the_dequantized_model_predicts(packed, exact, kind):
    ids = texts(packed.tokenizer)[kind]
    assert ids.shape[1] >= 1500
    for read, n_tokens in ((by_step(packed.model, CHUNK), ids.shape[1]), (by_step(packed.model, 1), 300)):
        kl, agreement, perplexity = compare(read, in_chunks(exact.model), ids[:, :n_tokens])
        assert kl <= 1e-5
        assert agreement >= 99.5
        assert abs(perplexity) <= 0.05


def test_the_engine_decodes_with_the_compiled_step_and_says_the_same(packed, exact):
    assert step_of(packed.model) is not None
    said = []
    for loaded in (packed, exact):
        engine = LocalEngine(lambda _, loaded=loaded: loaded)
        request = GenerationRequest(prompt="An increasing sequence: one,", max_new_tokens=40, temperature=0)
        said.append(engine.submit(request).result(timeout=120).token_ids)
        engine.close()
    assert said[0] == said[1]


def test_loading_takes_no_more_memory_than_three_times_the_file(packed):
    assert mb_to_load(None) <= 3 * FILE_MB


@torch.no_grad()
def test_what_is_reused_predicts_what_is_read_anew_predicts(packed):
    """A cache that was written by chunks and by steps, and cut, against one read in one go: ten turns of a chat."""
    ids = texts(packed.tokenizer)["chat"]
    model, step = packed.model, step_of(packed.model)
    cache, divergences = DynamicCache(config=model.config), []
    for end in range(150, 1500, 135):
        opened = step.open(cache)
        for start in range(opened.length, end - 30, 64):  # the question, by few tokens at a time
            step.read([(opened, ids[0, start : min(start + 64, end - 30)].tolist())])
        for token_id in ids[0, end - 30 : end].tolist():  # the reply, by steps
            logits = step.read([(opened, [token_id])])
        fresh = model(ids[:, :end], use_cache=True, logits_to_keep=1).logits[0].log_softmax(-1)
        divergences.append((fresh.exp() * (fresh - logits.log_softmax(-1))).sum().item())
        cache.crop(-5)
    assert len(divergences) == 10
    assert max(divergences) <= 0.002


@pytest.mark.parametrize("task", tasks())
def test_guesses_change_when_tokens_come_and_never_which(packed, task, monkeypatch):
    question, _ = tasks()[task]
    request = GenerationRequest(messages=[{"role": "user", "content": question}], max_new_tokens=128, temperature=0)
    step, read, said, n_steps = step_of(packed.model), LlamaStep.read, [], []

    def count(self, pieces, wanted=(0,)):
        n_steps[-1] += 1
        return read(self, pieces, wanted)

    monkeypatch.setattr(LlamaStep, "read", count)
    for sizes in (step.guess_sizes, (0,)):
        monkeypatch.setattr(LlamaStep, "guess_sizes", sizes)
        n_steps.append(0)
        engine = LocalEngine(lambda _: packed, max_cache_bytes=0)
        said.append(engine.submit(request).result(timeout=120).token_ids)
        engine.close()
    assert said[0] == said[1]
    assert len(said[0]) == 128
    assert n_steps[0] < n_steps[1] if task.startswith("repeats") else n_steps[0] <= n_steps[1]
