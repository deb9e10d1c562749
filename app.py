"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import socket
import sys

from streaming.errors import ModelUnavailable
from streaming.settings import Settings, load_settings


def main() -> int:
    """Serve a chat with a model until interrupted; give the exit code."""
    settings = load_settings()
    if reason := _port_taken(settings):
        print(reason, file=sys.stderr)
        return 2
    from streaming.engine.local import load_engine

    engine = load_engine(
        settings.models[0] if settings.models else None,
        wait=False,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        offline=settings.offline,
        cache_dir=settings.cache_dir,
    )
    try:
        from streaming.ui.build import build_app, launch_app  # while the model loads

        app = build_app(engine)
        url, share_url = launch_app(app, engine, settings)
        print(f"Brook is at {url}", flush=True)
        if share_url:
            print(f"Anyone can reach it at {share_url} for a week.", flush=True)
        elif settings.share:
            print("A share link cannot be had (Gradio's relay is out of reach); the page goes on at the address above.")
        engine.wait_ready()
        app.block_thread()
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        engine.close()
    return 0


def _port_taken(settings: Settings) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            return f"Cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another with --port."
    return None


if __name__ == "__main__":
    sys.exit(main())
