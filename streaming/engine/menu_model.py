"""One model of a menu: it loads when it is first asked for something, and leaves when another needs its room."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from streaming.engine.base import Engine, EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.errors import ModelUnavailable

RETRY_S = 5.0
"""How long requests are told why a model could not be loaded before one tries again: a try may take minutes."""


class MenuModel:
    """One model of a menu: an Engine that loads when it is first needed, and again after it was unloaded.

    `name` is what it is chosen by, `source` what `--model` names, None for the default model or a server's only one.
    What a loaded model said of itself (`model_id`, `tokenizer`, `defaults`) stays known while it is unloaded.
    """

    def __init__(self, name: str, source: str | None, kind: str, make: Callable[["MenuModel"], Engine]) -> None:
        self.name = name
        self.source = source
        self.kind = kind
        self.n_bytes = 0
        self.used_at = 0.0
        self._make = make
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._failed_at = math.inf  # when whoever asked was first told that the engine has failed
        self._n_calls = 0
        self._runs: list[Generation] = []
        self._model_id = name
        self._tokenizer: Any = None
        self._defaults: SamplingDefaults | None = None

    def load(self) -> None:
        """Begin to load the model where it is not, also where that failed just before."""
        with self._lock:
            self._start(at_once=True)

    def unload(self, *, even_in_use: bool = False) -> int:
        """Free its memory, unless it is in use, or then too, and cancel what it writes; give the bytes freed."""
        with self._lock:
            if self._engine is None or (self._is_in_use() and not even_in_use):
                return 0
            engine, self._engine = self._engine, None
            n_bytes, self.n_bytes = self.n_bytes, 0
            self._runs = []  # each holds the engine that wrote it, and what that has kept
        engine.close()
        return n_bytes

    @property
    def is_loaded(self) -> bool:
        """Whether it is there, or is about to be."""
        return self.status().state in ("loading", "ready")

    @property
    def takes_memory(self) -> bool:
        """Whether room was made for it; what loads may not say so yet."""
        return self.n_bytes > 0 and self.status().state != "failed"

    @property
    def is_in_use(self) -> bool:
        """Whether someone streams from it or waits for it."""
        with self._lock:
            return self._is_in_use()

    # As an engine

    @property
    def model_id(self) -> str:
        engine = self._engine
        if engine is not None and engine.status().state == "ready":
            self._model_id = engine.model_id
        return self._model_id

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            with self._using() as engine:
                self._tokenizer = engine.tokenizer
        return self._tokenizer

    @property
    def defaults(self) -> SamplingDefaults:
        if self._defaults is None:
            with self._using() as engine:
                self._defaults = engine.defaults
        return self._defaults

    def submit(self, request: GenerationRequest) -> Generation:
        with self._using() as engine:
            run = engine.submit(request)
            with self._lock:
                self._runs = [*(r for r in self._runs if r.finish is None), run]
        return run

    def wait_ready(self, timeout: float | None = None) -> bool:
        with self._using() as engine:
            return engine.wait_ready(timeout)

    def status(self) -> EngineStatus:
        engine = self._engine
        return EngineStatus("unloaded", self.model_id) if engine is None else engine.status()

    def close(self) -> None:
        self.unload(even_in_use=True)

    @contextmanager
    def _using(self) -> Iterator[Engine]:
        with self._lock:
            self._n_calls += 1
            self.used_at = time.monotonic()
            try:
                engine = self._start()
            except BaseException:
                self._n_calls -= 1
                raise
        try:
            yield engine
        except ModelUnavailable:
            with self._lock:
                if engine is self._engine:
                    self._failed_at = min(self._failed_at, time.monotonic())
            raise
        finally:
            with self._lock:
                self._n_calls -= 1
                self.used_at = time.monotonic()

    def _start(self, *, at_once: bool = False) -> Engine:
        """Give the engine, begun to load if it is not there, or failed a while ago; the lock is held."""
        before = self._engine
        is_due = at_once or time.monotonic() - self._failed_at >= RETRY_S
        if before is not None and not (is_due and before.status().state == "failed"):
            return before
        self.n_bytes = 0  # until it is known
        self._failed_at = math.inf
        self._engine = engine = self._make(self)
        if before is not None and before is not engine:
            before.close()
        return engine

    def _is_in_use(self) -> bool:
        """Say whether it must stay; the lock is held."""
        is_loading = self._engine is not None and self._engine.status().state == "loading"
        return is_loading or self._n_calls > 0 or any(run.finish is None for run in self._runs)
