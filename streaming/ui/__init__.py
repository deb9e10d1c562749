"""The page: Gradio only here. `build_app(engine)` makes it, `launch_app` serves it."""
