"""Prefixes are reused within an owner, exactly, and within their budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma2Config, Lfm2Config

from streaming.engine.prefix_cache import NOBODY, PrefixCache, can_be_cut
from streaming.models.kv_cache import BLOCK_TOKENS, GrowingLayer
from tests.tiny import tiny_llama

PLENTY = 10**9


def cache_of(ids) -> DynamicCache:
    """A cache whose one key a token is the id itself, so that what it holds can be read back."""
    cache = DynamicCache()
    states = torch.tensor(list(ids), dtype=torch.float32).view(1, 1, -1, 1)
    cache.update(states, states.clone(), 0)
    return cache


def held(cache) -> list[int] | None:
    return None if cache is None else cache.layers[0].keys.flatten().int().tolist()


def test_the_longest_common_beginning_is_given_and_the_last_token_is_read_anew():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", [1, 2, 3], cache_of([1, 2, 3]))
    prefixes.keep("me", [1, 2, 9, 9], cache_of([1, 2, 9, 9]))
    assert held(prefixes.take("me", [1, 2, 3, 4, 5])) == [1, 2, 3]
    assert held(prefixes.take("me", [1, 2, 9, 9])) == [1, 2, 9]
    assert prefixes.take("me", [7, 8]) is None


def test_what_is_continued_is_handed_over_and_what_is_branched_from_stays():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", [1, 2, 3, 4], cache_of([1, 2, 3, 4]))
    branch = prefixes.take("me", [1, 2, 8, 8])
    assert held(branch) == [1, 2]
    branch.update(torch.zeros(1, 1, 5, 1), torch.zeros(1, 1, 5, 1), 0)
    assert held(prefixes.take("me", [1, 2, 3, 4, 5])) == [1, 2, 3, 4]
    assert prefixes.take("me", [1, 2, 3, 4, 5]) is None


def test_nothing_crosses_between_people():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("ann", [1, 2, 3], cache_of([1, 2, 3]))
    assert prefixes.take("bob", [1, 2, 3, 4]) is None
    assert held(prefixes.take("ann", [1, 2, 3, 4])) == [1, 2, 3]


def test_what_is_nobodys_is_copied_for_everyone_and_what_they_go_on_with_is_their_own():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep(NOBODY, [1, 2], cache_of([1, 2]))
    first = prefixes.take("ann", [1, 2, 3, 4])
    first.update(torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 3.0), 0)
    prefixes.keep("ann", [1, 2, 3], first)
    assert held(prefixes.take("bob", [1, 2, 3, 4])) == [1, 2]
    assert held(prefixes.take("cat", [1, 9, 9])) == [1]
    assert held(prefixes.take("ann", [1, 2, 3, 4])) == [1, 2, 3]
    assert held(prefixes.take("ann", [1, 2, 3, 4])) == [1, 2]
    assert prefixes.take("bob", [9, 1, 2]) is None


def test_of_two_that_fit_alike_the_smaller_is_copied():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", [1, 2, *range(50)], cache_of([1, 2, *range(50)]))
    prefixes.keep(NOBODY, [1, 2], cache_of([1, 2]))
    taken = prefixes.take("me", [1, 2, 99, 99])
    assert taken.layers[0].keys.untyped_storage().nbytes() == 2 * 4


def test_only_ids_that_the_cache_holds_count():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", [1, 2, 3, 4], cache_of([1, 2, 3]))  # the last id was made but never read
    assert held(prefixes.take("me", [1, 2, 3, 4, 5])) == [1, 2, 3]


def test_the_least_recently_used_leaves_when_the_budget_is_full():
    n_entry = 3 * 4 * 2
    prefixes = PrefixCache(2 * n_entry)
    for owner in ("a", "b"):
        prefixes.keep(owner, [1, 2, 3], cache_of([1, 2, 3]))
    prefixes.keep("a", [1, 2, 3], prefixes.take("a", [1, 2, 3, 4]))
    prefixes.keep("c", [1, 2, 3], cache_of([1, 2, 3]))
    assert prefixes.n_bytes == 2 * n_entry
    assert [held(prefixes.take(owner, [1, 2, 3, 4])) for owner in "abc"] == [[1, 2, 3], None, [1, 2, 3]]
    prefixes.keep("big", range(99), cache_of(range(99)))
    assert prefixes.take("big", range(99)) is None


def test_a_budget_of_nothing_keeps_nothing():
    prefixes = PrefixCache(0)
    prefixes.keep("me", [1, 2], cache_of([1, 2]))
    assert prefixes.n_bytes == 0


def test_a_longer_prefix_replaces_its_beginning():
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", [1, 2], cache_of([1, 2]))
    prefixes.keep("me", [1, 2, 3, 4], cache_of([1, 2, 3, 4]))
    assert prefixes.n_bytes == 4 * 4 * 2


def sliding_config():
    return Gemma2Config(sliding_window=4)


def hybrid_config():
    return Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])


def test_caches_that_cannot_be_cut_are_recognised():
    sliding = DynamicCache(config=sliding_config())
    assert can_be_cut(DynamicCache(config=tiny_llama().config))
    assert not can_be_cut(sliding)
    prefixes = PrefixCache(PLENTY)
    for config in (sliding_config(), hybrid_config()):
        prefixes.keep("me", [1, 2, 3], DynamicCache(config=config))
    assert prefixes.n_bytes == 0


def test_a_branch_takes_the_memory_of_what_it_shares_alone():
    layer_bytes = 2 * BLOCK_TOKENS * 4  # a key and a value of one float32 for each position of a block
    long = DynamicCache(config=tiny_llama().config)
    long.layers = [GrowingLayer()]
    long.update(*torch.zeros(2, 1, 1, 5 * BLOCK_TOKENS, 1), 0)
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", range(5 * BLOCK_TOKENS), long)
    branch = prefixes.take("me", [0, 1, 2, 77, 78])
    assert held(branch) == [0] * 3
    prefixes.keep("me", [0, 1, 2], branch)
    assert prefixes.n_bytes == 6 * layer_bytes


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), max_size=8))
def test_what_is_given_is_always_a_beginning_of_what_was_asked(requests):
    prefixes = PrefixCache(PLENTY)
    known: list[list[int]] = []
    for ids in requests:
        cache = prefixes.take("me", ids)
        got = held(cache) or []
        assert got == ids[: len(got)]
        assert len(got) < len(ids)
        longest = max((sum(1 for _ in _same(k, ids)) for k in known), default=0)
        assert len(got) == min(longest, len(ids) - 1)
        prefixes.keep("me", ids, cache_of(ids))
        known.append(ids)


def _same(a, b):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


@pytest.mark.parametrize("prompt", ["short", "x" * 300])
def test_generating_from_a_kept_prefix_gives_the_same_ids(prompt):
    from tests.tiny import byte_tokenizer

    model = tiny_llama()
    ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
    options = {"do_sample": False, "max_new_tokens": 12, "prefill_chunk_size": 256}
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    prefixes = PrefixCache(PLENTY)
    prefixes.keep("me", first[0].tolist(), cache)
    longer = torch.cat([first, torch.tensor([[65, 66, 67]])], dim=1)
    reused = prefixes.take("me", longer[0].tolist())
    assert reused.get_seq_length() == first.shape[1] - 1
    mask = torch.ones_like(longer)
    with_reuse = model.generate(longer, attention_mask=mask, past_key_values=reused, **options)
    fresh = DynamicCache(config=model.config)
    assert torch.equal(with_reuse, model.generate(longer, attention_mask=mask, past_key_values=fresh, **options))
