"""The engine on another machine: any server that speaks OpenAI's API, through OpenAI's own client.

One thread runs an event loop that owns the client and every request; cancelling one closes its connection, which tells
the server. Servers give text, not token ids: there is no tokenizer, and every TokenEvent has the id NO_ID.
"""

import asyncio
import contextlib
import copy
import hashlib
import logging
import secrets
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import openai

from streaming.engine.base import SESSION_HEADER, EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.engine.queue import FairQueue
from streaming.engine.remote_wire import (
    ReplyCutOff,
    ReplyReader,
    as_unavailable,
    asked_pause_s,
    explain,
    is_worth_retrying,
    to_call,
)
from streaming.errors import EngineClosed, GenerationFailed, ModelUnavailable, StreamTimeout
from streaming.events import FinishReason, TokenEvent
from streaming.log import EventLog

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 300.0
"""How long a server may say nothing: it may have a long prompt to read, or a queue."""
READY_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 10.0
N_SEATS = 256
"""How many requests are with the server at a time, as many as vLLM serves by default; the others wait here."""
MAX_TRIES = 3
FIRST_PAUSE_S = 0.5
"""Before the second try; each later one waits twice as long, and as long as the server asks for."""
MAX_PAUSE_S = 30.0
"""A server that asks for more is not asked again: it is for people to wait that long."""

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(eq=False)
class _Asked:
    """A request on its way: what is sent, what came of it, and, once it is its turn, the task that sees to it."""

    run: Generation
    call: dict[str, Any]
    reader: ReplyReader
    task: asyncio.Task[FinishReason] | None = None

    def cancel(self) -> None:
        """Leave the server; in the loop."""
        if self.task is not None:
            self.task.cancel()


class RemoteEngine:
    """Serve requests with the model `model` of the server at `base_url`, such as `http://127.0.0.1:8000/v1`.

    `model` may be None where the server has one model only. A request that fails before anything came is tried again,
    MAX_TRIES times in all. A setting that OpenAI's API lacks (top_k, min_p, repetition_penalty) is sent only when it is
    on, under the name that vLLM and SGLang have for it. `n_seats` requests are with the server at a time; `max_active`
    and `max_queued` are FairQueue's limits. Every public method may be called from any thread.
    """

    kind = "remote"

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        n_seats: int = N_SEATS,
        max_active: int = 0,
        max_queued: int = 0,
    ) -> None:
        self._host = host_of(base_url)
        self._asked_model = model
        timeout = openai.Timeout(read_timeout_s, connect=connect_timeout_s)
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=0)
        # The client reads these from the environment; they are OpenAI's business and no other server's.
        self._client.organization = self._client.project = None
        self._read_timeout_s = read_timeout_s
        self._n_seats = n_seats
        self._queue: FairQueue[_Asked] = FairQueue(max_active, max_queued)
        self._lock = threading.Lock()
        self._closing = False
        self._salt = secrets.token_bytes(16)
        self._loop = asyncio.new_event_loop()
        self._worker = threading.Thread(target=self._loop.run_forever, name="brook-engine", daemon=True)
        self._worker.start()
        self._found = asyncio.run_coroutine_threadsafe(self._find_model(), self._loop)

    @property
    def model_id(self) -> str:
        is_found = self._found.done() and not self._found.cancelled() and self._found.exception() is None
        return self._found.result() if is_found else self._asked_model or self._host

    @property
    def tokenizer(self) -> None:
        return None

    @property
    def defaults(self) -> SamplingDefaults:
        return SamplingDefaults(temperature=1.0)  # what OpenAI's API says of a request that names none

    def submit(self, request: GenerationRequest) -> Generation:
        if not self.wait_ready(READY_TIMEOUT_S):
            raise StreamTimeout(f"The server at {self._host} did not answer within {READY_TIMEOUT_S:g} s.")
        seed = secrets.randbelow(2**31 - 1) + 1 if request.seed is None else request.seed
        run = Generation(request, (), log=EventLog(), seed=seed, cancel=self._cancel, prefix_text=request.prefix_text)
        call = to_call(request, self.model_id, seed)
        if request.owner:
            call["extra_headers"] = {SESSION_HEADER: self._session_of(request.owner)}
        with self._lock:
            self._refuse_if_closing()
            self._queue.add(
                _Asked(run, call, ReplyReader(time.perf_counter(), request.stop)), request.owner, request.person
            )
            self._fill_seats()
        return run

    def wait_ready(self, timeout: float | None = None) -> bool:
        try:
            failure = self._found.exception(timeout)
        except TimeoutError:
            return False
        except CancelledError as error:
            raise EngineClosed("The engine was closed; load it again.") from error
        if failure is not None:
            raise copy.copy(failure)  # one that is raised again and again keeps the frames of all who asked
        return True

    def status(self) -> EngineStatus:
        if self._closing:
            return EngineStatus("closed", self.model_id)
        if not self._found.done():
            return EngineStatus("loading", self.model_id, detail=f"Asking the server at {self._host}")
        error = self._found.exception()
        if error is not None:
            return EngineStatus("failed", self.model_id, detail=str(error))
        with self._lock:
            return EngineStatus("ready", self.model_id, self._host, len(self._queue.served), self._queue.n_waiting)

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            waiting = self._queue.clear()
        for asked in waiting:
            self._end(asked, "cancelled")
        self._found.cancel()
        try:
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("The server at %s did not let go within %g s.", self._host, CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._worker.join(CLOSE_TIMEOUT_S)
        if not self._worker.is_alive():
            self._loop.close()

    def _cancel(self, run: Generation) -> None:
        with self._lock:
            asked = next((asked for asked in [*self._queue, *self._queue.served] if asked.run is run), None)
            if asked is None:
                return
            if not self._queue.remove(asked):
                with contextlib.suppress(RuntimeError):  # the loop was closed before the server let go
                    self._loop.call_soon_threadsafe(asked.cancel)
                return
            self._fill_seats()
        asked.reader.leave_queue()
        self._end(asked, "cancelled")

    def _fill_seats(self) -> None:
        """Begin those whose turn it is, and tell the others how many must end before each; the lock is held."""
        while len(self._queue.served) < self._n_seats and (asked := self._queue.take()) is not None:
            asked.reader.leave_queue()
            self._show_place(asked, 0)
            self._loop.call_soon_threadsafe(self._start, asked)
        for n_ahead, asked in enumerate(self._queue, 1):
            self._show_place(asked, n_ahead)

    def _show_place(self, asked: _Asked, n_ahead: int) -> None:
        asked.run.progress = replace(asked.run.progress, n_ahead=n_ahead)
        asked.run.log.touch()

    def _end(self, asked: _Asked, reason: FinishReason, error: str | None = None) -> None:
        for event in asked.reader.flush():
            self._put(asked.run, event)
        asked.run.progress = replace(asked.run.progress, state="done", n_ahead=0)
        asked.run.log.append(asked.reader.finish(reason, error))

    def _session_of(self, owner: str) -> str:
        """Give a name by which a server tells owners apart, and nobody who they are."""
        return hashlib.blake2b(owner.encode(), key=self._salt, digest_size=16).hexdigest()

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise EngineClosed("The engine was closed; load it again.")

    # In the loop

    async def _find_model(self) -> str:
        """Ask the server which models it has."""
        try:
            models = [model.id async for model in self._client.models.list()]
        except (openai.OpenAIError, ValueError) as error:
            is_refused = isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError)
            if self._asked_model and isinstance(error, openai.APIStatusError) and not is_refused:
                return self._asked_model  # a server that has no list, or cannot tell it
            raise as_unavailable(error, self._host, self._read_timeout_s) from error
        if self._asked_model:
            return self._asked_model  # servers may load what they do not list
        if len(models) != 1:
            names = ", ".join(models[:8]) or "none"
            raise ModelUnavailable(
                f"Name one of the models of the server at {self._host} with --model; it has {names}."
            )
        return models[0]

    def _start(self, asked: _Asked) -> None:
        asked.task = self._loop.create_task(self._serve(asked.run, asked.call, asked.reader))
        # The end is written here and nowhere else: a task that is cancelled before its first step runs nothing.
        asked.task.add_done_callback(lambda done: self._finish(asked, done))

    async def _serve(self, run: Generation, call: dict[str, Any], reader: ReplyReader) -> FinishReason:
        for n_tries in range(1, MAX_TRIES + 1):
            try:
                return await self._stream(run, call, reader)
            except (openai.OpenAIError, ReplyCutOff) as error:
                pause_s = max(FIRST_PAUSE_S * 2 ** (n_tries - 1), asked_pause_s(error))
                is_last = n_tries == MAX_TRIES or pause_s > MAX_PAUSE_S
                if is_last or reader.has_begun or not is_worth_retrying(error):
                    raise
                logger.info("The server at %s failed (%s); trying again in %g s", self._host, error, pause_s)
                await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def _stream(self, run: Generation, call: dict[str, Any], reader: ReplyReader) -> FinishReason:
        client: Any = self._client
        endpoint = client.chat.completions if "messages" in call else client.completions
        async with await endpoint.create(**call) as stream:
            async for chunk in stream:
                for event in reader.read(chunk):
                    self._put(run, event)
                if reader.has_met_stop:
                    return "stop"
        if reader.finish_reason is None:
            raise ReplyCutOff(f"The server at {self._host} ended the reply in the middle; try again.")
        if reader.finish_reason not in _REASONS:
            raise GenerationFailed(f"The server at {self._host} ended the reply early ({reader.finish_reason}).")
        return _REASONS[reader.finish_reason]

    def _put(self, run: Generation, event: TokenEvent) -> None:
        if event.index == 0:
            run.progress = replace(run.progress, state="writing")
        run.log.append(event)

    def _finish(self, asked: _Asked, done: asyncio.Task[FinishReason]) -> None:
        with self._lock:
            self._queue.release(asked)
            self._fill_seats()
        if done.cancelled():
            self._end(asked, "cancelled")
        elif error := done.exception():
            self._end(asked, "error", explain(error, self._host, self._read_timeout_s))
        else:
            self._end(asked, done.result())

    async def _shut_down(self) -> None:
        with self._lock:
            tasks = [asked.task for asked in self._queue.served if asked.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()
        await self._loop.shutdown_asyncgens()


def host_of(base_url: str) -> str:
    """Give a server's name as it is shown to people: without a user and a password."""
    return urlsplit(base_url).netloc.rpartition("@")[2] or base_url
