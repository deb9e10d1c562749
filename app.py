"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import sys

from streaming.engine.menu import load_menu
from streaming.errors import BrookError
from streaming.models.sources import find_model
from streaming.server.access import Access
from streaming.server.address import require_free
from streaming.settings import load_settings


def main() -> int:
    """Serve a chat with a model until interrupted; give the exit code."""
    settings = load_settings()
    try:  # what can be refused is refused before the seconds that the imports take
        require_free(settings.host, settings.port)
        for model in settings.models or (None,):
            find_model(model, offline=settings.offline, cache_dir=settings.cache_dir).check()
    except BrookError as error:
        return _refuse(error)
    engine = load_menu(settings)
    try:
        from streaming.server.metrics import MeteredEngine, metrics_route
        from streaming.server.openai_api import build_api_routes
        from streaming.ui.build import build_app, launch_app

        metered = MeteredEngine(engine)
        app = build_app(metered)
        access = Access(settings.api_key, is_public=settings.is_public)
        routes = (*build_api_routes(metered, access), metrics_route(metered, access))
        url, share_url = launch_app(app, metered, settings, routes)
        engine.start()  # after the page: two heavy imports at once would slow each other down
        print(f"Brook is at {url}", flush=True)
        if share_url:
            print(f"Anyone can reach it at {share_url} for a week.", flush=True)
        elif settings.share:
            print("A share link cannot be had (Gradio's relay is out of reach); the page goes on at the address above.")
        engine.wait_ready()
        app.block_thread()
    except BrookError as error:
        return _refuse(error)
    finally:
        engine.close()
    return 0


def _refuse(error: BrookError) -> int:
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
