"""How a step's room for prompt tokens is shared among those who read."""

import itertools
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.engine.batch import STEP_TOKENS, StepBatch, share_out
from streaming.errors import GenerationCancelled

N_NEW = 3
RESTS = st.lists(st.integers(1, 300), max_size=20)


@given(RESTS, st.integers(1, 200))
def test_the_whole_room_is_used_and_nobody_gets_more_than_is_left_to_read(rests, room):
    parts = share_out(rests, room)
    assert len(parts) == len(rests)
    assert all(0 <= part <= rest for part, rest in zip(parts, rests, strict=True))
    assert sum(parts) == min(room, sum(rests))


@given(RESTS, st.integers(1, 200))
def test_whoever_came_first_has_a_quarter_and_of_the_others_the_shortest_are_done_first(rests, room):
    parts = share_out(rests, room)
    if rests:
        assert parts[0] >= min(rests[0], room // 4)
    others = [(rest, part) for rest, part in zip(rests, parts, strict=True)][1:]
    for (rest, part), (other_rest, other_part) in itertools.permutations(others, 2):
        if rest < other_rest and part < rest:
            assert other_part == 0


def test_equal_rests_are_read_in_the_order_in_which_they_came():
    assert share_out([40, 40, 40], 64) == [40, 24, 0]
    assert share_out([200, 40, 40], 64) == [16, 40, 8]
    assert share_out([], 64) == []


class CountingStep:
    """Notes what each step reads; its logits are all alike."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []

    def open(self, cache):
        return cache

    def read(self, pieces, wanted):
        self.sizes.append([len(ids) for _, ids in pieces])
        return torch.zeros(len(wanted), 4)


class Reader:
    """What StepBatch needs of a Run: a prompt, and a place for tokens."""

    def __init__(self, n_prompt: int) -> None:
        self.generation = SimpleNamespace(prompt_ids=[1] * n_prompt, finish=None)
        self.cache = SimpleNamespace(get_seq_length=lambda: 0)
        self.token_ids: list[int] = []
        self.cancelled = False
        self.ended_by: object = "not yet"
        self.processors = lambda ids, scores: scores

    def before_forward(self, n_tokens: int) -> None:
        if self.cancelled:
            raise GenerationCancelled

    def add(self, token_ids) -> None:
        self.token_ids += token_ids


def serve(step: CountingStep) -> StepBatch:
    def end(run, error):
        run.ended_by = error

    return StepBatch(step, lambda run: len(run.token_ids) >= N_NEW, end, one_by_one=False)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5)), min_size=1, max_size=16))
def test_everyone_gets_to_the_end_within_bounded_steps_whoever_else_comes(arrivals):
    """Each is a prompt's length, and how many steps pass before it comes."""
    step = CountingStep()
    batch = serve(step)
    waiting = [(Reader(n_prompt), n_steps) for n_prompt, n_steps in arrivals]
    readers: list[Reader] = []
    while waiting or batch.n_runs:
        while waiting and waiting[0][1] <= len(step.sizes):
            readers.append(waiting.pop(0)[0])
            batch.join(readers[-1])
        if not batch.n_runs:  # a pause in which nobody is there
            step.sizes.append([])
            continue
        n_writing = sum(bool(reader.token_ids) and len(reader.token_ids) < N_NEW for reader in readers)
        batch.advance()
        assert 0 < sum(step.sizes[-1]) <= STEP_TOKENS + n_writing
    assert all(reader.ended_by is None and len(reader.token_ids) == N_NEW for reader in readers)


def test_a_long_prompt_is_read_to_its_end_while_short_ones_keep_coming():
    step = CountingStep()
    batch = serve(step)
    long = Reader(10 * STEP_TOKENS)
    batch.join(long)
    for _ in range(40):  # a quarter of each step's room
        for _ in range(4):
            batch.join(Reader(STEP_TOKENS))
        batch.advance()
    assert long.token_ids


def test_whoever_is_cancelled_while_others_are_read_first_leaves_at_once():
    step = CountingStep()
    batch = serve(step)
    first, later = Reader(STEP_TOKENS), Reader(STEP_TOKENS)
    for reader in (first, later):
        batch.join(reader)
    batch.advance()
    assert step.sizes == [[STEP_TOKENS]]
    later.cancelled = True
    batch.advance()
    assert isinstance(later.ended_by, GenerationCancelled)
    assert first.ended_by == "not yet"


def test_a_batch_that_all_have_left_reads_nothing():
    step = CountingStep()
    batch = serve(step)
    only = Reader(4)
    batch.join(only)
    only.cancelled = True
    batch.advance()
    assert step.sizes == []
    assert batch.n_runs == 0
