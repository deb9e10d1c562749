"""What the app serves beside the page, for programs: the API and the metrics."""

from starlette.routing import BaseRoute

from streaming.engine.base import Engine
from streaming.engine.menu import ModelMenu
from streaming.server.access import Access
from streaming.server.metrics import MeteredEngine, metrics_route
from streaming.server.openai_api import build_api_routes
from streaming.settings import Settings


def meter(menu: ModelMenu, settings: Settings) -> tuple[Engine, tuple[BaseRoute, ...]]:
    """Give the menu as an engine with its generations counted, and the routes that serve it to programs."""
    metered = MeteredEngine(menu)
    access = Access(settings.api_key, is_public=settings.is_public)
    return metered, (
        *build_api_routes(metered, access, lambda: {model.name: model for model in menu.models}),
        metrics_route(metered, access),
    )
