"""The two endpoints for gradio_client: `/chat` and `/complete`, each a stream of the growing text."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import gradio as gr
from gradio.events import api

from streaming.conversations.tree import Message
from streaming.engine.base import GenerationRequest
from streaming.errors import BrookError
from streaming.server.runs import Runs
from streaming.ui.replies import Replies
from streaming.ui.session import caller_of


def add_endpoints(runs: Runs) -> None:
    """Add them to the app that is being built. They take DESIGN's arguments; every other event of the page is private.

    The stream is text alone, so that a client's last value is the reply. The seed that was used comes beside it, as
    a log: one of the updates in `async for update in job` has `update.log == ("seed 123", "info")`.
    """

    async def chat(
        request: gr.Request,
        message: str,
        history: list[dict[str, str]] | None = None,
        system_prompt: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int = 0,
    ) -> AsyncGenerator[str, None]:
        """Reply to a message, after a history of {"role", "content"}; temperature 0 is greedy, seed 0 a fresh one."""

        def build_request() -> GenerationRequest:
            system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
            return GenerationRequest(
                messages=[*system, *(history or []), {"role": "user", "content": message}],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed or None,
            )

        async with aclosing(_stream(runs, build_request, caller_of(request))) as texts:
            async for text in texts:
                yield text

    async def complete(
        request: gr.Request,
        prompt: str,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int = 0,
    ) -> AsyncGenerator[str, None]:
        """Continue a text; the stream is the continuation alone."""

        def build_request() -> GenerationRequest:
            return GenerationRequest(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed or None,
            )

        async with aclosing(_stream(runs, build_request, caller_of(request))) as texts:
            async for text in texts:
                yield text

    # gr.api reads the type of what is streamed from the annotation of the return.
    for endpoint in (chat, complete):
        endpoint.__annotations__["return"] = str
        api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)


async def _stream(runs: Runs, build_request: Callable[[], GenerationRequest], owner: str) -> AsyncGenerator[str, None]:
    reply, told, text = runs.start(Message(role="assistant", content=""), build_request, owner=owner), False, ""
    try:
        async with aclosing(Replies(runs).write(reply)) as frames:
            async for frame in frames:
                if reply.generation is not None and not told:
                    gr.Info(f"seed {reply.generation.seed}", visible=False)
                    told = True
                if frame.text != text:
                    text = frame.text
                    yield text
    except BrookError as error:
        raise gr.Error(str(error), print_exception=False) from error
    failure = reply.done.result().error
    if failure is not None:
        raise gr.Error(failure, print_exception=False)
    yield text
