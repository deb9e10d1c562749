"""What the app serves beside the page, for programs: the API and the metrics."""

from collections.abc import Mapping

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
        *build_api_routes(metered, access, lambda: _names_of(menu)),
        metrics_route(metered, access),
    )


def _names_of(menu: ModelMenu) -> Mapping[str, Engine]:
    """Give the models by what they may be called: by what each is, and by what it was before that was known."""
    return {name: model for model in menu.models for name in (model.model_id, model.name)}
