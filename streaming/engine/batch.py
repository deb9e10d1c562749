"""Several runs at once over one model: each step writes a token of every run, and reads on for who came last."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import Cache

from streaming.engine.run import Run

STEP_TOKENS = 64
"""The most prompt tokens in a step: what newcomers cost those who are writing is a pause of this much."""

End = Callable[[Run, BaseException | None], None]


class Batch(Protocol):
    """Serves several runs. Used by the worker alone, but for what a run's log does by itself."""

    reads_caches: bool
    """Whether a run that joins must have a cache, which it goes on with."""

    @property
    def n_runs(self) -> int:
        """How many runs are served."""

    def join(self, run: Run) -> None:
        """Begin to serve a run, or go on with it after what its cache holds."""

    def advance(self) -> None:
        """Make a step, or wait a little for one; whoever is done is ended."""

    def paused(self) -> AbstractContextManager[Any]:
        """Keep off the model for a while, with no run to serve."""

    def close(self) -> None:
        """Let go of the model."""


@runtime_checkable
class Step(Protocol):
    """Reads tokens of several sequences; LlamaStep is one."""

    def open(self, cache: Any) -> Any:
        """Make a cache ready to be read into."""

    def read(self, pieces: Sequence[tuple[Any, Sequence[int]]], wanted: Sequence[int]) -> torch.Tensor:
        """Append tokens to caches; return the logits `(len(wanted), vocab)` after the rows numbered `wanted`."""


class ForwardStep:
    """The step of models without a compiled one: the model's own forward, one sequence at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def open(self, cache: Cache) -> Cache:
        return cache

    @torch.no_grad()
    def read(self, pieces: Sequence[tuple[Cache, Sequence[int]]], wanted: Sequence[int]) -> torch.Tensor:
        ((cache, token_ids),) = pieces
        ids = torch.tensor([token_ids], device=self._model.device)
        logits: torch.Tensor = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1:].float() if wanted else logits[0, :0].float()


@dataclass(eq=False)
class _Seat:
    """A run's place: its open cache, all its ids, and how many of them are in the cache."""

    run: Run
    opened: Any
    ids: list[int]
    n_read: int

    @property
    def is_writing(self) -> bool:
        return self.n_read == len(self.ids) - 1 and bool(self.run.token_ids)


class StepBatch:
    """Serves runs with a model's compiled step, all in one; or with its forward, one after the other in each step.

    A run's tokens are chosen by its own processors from its own logits, and its cache is its own: runs share nothing
    but the step. `is_over` says whether a run has written its last token.
    """

    reads_caches = True

    def __init__(self, step: Step, is_over: Callable[[Run], bool], end: End, *, one_by_one: bool) -> None:
        self._step = step
        self._is_over = is_over
        self._end = end
        self._one_by_one = one_by_one
        self._seats: list[_Seat] = []

    @property
    def n_runs(self) -> int:
        return len(self._seats)

    def join(self, run: Run) -> None:
        if self._is_over(run):
            self._end(run, None)
            return
        assert run.cache is not None
        ids = [*run.generation.prompt_ids, *run.token_ids]
        self._seats.append(_Seat(run, self._step.open(run.cache), ids, run.cache.get_seq_length()))

    def advance(self) -> None:
        # An engine that failed has ended the runs of all seats.
        self._seats = [seat for seat in self._seats if seat.run.generation.finish is None]
        # Whoever gets nothing to read in this step is asked too: one that was cancelled leaves at once.
        pieces = [
            (seat, ids) for seat, ids in self._share_out() if self._try(seat, seat.run.before_forward, len(ids)) and ids
        ]
        for group in filter(None, [[piece] for piece in pieces] if self._one_by_one else [pieces]):
            self._read(group)

    def paused(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def close(self) -> None:
        pass

    def _share_out(self) -> list[tuple[_Seat, list[int]]]:
        """Give every writing run its token, and those that still read what `share_out` leaves each, maybe nothing."""
        reading = [seat for seat in self._seats if not seat.is_writing]
        parts = share_out([len(seat.ids) - seat.n_read for seat in reading], STEP_TOKENS)
        pieces = [(seat, seat.ids[-1:]) for seat in self._seats if seat.is_writing]
        for seat, n_tokens in zip(reading, parts, strict=True):
            pieces.append((seat, seat.ids[seat.n_read : seat.n_read + n_tokens]))
        return pieces

    def _read(self, pieces: list[tuple[_Seat, list[int]]]) -> None:
        wanted, row, choosing = [], 0, []
        for seat, ids in pieces:
            row += len(ids)
            if seat.n_read + len(ids) == len(seat.ids):
                wanted.append(row - 1)
                choosing.append(seat)
        try:
            logits = self._step.read([(seat.opened, ids) for seat, ids in pieces], wanted)
        except BaseException as error:
            for seat, _ in pieces:
                self._leave(seat, error)
            return
        for seat, ids in pieces:
            seat.n_read += len(ids)
        for number, seat in enumerate(choosing):
            self._try(seat, self._choose, seat, logits[number : number + 1])

    def _choose(self, seat: _Seat, logits: torch.Tensor) -> None:
        """Draw a run's next token from its logits `(1, vocab)`."""
        run = seat.run
        token_id = choose_token(run, seat.ids, logits)
        seat.ids.append(token_id)
        run.add([token_id])
        if self._is_over(run):
            self._leave(seat, None)

    def _try(self, seat: _Seat, act: Callable[..., None], *arguments: Any) -> bool:
        """Do something for one run, whose end it is if it raises; say whether it did not."""
        try:
            act(*arguments)
        except BaseException as error:
            self._leave(seat, error)
            return False
        return True

    def _leave(self, seat: _Seat, error: BaseException | None) -> None:
        self._seats.remove(seat)
        self._end(seat.run, error)


def share_out(rests: Sequence[int], room: int) -> list[int]:
    """Split a step's room for prompt tokens among those who read: in the order in which they came, what each has left.

    The shortest rest is read first, so that most people get their first token soonest. A quarter of the room is for
    whoever came first, so that a long prompt gets on however many short ones come.
    """
    parts = [min(rest, -(-room // 4)) for rest in rests[:1]] + [0] * len(rests[1:])
    n_left = room - sum(parts)
    for number in sorted(range(len(rests)), key=rests.__getitem__):
        more = min(rests[number] - parts[number], n_left)
        parts[number] += more
        n_left -= more
    return parts


def choose_token(run: Run, ids: Iterable[int], logits: torch.Tensor) -> int:
    """Draw the token after `ids` from logits `(1, vocab)`, as the run's settings and seed say."""
    scores: torch.Tensor = run.processors(torch.tensor([list(ids)], device=logits.device), logits)  # type: ignore[arg-type]
    if scores.is_cpu:
        return int(scores.numpy().argmax())  # torch.argmax takes 0.1 ms over 49,152 scores, NumPy 6 µs
    return int(scores.argmax())
