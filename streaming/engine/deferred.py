"""An engine that is made in the background, so that the page is there before torch is imported."""

import copy
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from streaming.engine.base import Engine, EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.errors import EngineClosed, ModelUnavailable, StreamTimeout
from streaming.models.embedded import DEFAULT_MODEL
from streaming.settings import Settings

logger = logging.getLogger(__name__)

MAKE_TIMEOUT_S = 300.0
"""How long a request waits for the engine's modules to be imported; the model's loading comes after that."""


MakeRoom = Callable[[int, int], None]
"""As in `streaming.models.loading`, which imports torch."""


def name_of(settings: Settings, model: str | None) -> str:
    """Give the name that a model of the settings has before it is loaded (None: the default one, or the server's)."""
    return model or settings.server or DEFAULT_MODEL.model_id


def kind_of(settings: Settings) -> str:
    """Give the kind of engine that the settings ask for."""
    return "batched" if settings.engine == "auto" else settings.engine


def defer_engine(settings: Settings, model: str | None, make_room: MakeRoom) -> "DeferredEngine":
    """Give the engine that the settings ask for, for a model of theirs (None: the default one), not yet started."""

    def make() -> Engine:
        if settings.base_url is not None:
            from streaming.engine.remote import RemoteEngine

            return RemoteEngine(
                settings.base_url,
                model,
                os.environ.get(settings.api_key_env or ""),
                max_active=settings.max_active,
                max_queued=settings.max_queued,
            )
        from streaming.engine.load import load_engine

        return load_engine(
            model,
            engine=settings.engine,
            wait=False,
            device=settings.device,
            dtype=settings.dtype,
            quantize=settings.quantize,
            offline=settings.offline,
            cache_dir=settings.cache_dir,
            trust_remote_code=settings.trust_remote_code,
            make_room=make_room,
            max_cache_bytes=None if settings.cache_memory is None else settings.cache_memory * 10**6,
            max_active=settings.max_active,
            max_queued=settings.max_queued,
        )

    return DeferredEngine(make, kind_of(settings), name_of(settings, model))


class DeferredEngine:
    """Stand for the engine that `make` gives, which is called in a thread once `start()` was; whoever asks waits.

    `make` returns an engine that may still be loading its model. Every method may be called from any thread.
    """

    def __init__(self, make: Callable[[], Engine], kind: str, model_id: str) -> None:
        self.kind = kind
        self._model_id = model_id
        self._make = make
        self._engine: Engine | None = None
        self._error: ModelUnavailable | None = None
        self._made = threading.Event()
        self._closing = False
        self._maker = threading.Thread(target=self._run, name="brook-engine-maker", daemon=True)

    def start(self) -> None:
        """Begin to make the engine."""
        self._maker.start()

    @property
    def model_id(self) -> str:
        return self._model_id if self._engine is None else self._engine.model_id

    @property
    def tokenizer(self) -> Any:
        return self._require().tokenizer

    @property
    def defaults(self) -> SamplingDefaults:
        return self._require().defaults

    def submit(self, request: GenerationRequest) -> Generation:
        return self._require().submit(request)

    def wait_ready(self, timeout: float | None = None) -> bool:
        if not self._made.wait(timeout):
            return False
        return self._require().wait_ready(timeout)

    def status(self) -> EngineStatus:
        if self._engine is not None:
            return self._engine.status()
        if self._error is not None:
            return EngineStatus("failed", self._model_id, detail=str(self._error))
        return EngineStatus("closed" if self._closing else "loading", self._model_id)

    def close(self) -> None:
        self._closing = True
        if self._maker.ident is not None:
            self._maker.join(MAKE_TIMEOUT_S)
        if self._engine is not None:
            self._engine.close()

    def _run(self) -> None:
        try:
            self._engine = self._make()
        except BaseException as error:  # a module that is imported may do anything, also leave
            if not isinstance(error, ModelUnavailable):
                logger.exception("The engine could not be made")
                error = ModelUnavailable(f"The engine could not be started ({type(error).__name__}: {error}).")
            self._error = error
        finally:
            self._made.set()

    def _require(self) -> Engine:
        if not self._made.wait(MAKE_TIMEOUT_S):
            raise StreamTimeout(f"The engine did not start within {MAKE_TIMEOUT_S:g} s.")
        if self._error is not None:
            raise copy.copy(self._error)  # one that is raised again and again keeps the frames of all who asked
        if self._engine is None:
            raise EngineClosed("The engine was closed; load it again.")
        return self._engine
