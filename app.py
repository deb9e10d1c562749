"""Brook's web entry point, also on Spaces: settings → engine → page → launch."""

import argparse

from streaming.engine.local import load_engine


def main() -> None:
    """Serve a chat with a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder with a model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    engine = load_engine(options.model, wait=False)
    from streaming.ui.build import build_app, launch_app  # while the model loads

    app = build_app(engine)
    try:
        launch_app(app, engine, server_name=options.host, server_port=options.port)
        app.block_thread()
    finally:
        engine.close()


if __name__ == "__main__":
    main()
