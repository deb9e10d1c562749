"""Several models behind one engine: which there are, who may choose them, and which of them stay loaded."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from streaming.engine.base import Engine, EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.engine.deferred import MakeRoom, defer_engine, kind_of, name_of
from streaming.engine.menu_model import MenuModel
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
    def models(self) -> list[MenuModel]:
        """The models that were listed, in order, then those that were chosen besides."""
        with self._lock:
            return list(self._models.values())

    @property
    def first(self) -> MenuModel:
        """The model at the start."""
        return self.models[0]

    def find(self, name: str = "", *, may_add: bool = True) -> MenuModel:
        """Give a model by its name or its id, or the first one; where the menu is open, to who `may_add`, by any name.

        Raises:
            ModelNotFound: it is not on the menu.
        """
        with self._lock:
            models = list(self._models.values())
            if not name:
                return models[0]
            found = self._models.get(name) or next((model for model in models if model.model_id == name), None)
            if found is not None:
                return found
            if not (self.is_open and may_add):
                raise ModelNotFound(f"{name} is not one of the models that are offered here; choose one of those.")
            self._models[name] = MenuModel(name, name, self.kind, self._make_engine)
            return self._models[name]

    def drop(self, model: MenuModel) -> None:
        """Take a model that was not listed, and turned out not to be had, off the menu."""
        with self._lock:
            if model.name in self._listed or model.status().state != "failed":
                return
            self._models.pop(model.name, None)
        model.close()

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

    def _make_engine(self, model: MenuModel) -> Engine:
        if self._closed:
            raise EngineClosed("The engine was closed; load it again.")
        return self._make(model.source, lambda n_bytes, n_free: self._make_room(model, n_bytes, n_free))

    def _make_room(self, model: MenuModel, n_bytes: int, n_free: int) -> None:
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
