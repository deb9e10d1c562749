"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import socket
import sys

from streaming.errors import ModelUnavailable
from streaming.models.sources import find_model
from streaming.settings import load_settings


def main() -> int:
    """Serve a chat with a model until interrupted; give the exit code."""
    settings = load_settings()
    if _is_taken(settings.host, settings.port):
        return _refuse(f"{settings.host}:{settings.port} is taken or not this machine's; choose another with --port.")
    model = settings.models[0] if settings.models else None
    try:
        find_model(model, offline=settings.offline, cache_dir=settings.cache_dir).check()
    except ModelUnavailable as error:
        return _refuse(str(error))
    from streaming.engine.local import load_engine

    engine = load_engine(
        model,
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
        return _refuse(str(error))
    finally:
        engine.close()
    return 0


def _is_taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
