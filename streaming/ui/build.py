"""The page, put together: what is where, which handler answers what, and how it is served."""

import asyncio
import contextlib
import hashlib
import io
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from streaming.engine.base import Engine
from streaming.errors import AddressUnavailable
from streaming.server.address import require_free
from streaming.server.health import health_route
from streaming.server.runs import Runs
from streaming.settings import Settings
from streaming.ui.chat import ChatHandlers, ChatSession
from streaming.ui.complete import build_complete
from streaming.ui.endpoints import add_endpoints
from streaming.ui.files import FileHandlers
from streaming.ui.security import SecurityHeaders
from streaming.ui.session import SAY_WHO
from streaming.ui.settings_panel import SettingsPanel, build_settings_panel, validate
from streaming.ui.theme import build_theme

ASSETS = Path(__file__).parents[2] / "assets"
ASSETS_URL = "brook"
SCRIPTS = (
    "vendor/markdown-it.min.js",
    "vendor/texmath.js",
    "vendor/highlight.min.js",
    "page.js",
    "models.js",
    "sidebar.js",
    "files.js",
    "markdown.js",
    "branches.js",
    "transcript.js",
)
SHEETS = (
    "brook.css",
    "sidebar.css",
    "models.css",
    "files.css",
    "panels.css",
    "transcript.css",
    "branches.css",
    "markdown.css",
)
EXAMPLES = (
    "Explain to a child why the sky is blue.",
    "Write a Python function that finds prime numbers.",
    "Give me three ideas for a rainy Sunday.",
    "What is the difference between a comet and an asteroid?",
)
# Nothing waits for anyone else: what is at once skips Gradio's queue, and what is queued (validators and streams need
# it) has no limit there, for the engine has a queue of its own. None of it is an endpoint.
AT_ONCE: Any = {"queue": False, "show_progress": "hidden", "trigger_mode": "multiple", "api_visibility": "private"}
QUEUED: Any = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


STAY_S = 15.0

# Else Gradio (6.31, Queue.compute_analytics_summary) sums up its last 10,000 events after every single one, for a
# dashboard that this page has not: 5 to 14 ms in which no other thread of Python runs.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")


@dataclass(frozen=True, slots=True)
class _ChatPart:
    """The chat's components that handlers change."""

    composer: gr.Textbox
    send: gr.Button
    stop: gr.Button
    past: gr.HTML
    live: gr.HTML


def build_app(engine: Engine, runs: Runs | None = None, examples: tuple[str, ...] = EXAMPLES) -> Any:
    """Build the page, a `gr.Blocks`, for an engine, which may still be loading; serve it with `launch_app`.

    `runs` write with that engine; None keeps conversations in memory.
    """
    runs = Runs(engine) if runs is None else runs
    handlers = ChatHandlers(runs)
    with gr.Blocks(title="Brook", analytics_enabled=False, fill_width=True, fill_height=True) as app:
        session = gr.State(ChatSession())
        tab = gr.JSON({}, visible=False)
        with gr.Row(elem_id="brook", equal_height=True):
            with gr.Column(elem_id="sidebar", min_width=0, scale=0):
                gr.HTML('<div class="brand">Brook</div>', padding=False)
                new_chat = gr.Button("New chat", elem_id="new-chat")
                conversations = _widget(
                    "mountConversations",
                    ("select", "search", "rename", "pin", "delete", "restore"),
                    {"items": []},
                    elem_id="conversations",
                )
                files = _widget("mountFiles", ("export", "import"), {}, elem_id="files")
                clear = gr.Button("Clear this chat", elem_id="clear", size="sm")
            with gr.Column(elem_id="main", min_width=0):
                about = _widget("mountAbout", ("look", "choose"), {"model": engine.model_id}, elem_id="header")
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Chat", elem_id="chat-tab"):
                        chat = _build_chat(examples)
                    with gr.Tab("Complete", elem_id="complete-tab"):
                        complete = build_complete(runs)
            with gr.Column(elem_id="settings", min_width=0, scale=0):
                gr.HTML('<h2 class="panel-title">Settings</h2>', padding=False)
                panel = build_settings_panel()
        _wire(handlers, [session, tab], chat, panel, conversations, new_chat, clear)
        complete.wire(panel, [session, tab], handlers.models)
        add_endpoints(runs)

        _wire_files(FileHandlers(runs, handlers.conversations), [session, tab], chat, conversations, files)
        for listen, handler in ((about.look, handlers.models.greet), (about.choose, handlers.models.choose)):
            told = listen(handler, [session, tab], about, js=SAY_WHO, **QUEUED)
            told.then(handlers.models.offer, [session, *panel.inputs], panel.inputs, **AT_ONCE)
        app.load(_stay, None, None, **QUEUED)
    app.queue(default_concurrency_limit=None, api_open=False)
    return app


async def _stay() -> AsyncIterator[None]:
    """Keep a tab's stream of events open as long as the tab is.

    Gradio (6.31) ends it when nothing is queued any more, and a page that queues something in that moment believes
    it still open and waits for ever.
    """
    while True:
        yield
        await asyncio.sleep(STAY_S)


def launch_app(
    app: Any, engine: Engine, settings: Settings, routes: tuple[BaseRoute, ...] = ()
) -> tuple[str, str | None]:
    """Serve the page with its looks, `/healthz` and `routes`, without blocking; give its address and its share link.

    The link is None where none was asked for, or none could be had.

    Raises:
        AddressUnavailable: nothing can listen there.
    """
    own_routes = [health_route(engine), Mount(f"/{ASSETS_URL}", StaticFiles(directory=ASSETS)), *routes]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Gradio tells of addresses and missing links at length
            _, url, share_url = app.launch(
                prevent_thread_lock=True,
                server_name=settings.host,
                server_port=settings.port or None,
                share=settings.share,
                auth=list(settings.auth) or None,
                theme=build_theme(),
                head="".join(f'<link rel="stylesheet" href="{_url(name)}">' for name in SHEETS),
                app_kwargs={"routes": own_routes, "middleware": [Middleware(SecurityHeaders)]},
                favicon_path=ASSETS / "favicon.png",
                footer_links=[],
                ssr_mode=False,
                pwa=False,
            )
    except OSError as error:  # another program took the port while this one started
        require_free(settings.host, settings.port)
        raise AddressUnavailable(f"Cannot listen on {settings.host}:{settings.port} ({error}).") from error
    return url, share_url


def _build_chat(examples: tuple[str, ...]) -> _ChatPart:
    with gr.Column(elem_id="chatbot"):
        past = _widget(
            "mountPast",
            ("open", "edit", "retry", "resume", "undo", "example", "branch", "rate"),
            {"conversation": None, "messages": [], "tree": []},
            arguments=f", {list(examples)!r}",
        )
        live = _widget("mountLive", (), {"state": "idle", "status": "", "message": None})
    with gr.Column(elem_id="dock"):
        _widget("mountStatus", (), None, elem_id="status")
        with gr.Row(elem_id="composer-row"):
            composer = gr.Textbox(
                placeholder="Message",
                show_label=False,
                container=False,
                lines=1,
                max_lines=10,
                autofocus=True,
                elem_id="composer",
                html_attributes=gr.InputHTMLAttributes(enterkeyhint="send"),
                scale=1,
            )
            send = gr.Button("Send", elem_id="send", variant="primary", min_width=0, scale=0)
            stop = gr.Button("Stop", elem_id="stop", min_width=0, scale=0)
    return _ChatPart(composer, send, stop, past, live)


def _wire(
    handlers: ChatHandlers,
    asker: list[Any],
    chat: _ChatPart,
    panel: SettingsPanel,
    conversations: gr.HTML,
    new_chat: gr.Button,
    clear: gr.Button,
) -> None:
    """Connect what people do to the handlers; `asker` comes first in each: the session, what the tab says of itself."""
    shown = [chat.composer, chat.past, chat.live, conversations]
    _, tab = asker

    def check(n_before: int) -> Callable[..., list[dict[str, Any]]]:
        return lambda *values: [gr.validate(True, "")] * n_before + validate(values[n_before:])

    def ask(listen: Any, handler: Any, *inputs: Any) -> None:
        given = [*asker, *inputs, *panel.inputs]
        n_before = len(given) - len(panel.inputs)
        begun = listen(handler, given, shown, validator=check(n_before), js=SAY_WHO, trigger_mode="multiple", **QUEUED)
        streamed = begun.success(handlers.stream, asker, chat.live, js=SAY_WHO, **QUEUED)
        streamed.then(handlers.settle, asker, [*shown, panel.field("seed")], js=SAY_WHO, **AT_ONCE)

    def show(listen: Any, handler: Any) -> None:
        shows = listen(handler, asker, shown, js=SAY_WHO, **AT_ONCE)
        shows.then(handlers.follow, asker, chat.live, js=SAY_WHO, **QUEUED)

    past: Any = chat.past
    for listen in (chat.composer.submit, chat.send.click):
        ask(listen, handlers.send, chat.composer)
    ask(past.example, handlers.send_example)
    ask(past.edit, handlers.edit)
    ask(past.retry, handlers.retry)
    ask(past.resume, handlers.resume)
    for listen, handler in (
        (past.open, handlers.conversations.refresh),
        (past.undo, handlers.conversations.undo),
        (new_chat.click, handlers.conversations.new),
        (clear.click, handlers.conversations.clear),
        (conversations.select, handlers.conversations.select),
        (conversations.delete, handlers.conversations.delete),
        (conversations.restore, handlers.conversations.restore),
        (past.branch, handlers.conversations.branch),
    ):
        show(listen, handler)
    for listen, change in (
        (conversations.search, handlers.conversations.search),
        (conversations.rename, handlers.conversations.rename),
        (conversations.pin, handlers.conversations.pin),
    ):
        listen(change, asker, conversations, js=SAY_WHO, **AT_ONCE)
    past.rate(handlers.conversations.rate, tab, None, js="() => [brook.tab()]", **AT_ONCE)
    chat.stop.click(handlers.conversations.stop, tab, None, js="() => [brook.tab()]", **AT_ONCE)


def _wire_files(
    handlers: FileHandlers, asker: list[Any], chat: _ChatPart, conversations: gr.HTML, files: gr.HTML
) -> None:
    listen: Any = files
    listen.export(handlers.export, asker[1], files, js="() => [brook.tab()]", **QUEUED)
    getattr(listen, "import")(
        handlers.take, asker, [chat.composer, chat.past, chat.live, conversations, files], js=SAY_WHO, **QUEUED
    )


def _widget(
    mount: str,
    events: tuple[str, ...],
    value: Any,
    *,
    arguments: str = "",
    elem_id: str | None = None,
) -> gr.HTML:
    """Make a part of the page that a function of the page's scripts draws, from `value`, and that sends `events`."""
    # gr.HTML knows its custom events by their names, in quotes, in this code (gradio 6.31, HTML.__getattr__).
    return gr.HTML(
        value,
        html_template="",
        js_on_load=f"brook.{mount}(element, props, watch, trigger{arguments}); // {list(events)!r}",
        head="".join(f'<script src="{_url(name)}"></script>' for name in SCRIPTS),
        apply_default_css=False,
        elem_id=elem_id,
    )


def _url(name: str) -> str:
    """Give an asset's address, which changes with its content so that browsers may keep it."""
    return f"{ASSETS_URL}/{name}?{hashlib.sha256((ASSETS / name).read_bytes()).hexdigest()[:12]}"
