"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import sys

from streaming.engine.deferred import defer_engine
from streaming.errors import BrookError
from streaming.models.sources import find_model
from streaming.server.address import require_free
from streaming.settings import Settings, load_settings
from streaming.startup import collector_paused


def main() -> int:
    """Serve a chat with a model until interrupted; give the exit code."""
    settings = load_settings()
    try:  # what can be refused is refused before the seconds that the imports take
        require_free(settings.host, settings.port)
        find_model(settings.model, offline=settings.offline, cache_dir=settings.cache_dir).check()
    except BrookError as error:
        return _refuse(error)
    engine = defer_engine(settings)
    try:
        with collector_paused():
            from streaming.ui.build import build_app, launch_app

            app = build_app(engine)
            url, share_url = launch_app(app, engine, settings)
            engine.start()  # after the page: two heavy imports at once would slow each other down
            _announce(url, share_url, settings)
            engine.wait_ready()
        app.block_thread()
    except BrookError as error:
        return _refuse(error)
    finally:
        engine.close()
    return 0


def _announce(url: str, share_url: str | None, settings: Settings) -> None:
    print(f"Brook is at {url}", flush=True)
    if share_url:
        print(f"Anyone can reach it at {share_url} for a week.", flush=True)
    elif settings.share:
        print("A share link cannot be had (Gradio's relay is out of reach); the page goes on at the address above.")


def _refuse(error: BrookError) -> int:
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
