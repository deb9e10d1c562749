"""Load a model and start the engine that serves it."""

from typing import Any

from streaming.engine.batched import BatchedEngine
from streaming.engine.local import READY_TIMEOUT_S, LocalEngine
from streaming.errors import ModelUnavailable
from streaming.models.loading import load_model


def load_engine(
    model: str | None = None,
    *,
    engine: str = "local",
    wait: bool = True,
    max_cache_bytes: int | None = None,
    max_active: int = 0,
    max_queued: int = 0,
    **options: Any,
) -> LocalEngine:
    """Load a model and serve requests with it; None is the default model.

    The engine "local" serves one request at a time, "batched" (and "auto") many at once: see BatchedEngine. With
    `wait=False` the model loads in the background while requests wait. `max_cache_bytes` bounds what is kept of
    earlier requests, `max_active` and `max_queued` how many there may be (see LocalEngine); `options` are
    `load_model`'s.

    Raises:
        ModelUnavailable: the model cannot be loaded (with `wait`; else `wait_ready()` and `submit()` raise it).
    """
    started = (LocalEngine if engine == "local" else BatchedEngine)(
        lambda progress: load_model(model, progress=progress, **options),
        model or "",
        max_cache_bytes=max_cache_bytes,
        max_active=max_active,
        max_queued=max_queued,
    )
    if wait:
        try:
            started.wait_ready(READY_TIMEOUT_S)
        except ModelUnavailable:
            started.close()
            raise
    return started
