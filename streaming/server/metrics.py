"""`/metrics` for Prometheus: what the engine did, read from the logs of its generations.

Nothing is counted while tokens are made. Logs keep every event with its time, so what is new in them is counted when
Prometheus asks, and what has ended, at the next request: decoding pays nothing.
"""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from streaming.engine.base import Engine, EngineStatus, Generation, GenerationRequest, SamplingDefaults
from streaming.errors import BrookError
from streaming.events import FinishEvent
from streaming.server.access import Access
from streaming.server.api_errors import ApiError

FIRST_TOKEN_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
INTER_TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


@dataclass(slots=True)
class _Followed:
    """A generation, how many of its events were counted, and when the last of them came."""

    run: Generation
    n_read: int = 0
    last_s: float | None = None


class MeteredEngine:
    """An engine whose generations are counted; it is otherwise the one that it was made with."""

    def __init__(self, engine: Engine) -> None:
        self.kind = engine.kind
        self._engine = engine
        self._meters = _Meters()
        self._lock = threading.Lock()
        self._followed: list[_Followed] = []

    @property
    def model_id(self) -> str:
        return self._engine.model_id

    @property
    def tokenizer(self) -> Any:
        return self._engine.tokenizer

    @property
    def defaults(self) -> SamplingDefaults:
        return self._engine.defaults

    def submit(self, request: GenerationRequest) -> Generation:
        try:
            run = self._engine.submit(request)
        except BrookError as error:
            self._meters.refused.labels(type(error).__name__).inc()
            raise
        with self._lock:
            self._count(ended_only=True)
            self._followed.append(_Followed(run))
        return run

    def wait_ready(self, timeout: float | None = None) -> bool:
        return self._engine.wait_ready(timeout)

    def status(self) -> EngineStatus:
        return self._engine.status()

    def close(self) -> None:
        self._engine.close()

    def exposition(self) -> bytes:
        """Give everything counted until now, in Prometheus' text format."""
        with self._lock:
            self._count()
            self._meters.show(self.kind, self.status())
            return generate_latest(self._meters.registry)

    def _count(self, *, ended_only: bool = False) -> None:
        """Count what is new in the logs, and let go of those that have ended; the lock is held."""
        for followed in self._followed:
            if followed.run.finish is not None or not ended_only:
                self._meters.count(followed)
        self._followed = [f for f in self._followed if f.run.finish is None or f.n_read < len(f.run.log)]


class _Meters:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        own: Any = {"namespace": "brook", "registry": CollectorRegistry()}
        self.registry: CollectorRegistry = own["registry"]
        self._info = Info("engine", "What serves", **own)
        self._active = Gauge("active_generations", "Generations that the model works on", **own)
        self._queued = Gauge("queued_generations", "Generations that wait for the model", **own)
        self._cache = Gauge("cache_bytes", "Memory that kept prefixes take", **own)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts, those reused among them", **own)
        self._reused = Counter("reused_tokens", "Tokens of prompts that were not read again", **own)
        self._generated = Counter("generated_tokens", "Tokens written", **own)
        self._ended = Counter("generations", "Generations that ended, by why", ["reason"], **own)
        self.refused = Counter("refused_requests", "Requests that were not accepted, by why", ["error"], **own)
        self._wait = Histogram("queue_seconds", "From request to model", buckets=FIRST_TOKEN_BUCKETS_S, **own)
        self._first = Histogram(
            "time_to_first_token_seconds", "From request to first token", buckets=FIRST_TOKEN_BUCKETS_S, **own
        )
        self._between = Histogram(
            "inter_token_seconds", "From one token to the next", buckets=INTER_TOKEN_BUCKETS_S, **own
        )
        for reason in ("stop", "length", "cancelled", "error"):  # a rate needs the zero before the first one
            self._ended.labels(reason)

    def count(self, followed: _Followed) -> None:
        """Count a generation's new events."""
        for event in followed.run.log.snapshot(followed.n_read):
            followed.n_read += 1
            if isinstance(event, FinishEvent):
                self._ended.labels(event.reason).inc()
                self._prompt.inc(event.n_prompt_tokens)
                self._reused.inc(event.n_reused_tokens)
                n_counted = followed.n_read - 1  # as one an event, which may have been several of a server's tokens
                self._generated.inc(max(0, event.n_generated_tokens - n_counted))
                self._wait.observe(event.timings.queued_s)
                continue
            self._generated.inc()
            if followed.last_s is None:
                self._first.observe(event.t_s)
            else:
                self._between.observe(event.t_s - followed.last_s)
            followed.last_s = event.t_s

    def show(self, kind: str, status: EngineStatus) -> None:
        """Take over how the engine is now."""
        self._info.info({"model": status.model_id, "engine": kind, "device": status.device, "state": status.state})
        self._active.set(status.n_active)
        self._queued.set(status.n_queued)
        self._cache.set(status.n_cache_bytes)


def metrics_route(engine: MeteredEngine, access: Access) -> BaseRoute:
    """Serve `/metrics` to whoever may use the API."""

    async def endpoint(request: Request) -> Response:
        try:
            access.owner_of(request)
        except ApiError as error:
            return error.to_response()
        return Response(await asyncio.to_thread(engine.exposition), media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", endpoint)
