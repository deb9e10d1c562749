"""Draws follow the distribution that the settings describe, and only it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from streaming.engine.base import SamplingDefaults
from streaming.engine.sampling import LogprobRecorder, ReplyPenalties, SeededSampler, build_processors
from tests.tiny import byte_tokenizer

CPU = torch.device("cpu")
NO_IDS = torch.zeros(1, 1, dtype=torch.long)


def drawn(sampler: SeededSampler, scores: torch.Tensor) -> int:
    out = sampler(NO_IDS, scores)
    assert out.isfinite().sum() == 1
    return int(out.argmax())


def test_frequencies_follow_the_probabilities():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampler = SeededSampler(7, CPU)
    counts = torch.zeros(4)
    for _ in range(20_000):
        counts[drawn(sampler, scores)] += 1
    assert counts / counts.sum() == pytest.approx(scores.exp()[0], abs=0.015)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=40),
    st.floats(0.01, 0.999),
    st.sampled_from([2, 8, 512]),
)
def test_the_nucleus_is_that_of_transformers_also_where_it_goes_beyond_the_head(values, top_p, n_head):
    scores = torch.tensor([values])
    allowed = TopPLogitsWarper(top_p)(NO_IDS, scores.clone()).isfinite()[0]
    sampler = SeededSampler(1, CPU, top_p, n_head)
    probs = scores.softmax(-1)[0]
    weakest = probs[allowed].min()
    for _ in range(20):
        # Where tokens are equally likely at the nucleus' border, either may be the one that fills it.
        assert probs[drawn(sampler, scores)] >= weakest * (1 - 1e-4)


def test_a_nucleus_of_nothing_is_the_likeliest_token():
    scores = torch.tensor([[0.1, 2.0, 0.3]])
    sampler = SeededSampler(3, CPU, top_p=0.0)
    assert {drawn(sampler, scores) for _ in range(50)} == {1}


def test_what_other_settings_ruled_out_is_never_drawn():
    scores = torch.full((1, 1000), -torch.inf)
    scores[0, 17] = scores[0, 400] = 0.0
    sampler = SeededSampler(5, CPU)
    assert {drawn(sampler, scores) for _ in range(500)} == {17, 400}


def test_a_seed_gives_the_same_draws_and_two_generators_do_not_disturb_each_other():
    scores = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    alone = [drawn(sampler, scores) for sampler in [SeededSampler(9, CPU)] for _ in range(30)]
    mine, other = SeededSampler(9, CPU), SeededSampler(10, CPU)
    together = []
    for _ in range(30):
        together.append(drawn(mine, scores))
        drawn(other, scores)
    assert together == alone


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"repetition_penalty": 1.2}, ["RepetitionPenaltyLogitsProcessor"]),
        ({"temperature": 1.0}, ["SeededSampler"]),
        ({"temperature": 0.7, "top_k": 1}, []),
        (
            {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "top_p": 0.9},
            ["TemperatureLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper", "SeededSampler"],
        ),
    ],
)
def test_only_settings_that_change_something_cost_something(changes, names):
    processors = build_processors(SamplingDefaults(**changes), 1, CPU, None, n_prompt=0)
    assert [type(p).__name__ for p in processors] == names


def test_logprobs_are_taken_before_any_setting():
    recorder = LogprobRecorder(byte_tokenizer(), 2)
    processors = build_processors(SamplingDefaults(temperature=0.1, top_k=1), 1, CPU, recorder, n_prompt=0)
    scores = torch.randn(1, 259, generator=torch.Generator().manual_seed(0))
    processors(NO_IDS, scores.clone())
    expected = scores[0].log_softmax(-1)
    logprob, top = recorder.of(65)
    assert logprob == pytest.approx(expected[65].item())
    assert [t.logprob for t in top] == pytest.approx(expected.topk(2).values.tolist())


def test_penalties_count_the_reply_alone_as_openai_describes_them():
    ids = torch.tensor([[5, 5, 5, 1, 2, 1, 1]])  # the prompt is 5 5 5
    scores = torch.zeros(1, 6)
    out = ReplyPenalties(3, frequency=0.5, presence=1.0)(ids, scores)
    assert out.tolist() == [[0.0, -(3 * 0.5 + 1.0), -(1 * 0.5 + 1.0), 0.0, 0.0, 0.0]]
    assert scores.tolist() == [[0.0] * 6]
    assert ReplyPenalties(7, frequency=0.5, presence=1.0)(ids, scores).tolist() == [[0.0] * 6]


def test_penalties_are_there_only_when_asked_for_also_for_greedy():
    def kinds(**options):
        return [type(p) for p in build_processors(SamplingDefaults(**options), 1, CPU, None, n_prompt=0)]

    assert kinds() == []
    assert kinds(frequency_penalty=0.1) == kinds(presence_penalty=-0.1) == [ReplyPenalties]
