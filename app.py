"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import sys
from contextlib import ExitStack, closing

from streaming.conversations.store import Store
from streaming.engine.menu import load_menu
from streaming.errors import BrookError
from streaming.models.sources import check_sources
from streaming.server.address import require_free
from streaming.server.runs import Runs
from streaming.server.stopping import exit_on_sigterm
from streaming.settings import load_settings
from streaming.startup import collector_paused, without_type_stubs

NO_SHARE = "No share link can be had (Gradio's relay is out of reach); the page is there all the same."


def main() -> int:
    """Serve a chat with a model until interrupted; give the exit code."""
    settings = load_settings()
    try:  # what can be refused is refused before the seconds that the imports take
        require_free(settings.host, settings.port)
        check_sources(settings)
    except BrookError as error:
        return _refuse(error)
    exit_on_sigterm()
    try:
        # Closed from the last to the first: replies that are being written are kept before the engine lets them go.
        with ExitStack() as resources:
            menu = resources.enter_context(closing(load_menu(settings)))
            with collector_paused():
                with without_type_stubs():
                    from streaming.server.routes import meter
                    from streaming.ui.build import build_app, launch_app

                engine, routes = meter(menu, settings)
                store = resources.enter_context(closing(Store(settings.data_dir)))
                runs = resources.enter_context(closing(Runs(engine, store, settings.grace, menu)))
                app = build_app(engine, runs)
                url, share_url = launch_app(app, engine, settings, routes)
                menu.start()  # after the page: two heavy imports at once would slow each other down
                shared = f"Anyone can reach it at {share_url} for a week." if share_url else NO_SHARE * settings.share
                for words in filter(None, (f"Brook is at {url}", store.notice, shared)):
                    print(words, flush=True)
                menu.wait_ready()
            app.block_thread()
    except BrookError as error:
        return _refuse(error)
    return 0


def _refuse(error: BrookError) -> int:
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
