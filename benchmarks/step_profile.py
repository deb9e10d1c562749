"""Where a decoding step of the default model goes: the same work, part by part."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from benchmarks.report import report
from streaming.models.kernels import multiply
from streaming.models.llama_step import step_of
from streaming.models.loading import load_model


def microseconds(run: Callable[[], Any], repeats: int = 9, calls: int = 20) -> float:
    """Return the best mean of `repeats` series, which noise can only lengthen."""
    run()
    series = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        series.append((time.perf_counter() - started) / calls)
    return min(series) * 1e6


@torch.no_grad()
def profile_step() -> None:
    """Print a table of a step's parts at 16 and at 1,000 positions, and write it to assets/bench/step_profile.json."""
    model = load_model().model
    step: Any = step_of(model)
    rows = []
    for n_read in (16, 1000):
        cache = DynamicCache(config=model.config)
        model(torch.arange(100, 100 + n_read)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        opened = step.open(cache)

        def read_one(opened: Any = opened, cache: Any = cache) -> None:
            step.read([(opened, [500])])
            cache.crop(-1)

        rows.append([f"whole step at {n_read:,} positions", microseconds(read_one)])
    layers, x = model.model.layers, torch.randn(1, model.config.hidden_size)
    wide = torch.randn(1, model.config.intermediate_size)
    kinds = {
        "q, k, v": (x, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        "attention output": (x, ["self_attn.o_proj"]),
        "gate, up": (x, ["mlp.gate_proj", "mlp.up_proj"]),
        "down": (wide, ["mlp.down_proj"]),
    }
    for name, (vector, modules) in kinds.items():
        weights = [layer.get_submodule(module).weight for layer in layers for module in modules]
        whole = microseconds(lambda weights=weights, vector=vector: [multiply(weight, vector) for weight in weights])
        rows.append([f"4-bit products, {len(weights)} calls: {name}", whole])
    rows.append(["8-bit product, 1 call: output head", microseconds(lambda: multiply(model.lm_head.weight, x))])
    token, ids = torch.tensor([5]), torch.ones(1, 100, dtype=torch.long)
    scores, end = torch.randn(1, 49152), torch.tensor([2])
    criteria = StoppingCriteriaList([MaxLengthCriteria(200), EosTokenCriteria(end)])
    rows += [
        ["embedding row", microseconds(lambda: model.model.embed_tokens(token))],
        ["greedy choice", microseconds(lambda: scores.numpy().argmax(axis=-1))],
        ["generate()'s stopping criteria", microseconds(lambda: criteria(ids, None))],
    ]
    report("step_profile", ["part", "µs"], rows)
