"""The engine for many people: whoever is alone is served by `generate()`, several are served at once."""

import functools
import logging
from typing import Any

from streaming.engine.batch import Batch, ForwardStep, Step, StepBatch
from streaming.engine.decode_loop import compiled_step
from streaming.engine.generate import is_over, prepare_processors
from streaming.engine.local import LocalEngine
from streaming.engine.run import GiveWay, Run
from streaming.models.loading import LoadedModel

logger = logging.getLogger(__name__)

N_SEATS = 16
"""How many runs are served at once by default; the others wait."""


class BatchedEngine(LocalEngine):
    """Serve up to `n_seats` requests at once, every step a token of each.

    A request that is alone is LocalEngine's, with all that makes one reply fast. When another comes, `generate()` is
    left between two tokens (or two chunks of a prompt) and both go on in a batch, from the caches that they have.
    Everything about a request is its own, as in LocalEngine: settings, seed, stop strings, logprobs, reused prefixes;
    cancelling frees its seat within one step.
    """

    kind = "batched"

    def __init__(self, *arguments: Any, n_seats: int = N_SEATS, **options: Any) -> None:
        self.n_seats = n_seats
        self._alone: Run | None = None
        self._config_adds = True  # whether the model's configuration adds processors to a run's own: until one shows
        self._batch: Batch | None = None
        super().__init__(*arguments, **options)

    def _get_ready(self, loaded: LoadedModel) -> None:
        self._batch = self._build_batch(loaded)

    def _build_batch(self, loaded: LoadedModel) -> Batch:
        over = functools.partial(is_over, loaded=loaded)
        step = compiled_step(loaded.model)
        if isinstance(step, Step):
            return StepBatch(step, over, self._end, one_by_one=False)
        from streaming.engine.managed import try_manager  # a part of transformers that most starts do not need

        batch = try_manager(loaded.model, loaded.n_context, self.n_seats, over, self._end)
        if batch is not None:
            return batch
        self._detail = "This model cannot be batched: requests take turns, a token each."
        logger.warning(self._detail)
        return StepBatch(ForwardStep(loaded.model), over, self._end, one_by_one=True)

    def _let_go(self) -> None:
        super()._let_go()
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def _show_places(self) -> None:
        super()._show_places()
        if self._alone is not None:
            self._alone.must_give_way = self._queue.can_take

    def _serve(self, run: Run, loaded: LoadedModel) -> None:
        assert self._batch is not None
        with self._changed:
            self._alone = run
            self._show_places()
        try:
            with self._batch.paused():
                super()._serve(run, loaded)
        except GiveWay:
            self._leave_alone()
            self._serve_together(run, self._batch, loaded)
        finally:
            self._leave_alone()

    def _leave_alone(self) -> None:
        with self._changed:
            run, self._alone = self._alone, None
            if run is not None:
                run.must_give_way = False

    def _serve_together(self, first: Run, batch: Batch, loaded: LoadedModel) -> None:
        self._join(first, batch, loaded)
        while batch.n_runs:
            while (newcomer := self._next_seated()) is not None:
                self._join(newcomer, batch, loaded)
            batch.advance()

    def _join(self, run: Run, batch: Batch, loaded: LoadedModel) -> None:
        try:
            if run.cache is None and batch.reads_caches:
                self._reading.open_cache(run, loaded)
            if self._config_adds:
                own, run.processors = run.processors, prepare_processors(run, loaded)
                self._config_adds = len(run.processors) > len(own)
            batch.join(run)
        except BaseException as error:
            self._end(run, error)

    def _next_seated(self) -> Run | None:
        with self._changed:
            return self._take()
