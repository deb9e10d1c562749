"""The captured step says what the model says, and leaves a cache that goes on. On a CPU it runs without a graph."""

import pytest
import torch
from transformers import DynamicCache

from streaming.models import graph_step
from streaming.models.graph_step import GraphStep, graph_step_of
from tests.packed import WITH_STEP, WITHOUT_STEP, random_model

IDS = torch.tensor([[257, 5, 80, 13, 200, 7, 91, 33, 120, 4, 66, 18, 9, 240, 71, 2]])
N_PROMPT = 3


def uncaptured(forward, rewind):
    forward()  # as capturing does to warm up
    rewind()
    return forward


def stepped(model, cache, token_ids):
    with GraphStep(model, uncaptured).continuing(cache) as read:
        return torch.cat([read(token_id).clone() for token_id in token_ids])


@torch.no_grad()
@pytest.mark.parametrize("name", [*WITH_STEP, "gpt-neox", "gemma"])
def test_the_step_computes_the_models_own_logits(name):
    model = random_model((WITH_STEP | WITHOUT_STEP)[name])
    cache = DynamicCache(config=model.config)
    model(IDS[:, :N_PROMPT], past_key_values=cache)
    logits = stepped(model, cache, IDS[0, N_PROMPT:].tolist())
    assert torch.allclose(logits, model(IDS).logits[0, N_PROMPT:], atol=1e-4)


@torch.no_grad()
def test_a_full_graph_is_replaced_by_a_larger_one(monkeypatch):
    monkeypatch.setattr(graph_step, "LEAST_CAPACITY", 4)
    model = random_model(WITH_STEP["llama"])
    cache = DynamicCache(config=model.config)
    model(IDS[:, :N_PROMPT], past_key_values=cache)
    logits = stepped(model, cache, IDS[0, N_PROMPT:].tolist())
    assert torch.allclose(logits, model(IDS).logits[0, N_PROMPT:], atol=1e-4)


@torch.no_grad()
def test_the_cache_is_whole_when_the_loop_is_broken_off():
    model = random_model(WITH_STEP["llama"])
    cache = DynamicCache(config=model.config)
    model(IDS[:, :N_PROMPT], past_key_values=cache)

    def break_off():
        with GraphStep(model, uncaptured).continuing(cache) as read:
            for token_id in IDS[0, N_PROMPT:-1].tolist():
                read(token_id)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        break_off()
    assert cache.get_seq_length() == IDS.shape[1] - 1
    last = model(IDS[:, -1:], past_key_values=cache).logits[0, -1]
    assert torch.allclose(last, model(IDS).logits[0, -1], atol=1e-4)


@torch.no_grad()
def test_one_step_serves_one_conversation_after_another():
    model = random_model(WITH_STEP["llama"])
    step = GraphStep(model, uncaptured)
    for ids in (IDS, IDS.flip(1), IDS[:, :6]):
        cache = DynamicCache(config=model.config)
        model(ids[:, :N_PROMPT], past_key_values=cache)
        with step.continuing(cache) as read:
            logits = torch.cat([read(token_id).clone() for token_id in ids[0, N_PROMPT:].tolist()])
        assert torch.allclose(logits, model(ids).logits[0, N_PROMPT:], atol=1e-4)
        assert cache.get_seq_length() == ids.shape[1]


def test_models_on_a_cpu_have_no_graph():
    assert graph_step_of(random_model(WITH_STEP["llama"])) is None


@torch.no_grad()
@pytest.mark.parametrize("n_that_fit", [0, 1], ids=["at first", "while it grows"])
def test_memory_that_runs_out_is_told_and_the_next_reply_is_right(monkeypatch, n_that_fit):
    monkeypatch.setattr(graph_step, "LEAST_CAPACITY", N_PROMPT + 2)
    model = random_model(WITH_STEP["llama"])
    step, make_cache, made = GraphStep(model, uncaptured), graph_step.StaticCache, []

    def make_while_there_is_room(*arguments, **options):
        made.append(1)
        if len(made) > n_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make_cache(*arguments, **options)

    def reply():
        cache = DynamicCache(config=model.config)
        model(IDS[:, :N_PROMPT], past_key_values=cache)
        with step.continuing(cache) as read:
            return torch.cat([read(token_id).clone() for token_id in IDS[0, N_PROMPT:].tolist()])

    monkeypatch.setattr(graph_step, "StaticCache", make_while_there_is_room)
    with pytest.raises(torch.OutOfMemoryError):
        reply()
    monkeypatch.setattr(graph_step, "StaticCache", make_cache)
    assert torch.allclose(reply(), model(IDS).logits[0, N_PROMPT:], atol=1e-4)
