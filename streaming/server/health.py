"""`/healthz`: how the engine is, for people who host Brook and for what watches over it."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from streaming.engine.base import Engine


def health(engine: Engine) -> dict[str, Any]:
    """Give the engine's state as JSON has it; `active` and `queued` count requests."""
    status = engine.status()
    return {
        "status": status.state,
        "model": status.model_id,
        "engine": engine.kind,
        "device": status.device,
        "active": status.n_active,
        "queued": status.n_queued,
        "detail": status.detail,
    }


def health_route(engine: Engine) -> Route:
    """Serve `health()`: 200 while the engine can take requests, 503 when it is of no use."""

    async def endpoint(_request: Request) -> JSONResponse:
        body = health(engine)
        return JSONResponse(body, status_code=200 if body["status"] in ("unloaded", "loading", "ready") else 503)

    return Route("/healthz", endpoint)
