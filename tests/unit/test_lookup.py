"""Guesses come from what came before, and only while they pay."""

import random

import pytest

from streaming.engine.lookup import PromptLookup

SIZES = (0, 3, 7)
STEP_S, WIDE_S = 0.004, 0.008


def measured(lookup: PromptLookup, n_guessed: int = 0, step_s: float = STEP_S, wide_s: float = WIDE_S) -> None:
    lookup.measured(n_guessed, wide_s if n_guessed else step_s)


def follow(lookup: PromptLookup, token_ids, **times) -> list[tuple[list[int], int]]:
    """Let a text be as it is, however it is guessed; return each guess with how many of it were right."""
    guesses, at = [], 0
    while at < len(token_ids):
        guess = lookup.guess()
        measured(lookup, len(guess), **times)
        n_right = next((i for i, (a, b) in enumerate(zip(guess, token_ids[at:], strict=False)) if a != b), len(guess))
        n_right = min(n_right, len(token_ids) - at - 1)
        for token_id in token_ids[at : at + n_right + 1]:
            lookup.append(token_id)
        guesses.append((guess, n_right))
        at += n_right + 1
    return guesses


def test_a_text_that_repeats_is_guessed_and_read_in_fewer_steps():
    text = list(range(100, 160))
    guesses = follow(PromptLookup([1, 2, *text, 3, 4], SIZES), text)
    assert len(guesses) < len(text) / 2
    given = [(guess, n_right) for guess, n_right in guesses if guess]
    assert all(len(guess) == n_right for guess, n_right in given[:-1])
    assert guesses[0][0] == [], "nothing is known of the times yet"


def test_a_text_that_does_not_repeat_is_never_guessed():
    source = random.Random(0)
    text = source.sample(range(10_000), 500)
    assert all(guess == [] for guess, _ in follow(PromptLookup(text[:100], SIZES), text[100:]))


def test_guesses_that_are_mostly_wrong_are_not_given():
    """The newest two tokens come again and again, and each time something else follows."""
    text = [token_id for n in range(200) for token_id in (7, 8, 1000 + n)]
    guesses = follow(PromptLookup((), SIZES), text)
    assert sum(len(guess) for guess, _ in guesses) == 0


def test_guessing_ends_where_the_text_stops_repeating():
    repeated, source = list(range(100, 160)), random.Random(0)
    rest = [token_id for n in range(100) for token_id in (100, 101, source.randrange(1000, 10_000))]
    lookup = PromptLookup(repeated, SIZES)
    assert any(guess for guess, _ in follow(lookup, repeated))
    late = follow(lookup, rest)
    assert sum(bool(guess) for guess, _ in late) <= 10
    assert not any(guess for guess, _ in late[30:])


@pytest.mark.parametrize(("wide_s", "expected"), [(STEP_S * 1.5, True), (STEP_S * 9, False)])
def test_what_a_guess_costs_decides(wide_s, expected):
    text = list(range(100, 200))
    guesses = follow(PromptLookup(text, SIZES), text, wide_s=wide_s)
    assert (sum(bool(guess) for guess, _ in guesses) > 5) == expected
    if not expected:
        assert sum(bool(guess) for guess, _ in guesses) <= 2, "each size is tried once"


def test_the_last_occurrence_counts():
    lookup = PromptLookup([1, 2, 3, 9, 1, 2, 4, 9], (0, 1))
    for token_id in (1, 2, 4, 9, 1, 2, 4, 9, 1, 2, 4, 9, 1, 2):
        lookup.append(token_id)
        measured(lookup)
    assert lookup.guess() == [4]


def test_without_sizes_nothing_is_guessed():
    text = list(range(50))
    assert all(guess == [] for guess, _ in follow(PromptLookup(text, (0,)), text))
