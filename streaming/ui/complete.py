"""The Complete tab: an editable text that the model goes on with."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from streaming.conversations.tree import Message
from streaming.engine.base import GenerationRequest
from streaming.errors import BrookError
from streaming.server.runs import LiveReply, Runs
from streaming.ui.models import ModelHandlers
from streaming.ui.replies import Frame, Replies
from streaming.ui.session import SAY_WHO, Session, owner_of
from streaming.ui.settings_panel import ChatSettings, SettingsPanel, validate

EXAMPLES = (
    "An increasing sequence: one,",
    "Once upon a time, in a valley that no map showed,",
    "The three laws of robotics are",
)
N_NEW_TOKENS = 20


class CompleteState:
    """What one tab's Complete is writing, if it is."""

    def __init__(self) -> None:
        self.reply: LiveReply | None = None

    def stop(self) -> None:
        """End the text here."""
        if self.reply is not None:
            self.reply.stop()


@dataclass(frozen=True, slots=True)
class CompletePart:
    """The tab's components; `wire` connects them once the settings panel is there."""

    replies: Replies
    state: gr.State
    text: gr.Textbox
    n_tokens: gr.Number
    go: gr.Button
    stop: gr.Button
    status: gr.Textbox

    def wire(self, panel: SettingsPanel, asker: Sequence[Any], models: ModelHandlers) -> None:
        """Connect the buttons; who asks, model and settings are the chat's, but for the length."""
        hidden: Any = {"show_progress": "hidden", "api_visibility": "private"}

        def check(
            _session: Any, _tab: Any, _state: Any, _text: str, n_tokens: int | None, *values: Any
        ) -> list[dict[str, Any]]:
            fine, ok = n_tokens is None or 1 <= n_tokens <= 100_000, gr.validate(True, "")
            return [ok, ok, ok, ok, gr.validate(fine, "Between 1 and 100,000"), *validate(values)]

        async def ask(
            session: Session,
            tab: Mapping[str, Any] | None,
            state: CompleteState,
            text: str,
            n_tokens: int | None,
            request: gr.Request,
            *values: Any,
        ) -> list[Any]:
            if state.reply is None:
                settings = ChatSettings(*values).for_request() | {"max_new_tokens": n_tokens or N_NEW_TOKENS}
                state.reply = self.replies.runs.start(
                    Message(role="assistant", content=text),
                    lambda: GenerationRequest(prompt=text, **settings),
                    model=models.of(session).name,
                    owner=owner_of(tab, request),
                )
            return [gr.update(visible=False), gr.update(visible=True)]

        async def stream(state: CompleteState) -> AsyncGenerator[tuple[str, str], None]:
            reply = state.reply
            if reply is None:
                return
            text = reply.message.content
            try:
                async with aclosing(self.replies.write(reply)) as frames:
                    async for frame in frames:
                        text = frame.text
                        yield text, _words(frame)
            except BrookError as error:
                yield text, str(error)
            finally:
                state.reply = None

        async def settle() -> list[Any]:
            return [gr.update(visible=True), gr.update(visible=False)]

        async def stop(state: CompleteState) -> None:
            state.stop()

        inputs = [*asker, self.state, self.text, self.n_tokens, *panel.inputs]
        begun = self.go.click(
            ask, inputs, [self.go, self.stop], validator=check, js=SAY_WHO, concurrency_limit=None, **hidden
        )
        streamed = begun.success(stream, self.state, [self.text, self.status], concurrency_limit=None, **hidden)
        streamed.then(settle, None, [self.go, self.stop], queue=False, **hidden)
        self.stop.click(stop, self.state, None, queue=False, **hidden)


def build_complete(runs: Runs) -> CompletePart:
    """Lay the tab out where it is called."""
    with gr.Column(elem_id="complete"):
        text = gr.Textbox(
            EXAMPLES[0],
            label="Text",
            info="The model goes on where the text ends; edit it anywhere.",
            lines=10,
            max_lines=24,
            elem_id="complete-text",
        )
        with gr.Row(elem_id="complete-bar"):
            go = gr.Button("Continue", variant="primary", elem_id="complete-go", scale=0, min_width=110)
            stop = gr.Button("Stop", visible=False, elem_id="complete-stop", scale=0, min_width=110)
            n_tokens = gr.Number(
                N_NEW_TOKENS, label="New tokens", precision=0, elem_id="complete-tokens", scale=0, min_width=110
            )
        status = gr.Textbox(
            show_label=False, container=False, interactive=False, elem_id="complete-status", lines=1, max_lines=2
        )
        gr.Examples([[example] for example in EXAMPLES], [text], label="Begin with", api_visibility="private")
    state = gr.State(CompleteState(), delete_callback=_close)
    return CompletePart(Replies(runs), state, text, n_tokens, go, stop, status)


def _words(frame: Frame) -> str:
    notice = frame.message["notice"]
    return f"{frame.status} · {notice}" if notice else frame.status


def _close(state: CompleteState) -> None:
    state.stop()
