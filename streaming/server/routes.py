"""What the app serves beside the page, for programs: the API and the metrics."""

from starlette.routing import BaseRoute

from streaming.engine.base import Engine
from streaming.server.access import Access
from streaming.server.metrics import MeteredEngine, metrics_route
from streaming.server.openai_api import build_api_routes
from streaming.settings import Settings


def meter(engine: Engine, settings: Settings) -> tuple[Engine, tuple[BaseRoute, ...]]:
    """Give the engine with its generations counted, and the routes that serve it to programs."""
    metered = MeteredEngine(engine)
    access = Access(settings.api_key, is_public=settings.is_public)
    return metered, (*build_api_routes(metered, access), metrics_route(metered, access))
