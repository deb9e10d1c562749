"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import sys
from contextlib import closing

from streaming.conversations.store import Store
from streaming.engine.deferred import defer_engine
from streaming.errors import BrookError
from streaming.models.sources import find_model
from streaming.server.address import require_free
from streaming.server.runs import Runs
from streaming.server.stopping import exit_on_sigterm
from streaming.settings import load_settings


def main() -> int:
    """Serve a chat with a model until interrupted; give the exit code."""
    settings = load_settings()
    try:  # what can be refused is refused before the seconds that the imports take
        require_free(settings.host, settings.port)
        find_model(settings.model, offline=settings.offline, cache_dir=settings.cache_dir).check()
    except BrookError as error:
        return _refuse(error)
    engine = defer_engine(settings)
    exit_on_sigterm()
    try:
        from streaming.ui.build import build_app, launch_app

        # Closed from the last to the first: replies that are being written are kept before the engine lets go of them.
        with (
            closing(engine),
            closing(Store(settings.data_dir)) as store,
            closing(Runs(engine, store, settings.grace)) as runs,
        ):
            app = build_app(engine, runs)
            url, share_url = launch_app(app, engine, settings)
            engine.start()  # after the page: two heavy imports at once would slow each other down
            print(f"Brook is at {url}", flush=True)
            if store.notice:
                print(store.notice, flush=True)
            if share_url:
                print(f"Anyone can reach it at {share_url} for a week.", flush=True)
            elif settings.share:
                print("No share link can be had (Gradio's relay is out of reach); the page is at the address above.")
            engine.wait_ready()
            app.block_thread()
    except BrookError as error:
        return _refuse(error)
    return 0


def _refuse(error: BrookError) -> int:
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
