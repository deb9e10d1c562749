"""The API that every client knows: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, as OpenAI's clients expect.

A stream's events carry ids, `<answer>:<offset in each choice's log>`: a client that lost its connection sends the last
one as `Last-Event-ID` to the same address, and goes on after it.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from streaming.engine.base import Engine, Generation, GenerationRequest
from streaming.errors import BrookError
from streaming.events import FinishEvent
from streaming.server.access import Access
from streaming.server.api_errors import ApiError, as_api_error, server_error
from streaming.server.openai_objects import failure, finish_chunk, opening_chunk, token_chunk, usage_chunk, whole
from streaming.server.openai_schema import Asked, parse_chat, parse_completion
from streaming.server.streams import Answer, Answers, follow
from streaming.streamers.sse import HEARTBEAT, sse_frame

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
MAX_BODY_BYTES = 16 * 2**20
NO_MODEL = "dummy"
"""What huggingface_hub 2.4 sends as the model's name when it was given only an address (InferenceClient)."""
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Endpoint = Callable[[Request], Awaitable[Response]]


def build_api_routes(
    engine: Engine, access: Access, models: Callable[[], Mapping[str, Engine]] | None = None
) -> tuple[BaseRoute, ...]:
    """Give the routes under `/v1`, for `launch_app`.

    `models` tells those that the engine has, in order, by the names that they answer to; each is listed by its id.
    """
    api = _Api(engine, access, models or (lambda: {engine.model_id: engine}))
    return (
        Route("/v1/models", _answering(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _answering(api.model), methods=["GET"]),
        Route("/v1/chat/completions", _answering(api.chat), methods=["POST"]),
        Route("/v1/completions", _answering(api.complete), methods=["POST"]),
        Route("/v1/{path:path}", _answering(api.unknown), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    )


class _Api:
    """The endpoints. They run in the server's event loop; what may wait for the engine runs in threads."""

    def __init__(self, engine: Engine, access: Access, models: Callable[[], Mapping[str, Engine]]) -> None:
        self._engine = engine
        self._access = access
        self._models = models
        self._answers = Answers()
        self._started = int(time.time())

    async def models(self, request: Request) -> Response:
        self._access.owner_of(request)
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self._ids()]})

    async def model(self, request: Request) -> Response:
        self._access.owner_of(request)
        return JSONResponse(self._describe(self._require(request.path_params["model"]).model_id))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat, "chatcmpl-")

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, parse_completion, "cmpl-")

    async def unknown(self, request: Request) -> Response:
        self._access.owner_of(request)
        raise ApiError(404, f"There is no {request.method} {request.url.path} here.", code="unknown_url")

    async def _answer(self, request: Request, parse: Callable[[Any, str], Asked], prefix: str) -> Response:
        owner = self._access.owner_of(request)
        last_event_id = request.headers.get("last-event-id")
        if last_event_id:
            answer, after = self._find(last_event_id, owner)
            return _EventStream(self._frames(answer, after), self._answers.reading(answer))
        asked = parse(await _read_json(request), owner)
        model = self._require(asked.model)
        _require_loaded(model)
        model_id, person = model.model_id, self._access.person_of(request)
        requests = [replace(one, person=person, model=model_id) for one in asked.requests]
        runs = await asyncio.to_thread(_submit, self._engine, requests)
        answer = Answer(prefix + secrets.token_hex(12), owner, model_id, asked, runs)
        if any(run.n_dropped_messages for run in runs):
            answer.cancel()
            raise ApiError(
                400,
                "The conversation is longer than the model's context; leave its oldest messages out.",
                param="messages",
                code="context_length_exceeded",
            )
        self._answers.add(answer)
        if asked.is_stream:
            return _EventStream(self._frames(answer, None), self._answers.reading(answer))
        return await self._whole(request, answer)

    async def _whole(self, request: Request, answer: Answer) -> Response:
        """Wait for all choices, or for one to fail or the client to leave, which ends the others."""
        with self._answers.reading(answer):
            finished = asyncio.ensure_future(_wait_finished(answer))
            left = asyncio.ensure_future(_wait_left(request))
            try:
                await asyncio.wait((finished, left), return_when=asyncio.FIRST_COMPLETED)
                if not finished.done():
                    raise ClientDisconnect
                finished.result()
            finally:
                for task in (finished, left):
                    task.cancel()
                await asyncio.gather(finished, left, return_exceptions=True)
        return JSONResponse(await asyncio.to_thread(lambda: whole(answer, self._hidden_ids(answer))))

    async def _frames(self, answer: Answer, after: list[int] | None) -> AsyncGenerator[str, None]:
        """Give the events of a stream: all of them, or those after the offsets that a client has had."""
        hidden_ids = await asyncio.to_thread(self._hidden_ids, answer)
        n_read = after or [0] * len(answer.runs)
        n_chars = [
            sum(len(event.text) for event in run.log.snapshot()[:n] if not isinstance(event, FinishEvent))
            for run, n in zip(answer.runs, n_read, strict=True)
        ]
        if answer.asked.is_chat and after is None:
            for choice in range(len(answer.runs)):
                yield _frame(opening_chunk(answer, choice))
        async with aclosing(follow(answer.runs, tuple(n_read), HEARTBEAT_S)) as events:
            async for item in events:
                if item is None:
                    yield HEARTBEAT
                    continue
                choice, event = item
                n_read[choice] += 1
                if isinstance(event, FinishEvent):
                    if (message := failure(event)) is not None:
                        answer.cancel()
                        yield _frame(server_error(message).body)
                        return
                    chunk: dict[str, Any] | None = finish_chunk(answer, choice, event)
                else:
                    chunk = token_chunk(answer, choice, event, hidden_ids, n_chars[choice])
                    n_chars[choice] += len(event.text)
                if chunk is not None:
                    yield _frame(chunk, f"{answer.id}:{'.'.join(map(str, n_read))}")
        if answer.asked.has_usage:
            yield _frame(usage_chunk(answer))
        yield sse_frame("[DONE]")

    def _find(self, last_event_id: str, owner: str) -> tuple[Answer, list[int]]:
        """Give the answer that an event's id belongs to, and the offsets after the event."""
        id, _, offsets = last_event_id.partition(":")
        answer = self._answers.find(id, owner)
        try:
            after = [int(offset) for offset in offsets.split(".")]
        except ValueError:  # no number, or one with thousands of digits
            after = []
        if (
            answer is None
            or len(after) != len(answer.runs)
            or any(not 0 <= n <= len(run.log) for n, run in zip(after, answer.runs, strict=True))
        ):
            raise ApiError(404, "This stream is not kept any more; ask anew.", code="stream_not_found")
        return answer, after

    def _hidden_ids(self, answer: Answer) -> frozenset[int]:
        """Give the ids of control tokens, which get no logprobs; it takes a tokenizer a while to tell them."""
        if answer.asked.n_top is None:
            return frozenset()
        tokenizer = self._models()[answer.model_id].tokenizer
        return frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids)

    def _ids(self) -> list[str]:
        return list(dict.fromkeys(model.model_id for model in self._models().values()))

    def _require(self, model: str | None) -> Engine:
        """Give the model that is asked for: the first one where none is named."""
        models = self._models()
        if model is None or model == NO_MODEL:
            return next(iter(models.values()))
        if model not in models:
            offered = ", ".join(map(repr, self._ids()))
            raise ApiError(
                404,
                f"The model {model!r} is not served here; there is {offered}.",
                param="model",
                code="model_not_found",
            )
        return models[model]

    def _describe(self, model_id: str) -> dict[str, Any]:
        return {"id": model_id, "object": "model", "created": self._started, "owned_by": "brook"}


class _EventStream(StreamingResponse):
    """A stream of events that stops reading as soon as the client leaves, wherever it was."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[str, None], reading: AbstractContextManager[None]) -> None:
        super().__init__(frames, headers=STREAM_HEADERS)
        self._frames = frames
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reading:
            async with aclosing(self._frames):
                await super().__call__(scope, receive, send)


def _answering(endpoint: Endpoint) -> Endpoint:
    """Answer an endpoint's errors with error objects."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as error:
            return error.to_response()
        except BrookError as error:
            return as_api_error(error).to_response()
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        except Exception:
            logger.exception("A request to the API could not be answered")
            return server_error("The server failed, and its log says why; try again.").to_response()

    return answer


def _require_loaded(model: Engine) -> None:
    """Begin to load a model that is not there, and have the client ask again: nothing waits here for minutes.

    Raises:
        ApiError: it is loading.
        ModelUnavailable: it could not be loaded; the menu has a later request try anew.
    """
    if not model.wait_ready(0):
        raise ApiError(503, "The model is still loading; try again.", type="server_error", code="model_loading")


def _submit(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """Submit all requests, or none."""
    runs: list[Generation] = []
    try:
        for request in requests:
            runs.append(engine.submit(request))  # noqa: PERF401 (those before a refusal are to be cancelled)
    except BaseException:
        for run in runs:
            run.cancel()
        raise
    return runs


async def _read_json(request: Request) -> Any:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES // 2**20} MB.", code="body_too_large")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is not JSON that can be read.", code="invalid_json") from error


async def _wait_finished(answer: Answer) -> None:
    """Wait until every choice has ended.

    Raises:
        ApiError: as soon as one has failed.
    """
    async with aclosing(follow(answer.runs, (0,) * len(answer.runs), HEARTBEAT_S)) as events:
        async for item in events:
            event = None if item is None else item[1]
            if isinstance(event, FinishEvent) and (message := failure(event)) is not None:
                raise server_error(message)


async def _wait_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _frame(data: dict[str, Any], id: str | None = None) -> str:
    return sse_frame(json.dumps(data, ensure_ascii=False, separators=(",", ":")), id=id)
