"""Several models behind one engine: each loads when it is first asked for, and leaves when another needs its room."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from streaming.engine.base import Engine, EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.engine.deferred import MakeRoom, defer_engine, kind_of, name_of
from streaming.errors import EngineClosed, ModelNotFound, ModelTooLarge
from streaming.models.embedded import DEFAULT_MODEL
from streaming.settings import Settings

MakeEngine = Callable[[str | None, MakeRoom], Engine]


def load_menu(settings: Settings) -> "ModelMenu":
    """Make the menu that the settings ask for; nothing is loaded before `start()`."""

    def make(source: str | None, make_room: MakeRoom) -> Engine:
        engine = defer_engine(settings, source, make_room)
        engine.start()
        return engine

    return ModelMenu(
        make,
        settings.models or (None,),
        default_name=name_of(settings, None),
        kind=kind_of(settings),
        max_bytes=None if settings.model_memory is None else settings.model_memory * 10**6,
        is_open=not settings.is_shared,
    )


class ModelMenu:
    """The models that people can choose from. As an Engine it serves each request with the model that it names.

    `sources` are what `--model` names (None: the default model, shown as `default_name`), the first one is the model of
    requests that name none. `make` gives the engine of one, which begins to load; before the model's weights are
    touched it calls the function that `make` was given. That unloads others, the one used longest ago first: until all
    fit within `max_bytes`, or where that is None, until enough is free. A model that someone streams from stays. With
    `is_open`, models that are not listed can be chosen too. Every method may be called from any thread.
    """

    def __init__(
        self,
        make: MakeEngine,
        sources: Sequence[str | None],
        *,
        default_name: str = DEFAULT_MODEL.model_id,
        kind: str = "local",
        max_bytes: int | None = None,
        is_open: bool = False,
    ) -> None:
        self.kind = kind
        self.is_open = is_open
        self._make = make
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._closed = False
        models = [MenuModel(source or default_name, source, kind, self._make_engine) for source in sources]
        self._models = {model.name: model for model in models}
        self._listed = frozenset(self._models)

    @classmethod
    def of(cls, engine: Engine) -> "ModelMenu":
        """Make a menu of one engine, which whoever made it closes."""
        menu = cls(lambda source, make_room: engine, [engine.model_id], kind=engine.kind)
        menu.start()
        return menu

    @property
    def models(self) -> "list[MenuModel]":
        """The models that were listed, in order, then those that were chosen besides."""
        with self._lock:
            return list(self._models.values())

    @property
    def first(self) -> "MenuModel":
        """The model at the start."""
        return self.models[0]

    def find(self, name: str = "") -> "MenuModel":
        """Give a model by its name, or the first one; where the menu is open, by any name.

        Raises:
            ModelNotFound: it is not on the menu.
        """
        with self._lock:
            if not name:
                return next(iter(self._models.values()))
            if name not in self._models:
                if not self.is_open:
                    raise ModelNotFound(f"{name} is not one of the models that are offered here; choose one of those.")
                self._models[name] = MenuModel(name, name, self.kind, self._make_engine)
            return self._models[name]

    def drop(self, model: "MenuModel") -> None:
        """Take a model that was not listed, and turned out not to be had, off the menu."""
        with self._lock:
            if model.name not in self._listed and model.status().state == "failed":
                self._models.pop(model.name, None)

    def start(self) -> None:
        """Begin to load the first model."""
        self.first.load()

    # As an engine

    @property
    def model_id(self) -> str:
        return self.first.model_id

    @property
    def tokenizer(self) -> Any:
        return self.first.tokenizer

    @property
    def defaults(self) -> SamplingDefaults:
        return self.first.defaults

    def submit(self, request: GenerationRequest) -> Generation:
        return self.find(request.model).submit(request)

    def wait_ready(self, timeout: float | None = None) -> bool:
        return self.first.wait_ready(timeout)

    def status(self) -> EngineStatus:
        statuses = [model.status() for model in self.models]
        return dataclasses.replace(
            statuses[0],
            n_active=sum(status.n_active for status in statuses),
            n_queued=sum(status.n_queued for status in statuses),
            n_cache_bytes=sum(status.n_cache_bytes for status in statuses),
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            models = list(self._models.values())
        for model in models:
            model.close()

    # Loading

    def _make_engine(self, model: "MenuModel") -> Engine:
        if self._closed:
            raise EngineClosed("The engine was closed; load it again.")
        return self._make(model.source, lambda n_bytes, n_free: self._make_room(model, n_bytes, n_free))

    def _make_room(self, model: "MenuModel", n_bytes: int, n_free: int) -> None:
        """Unload what must leave for a model of `n_bytes`; nothing where it would not fit all the same."""
        if self._max_bytes is not None and n_bytes > self._max_bytes:
            raise ModelTooLarge(
                f"{model.name} needs {n_bytes / 1e9:,.2f} GB but --model-memory allows "
                f"{self._max_bytes / 1e9:,.2f} GB for all models; choose a smaller one."
            )
        while True:
            with self._lock:
                others = [other for other in self._models.values() if other is not model and other.takes_memory]
                n_missing = n_bytes - n_free
                if self._max_bytes is not None:
                    n_taken = sum(other.n_bytes for other in others)
                    n_missing = max(n_missing, n_bytes + n_taken - self._max_bytes)
                if n_missing <= 0:
                    model.n_bytes = n_bytes  # from here on the others reckon with it
                    return
                idle = sorted((other for other in others if not other.is_in_use), key=lambda other: other.used_at)
            n_missing -= sum(other.n_bytes for other in idle)
            if n_missing > 0:
                raise ModelTooLarge(
                    f"{model.name} needs {n_bytes / 1e9:,.2f} GB, {n_missing / 1e9:,.2f} GB more than there is "
                    f"beside the models in use; try again when nobody streams from them, or choose a smaller model."
                )
            n_free += idle[0].unload()  # 0 where someone came in the meantime: then it is no longer idle


class MenuModel:
    """One model of a menu: an Engine that loads when it is first needed, and again after it was unloaded.

    `name` is what it is chosen by, `source` what `--model` names, None for the default model. What a loaded model said
    of itself (`tokenizer`, `defaults`) stays known while it is unloaded.
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
        self._n_calls = 0
        self._runs: list[Generation] = []
        self._tokenizer: Any = None
        self._defaults: SamplingDefaults | None = None

    def load(self) -> None:
        """Begin to load the model where it is not, also where that failed before."""
        with self._lock:
            if self._engine is not None and self._engine.status().state == "failed":
                self._engine = None
            self._start()

    def unload(self, *, even_in_use: bool = False) -> int:
        """Free its memory, unless it is in use, or then too, and cancel what it writes; give the bytes freed."""
        with self._lock:
            if self._engine is None or (self._is_in_use() and not even_in_use):
                return 0
            engine, self._engine = self._engine, None
            n_bytes, self.n_bytes = self.n_bytes, 0
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
        return self.name if engine is None else engine.model_id

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
        return EngineStatus("unloaded", self.name) if engine is None else engine.status()

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
        finally:
            with self._lock:
                self._n_calls -= 1
                self.used_at = time.monotonic()

    def _start(self) -> Engine:
        """Give the engine, begun to load if it was not there; the lock is held."""
        if self._engine is None:
            self.n_bytes = 0  # until it is known
            self._engine = self._make(self)
        return self._engine

    def _is_in_use(self) -> bool:
        """Say whether it must stay; the lock is held."""
        is_loading = self._engine is not None and self._engine.status().state == "loading"
        return is_loading or self._n_calls > 0 or any(run.finish is None for run in self._runs)
