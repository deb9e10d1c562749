"""However tokens are guessed, the loop says the same, one token at a time, and leaves the same cache."""

import functools
import random

import pytest
import torch
from transformers import DynamicCache

from streaming import GenerationRequest
from streaming.engine import decode_loop as module
from streaming.engine.local import LocalEngine
from streaming.engine.lookup import PromptLookup
from tests.packed import WITH_STEP, pack_model, random_model
from tests.tiny import loaded
from tests.unit.test_decode_loop import PROMPT, Log, generate

N_TOKENS = 40


@functools.cache
def packed(name):
    return pack_model(random_model(WITH_STEP[name]))


@pytest.fixture
def model():
    return packed("llama")


class Oracle(PromptLookup):
    """Guesses from the text that will come, `right` tokens of it and then a wrong one."""

    text: tuple[int, ...] = ()
    source = random.Random(0)
    n_guessed = 0

    def guess(self):
        n_right, n_wrong = self.source.randint(0, 7), self.source.randint(0, 2)
        coming = list(self.text[len(self._ids) : len(self._ids) + n_right])
        guess = coming + [(self.text[0] + 1) % 250] * n_wrong
        type(self).n_guessed += len(guess)
        return guess


@pytest.fixture
def oracle(monkeypatch):
    """Have every sequence guessed by an oracle, who must be told the text."""

    class Told(Oracle):
        pass

    monkeypatch.setattr(module, "PromptLookup", Told)
    return Told


@pytest.mark.parametrize("name", WITH_STEP)
def test_scores_and_ids_are_the_same_bit_for_bit(name, oracle, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(module, "PromptLookup", lambda ids, _: PromptLookup(ids, (0,)))
        ids, scores = generate(packed(name))
    oracle.text = tuple(ids[0].tolist())
    log = Log()
    guessed_ids, guessed_scores = generate(packed(name), streamer=log)
    assert oracle.n_guessed > N_TOKENS / 2
    assert torch.equal(guessed_ids, ids)
    assert torch.equal(guessed_scores, scores)
    assert [put.shape for put in log.puts[1:]] == [(1,)] * N_TOKENS, "each token comes by itself"


def test_sampled_text_is_the_same_too(model, oracle):
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    for seed in range(3):
        torch.manual_seed(seed)
        ids = generate(model, lean=False, **options)[0]
        oracle.text = tuple(ids[0].tolist())
        torch.manual_seed(seed)
        assert torch.equal(generate(model, **options)[0], ids)


@pytest.mark.parametrize("fail_at", range(1, 20))
def test_whoever_stops_it_in_the_midst_of_a_guess_finds_a_cache_that_goes_on(model, fail_at, oracle):
    whole = generate(model, lean=False)[0]
    oracle.text = tuple(whole[0].tolist())
    cache, log = DynamicCache(config=model.config), Log(fail_at)
    with pytest.raises(InterruptedError):
        generate(model, streamer=log, past_key_values=cache)
    known = torch.cat([log.puts[0][0], *log.puts[1:]])
    assert len(log.puts) == fail_at, "not one token more"
    assert cache.get_seq_length() == len(known)
    again = generate(model, whole[:, : len(known) + 1], past_key_values=cache, max_new_tokens=10)[0]
    assert torch.equal(again, whole[:, : len(known) + 11])


def test_an_end_token_or_a_limit_within_a_guess_ends_there(model, oracle):
    whole = generate(model, lean=False)[0]
    oracle.text = tuple(whole[0].tolist())
    free = whole[0, PROMPT.shape[1] :].tolist()
    for end in set(free[3:20]):
        ids, _ = generate(model, eos_token_id=end)
        assert ids[0, PROMPT.shape[1] :].tolist() == free[: free.index(end) + 1]
    for limit in range(1, 15):
        cache = DynamicCache(config=model.config)
        ids, _ = generate(model, max_new_tokens=limit, past_key_values=cache)
        assert ids[0, PROMPT.shape[1] :].tolist() == free[:limit]
        assert cache.get_seq_length() == ids.shape[1] - 1


def test_the_engine_streams_the_same_events(model, oracle, monkeypatch):
    """Logprobs, stop strings and reuse with guesses as without."""

    def events(stop=()):
        engine = LocalEngine(lambda _: loaded(model, n_context=1024))
        request = GenerationRequest(
            prompt_ids=PROMPT[0].tolist(), max_new_tokens=N_TOKENS, temperature=0, logprobs=2, stop=stop
        )
        first = engine.submit(request)
        result = first.result(60)
        follow_up = engine.submit(
            GenerationRequest(prompt_ids=[*first.prompt_ids, *result.token_ids, 5, 6], max_new_tokens=8, temperature=0)
        ).result(60)
        engine.close()
        told = [(e.index, e.id, e.text, e.logprob, e.top) for e in list(first.events())[:-1]]
        return told, result.finish.reason, result.text, follow_up.token_ids

    with monkeypatch.context() as context:
        context.setattr(module, "PromptLookup", lambda ids, _: PromptLookup(ids, (0,)))
        plain = events()
        stopped = events(stop=(plain[2][12:14],))
    oracle.text = (*PROMPT[0].tolist(), *(token_id for _, token_id, *_ in plain[0]))
    assert events() == plain
    assert events(stop=(plain[2][12:14],)) == stopped
    assert stopped[1] == "stop"
    assert oracle.n_guessed > N_TOKENS / 2
