"""The engine on this machine: one worker thread owns the model and calls `generate()`, one request after another."""

import copy
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from streaming.engine.base import EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.engine.failures import as_unavailable, explain
from streaming.engine.generate import generate, has_stopped, require_servable
from streaming.engine.queue import FairQueue
from streaming.engine.reading import Reading
from streaming.engine.run import GiveWay, Run, StopStringMet, build_run
from streaming.errors import EngineClosed, GenerationCancelled, ModelUnavailable, StreamTimeout
from streaming.events import FinishReason
from streaming.models.loading import LoadedModel, LoadProgress
from streaming.startup import give_back_memory

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 3600.0
"""How long a request waits for the model to load: the first start may fetch gigabytes."""
JOIN_TIMEOUT_S = 60.0
"""How long `close()` waits for the worker, which lets go of the model between two chunks or tokens."""

Load = Callable[[Callable[[LoadProgress], None]], LoadedModel]


class LocalEngine:
    """Serve requests with a model in this process, one at a time; people take turns.

    `load` is called once, in the worker thread, with a callback for its progress; requests wait for it. Thread rules:
    every public method may be called from any thread; only the worker touches the model. What was read is kept within
    `max_cache_bytes` (as in Reading; 0: nothing). `max_active` and `max_queued` are FairQueue's limits.
    """

    kind = "local"
    n_seats = 1  # how many runs are served at a time

    def __init__(
        self,
        load: Load,
        model_id: str = "",
        *,
        max_cache_bytes: int | None = None,
        max_active: int = 0,
        max_queued: int = 0,
    ) -> None:
        self._load = load
        self._model_id = model_id
        self._loaded: LoadedModel | None = None
        self._load_error: ModelUnavailable | None = None
        self._load_progress: LoadProgress | None = None
        self._ready = threading.Event()
        self._encoding = threading.Lock()  # encoding changes a tokenizer's settings: one at a time
        self._reading = Reading(max_cache_bytes, self._encoding)
        self._changed = threading.Condition()
        self._queue: FairQueue[Run] = FairQueue(max_active, max_queued, n_seats=self.n_seats)
        self._active: Run | None = None  # for which the model is called
        self._closing = False
        self._detail = ""  # what is worth knowing of how requests are served
        self._worker = threading.Thread(target=self._work, name="brook-engine", daemon=True)
        self._worker.start()

    # What people call

    @property
    def model_id(self) -> str:
        return self._model_id if self._loaded is None else self._loaded.model_id

    @property
    def tokenizer(self) -> Any:
        return self._require_loaded().tokenizer

    @property
    def defaults(self) -> SamplingDefaults:
        config = self._require_loaded().model.generation_config
        own = SamplingDefaults()
        sampled = bool(config.do_sample)
        return SamplingDefaults(
            temperature=_default(config.temperature, 1.0) if sampled else 0.0,
            top_p=_default(config.top_p, own.top_p),
            top_k=_default(config.top_k, own.top_k) if sampled else own.top_k,
            min_p=_default(config.min_p, own.min_p),
            repetition_penalty=_default(config.repetition_penalty, own.repetition_penalty),
        )

    def submit(self, request: GenerationRequest) -> Generation:
        loaded = self._require_loaded()
        with self._changed:
            self._queue.require_room(request.owner, request.person)  # before the work of encoding
        with self._encoding:
            run = build_run(request, self.defaults, loaded, self._cancel)
        with self._changed:
            self._refuse_if_closing()
            self._queue.add(run, request.owner, request.person)
            self._show_places()
            self._changed.notify_all()
        return run.generation

    def wait_ready(self, timeout: float | None = None) -> bool:
        ready = self._ready.wait(timeout)
        if self._load_error is not None:
            # A copy: each time that an exception is raised it grows by a traceback, which keeps whatever was at work.
            raise copy.copy(self._load_error)
        return ready

    def status(self) -> EngineStatus:
        loaded, progress = self._loaded, self._load_progress
        with self._changed:
            n_active, n_queued = len(self._queue.served), self._queue.n_waiting
            closing = self._closing
        if closing:
            return EngineStatus("closed", self.model_id)
        if self._load_error is not None:
            return EngineStatus("failed", self.model_id, detail=str(self._load_error))
        if loaded is None:
            if progress is None:
                return EngineStatus("loading", self.model_id)
            return EngineStatus("loading", self.model_id, detail=str(progress), part=progress.part)
        return EngineStatus(
            "ready",
            self.model_id,
            str(loaded.model.device),
            n_active,
            n_queued,
            self._detail,
            n_cache_bytes=self._reading.n_bytes,
        )

    def close(self) -> None:
        with self._changed:
            self._closing = True
            for run in self._queue.served:
                run.cancel()
            queued = self._queue.clear()
            self._changed.notify_all()
        for run in queued:
            run.finish("cancelled")
        self._worker.join(JOIN_TIMEOUT_S)
        if self._worker.is_alive():
            logger.warning("The model did not let go within %g s; its thread ends with the process.", JOIN_TIMEOUT_S)

    # The queue

    def _cancel(self, generation: Generation) -> None:
        with self._changed:
            runs = [*self._queue, *self._queue.served]
            run = next((run for run in runs if run.generation is generation), None)
            if run is None:
                return
            run.cancel()
            if not self._queue.remove(run):
                return
            self._show_places()
        run.queued_s = time.perf_counter() - run.submitted_at
        run.finish("cancelled")

    def _show_places(self) -> None:
        """Tell the waiting runs how many must end before each begins; the lock is held."""
        n_before = len(self._queue.served) + 1 - self.n_seats
        for place, run in enumerate(self._queue):
            run.show(dataclasses.replace(run.generation.progress, n_ahead=max(0, n_before + place)))

    def _require_loaded(self) -> LoadedModel:
        ready = self.wait_ready(READY_TIMEOUT_S)
        self._refuse_if_closing()
        if not ready or self._loaded is None:
            raise StreamTimeout(f"The model did not load within {READY_TIMEOUT_S:g} s.")
        return self._loaded

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise EngineClosed("The engine was closed; load it again.")

    # The worker

    def _work(self) -> None:
        try:
            loaded = self._load(self._on_load_progress)
            require_servable(loaded)
            self._loaded = loaded
            loaded.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self._get_ready(loaded)
            give_back_memory()
        except BaseException as error:  # code that comes with a model may raise anything
            if not isinstance(error, ModelUnavailable):
                logger.exception("The model could not be loaded")
            self._load_error = as_unavailable(error)
            return
        finally:
            self._ready.set()
        while (run := self._next_run()) is not None:
            try:
                self._serve(run, loaded)
            except BaseException as error:  # a mistake of Brook's own: those who wait are served all the same
                for served in self._queue.served:
                    self._end(served, error)
            self._reading.go_ahead(loaded, self._is_idle)
        self._let_go()
        self._loaded = None

    def _is_idle(self) -> bool:
        with self._changed:
            return not (self._queue.n_waiting or self._closing)

    def _get_ready(self, loaded: LoadedModel) -> None:
        """Do in the worker what must be done before the first request."""

    def _let_go(self) -> None:
        """Do in the worker what must be done after the last request: who keeps a generation keeps this engine."""
        self._reading.clear()

    def _on_load_progress(self, progress: LoadProgress) -> None:
        self._load_progress = progress

    def _next_run(self) -> Run | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue.n_waiting or self._closing)
            return self._take()

    def _take(self) -> Run | None:
        """Begin to serve the next run; the lock is held."""
        run = None if self._closing else self._queue.take()
        if run is not None:
            run.queued_s = time.perf_counter() - run.submitted_at
            self._show_places()
        return run

    def _serve(self, run: Run, loaded: LoadedModel) -> None:
        try:
            cache = self._reading.open_cache(run, loaded)
            self._active = run
            generate(run, cache, loaded)
        except GiveWay:
            raise
        except BaseException as error:
            self._end(run, error)
        else:
            self._end(run)
        finally:
            self._active = None

    def _end(self, run: Run, error: BaseException | None = None) -> None:
        """Keep what was read, free the run's seat, then tell its readers how it ended: by itself, or by `error`."""
        reason: FinishReason = "error"
        message: str | None = "The model stopped without saying why; try again."
        try:
            if error is None:
                assert self._loaded is not None
                reason, message = ("stop" if has_stopped(run, self._loaded) else "length"), None
            elif isinstance(error, StopStringMet):
                reason, message = "stop", None
            elif isinstance(error, GenerationCancelled):
                reason, message = "cancelled", None
            else:
                logger.error("Generation failed after %d tokens", run.row.n_tokens, exc_info=error)
                message = explain(error)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if reason != "error" and run.cache is not None:
                assert self._loaded is not None
                self._reading.keep(run, run.cache, self._loaded)
        except Exception:
            logger.exception("What was read for a request could not be kept")
        finally:
            run.cache = None
            with self._changed:
                self._queue.release(run)
                self._show_places()
            run.finish(reason, message)

    def _before_forward(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active is not None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            self._active.before_forward(0 if ids is None else ids.shape[-1])


def _default(value: Any, fallback: Any) -> Any:
    return fallback if value is None else value
