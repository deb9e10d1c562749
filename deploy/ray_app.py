"""Brook's engine on as many machines as a Ray cluster has, behind the same API.

    pip install -r deploy/requirements.txt
    serve run deploy.ray_app:build model=Qwen/Qwen3-0.6B min_replicas=1 max_replicas=8
    python app.py --engine remote --base-url http://127.0.0.1:8000/v1

Each replica is an engine with Brook's own API. A request goes to the replica of its session (`x-session-id`, which the
remote engine sends), where what was read of its conversation is kept, and to the next one where that is full or gone.
A replica that fails its health check is replaced; replicas come and go with the number of requests under way.
"""

from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streaming import load_engine
from streaming.server.access import Access
from streaming.server.health import health_route
from streaming.server.metrics import MeteredEngine, metrics_route
from streaming.server.openai_api import build_api_routes

REPLICA_HEADER = "x-brook-replica"
MAX_ONGOING_REQUESTS = 64
"""A replica queues fairly by itself: this only bounds what one may hold before its neighbour is asked."""
DRAIN_S = 120.0
"""How long a replica that is no longer needed goes on with its streams."""


class Options(BaseModel):
    """What `serve run deploy.ray_app:build name=value …` takes.

    `target_ongoing_requests` is how many requests a replica should have under way, which serves that many at once: more
    bring another replica. `max_active` and `max_queued` bound those of one session, and those that wait, in each.
    `api_keys` are separated by commas; without any, the API answers programs on its own machine alone.
    """

    model: str | None = None
    device: str = "auto"
    quantize: str = "auto"
    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 8.0
    max_active: int = 16
    max_queued: int = 128
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    api_keys: str = ""


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=5.0,
    health_check_timeout_s=15.0,
    graceful_shutdown_timeout_s=DRAIN_S,
    request_router_config=RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    ),
)
@serve.ingress()
class Replica:
    """One engine and its API."""

    def __init__(self, options: Options) -> None:
        engine = load_engine(
            options.model,
            engine="auto",
            device=options.device,
            quantize=options.quantize,
            max_active=options.max_active,
            max_queued=options.max_queued,
        )
        self._engine = MeteredEngine(engine)
        self._access = Access([key for key in options.api_keys.split(",") if key], is_public=False)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        routes = [
            *build_api_routes(self._engine, self._access),
            metrics_route(self._engine, self._access),
            health_route(self._engine),
        ]
        return _Named(Starlette(routes=routes), serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Raise where the engine is of no use any more: Ray Serve then starts another replica."""
        status = self._engine.status()
        if status.state in ("failed", "closed"):
            raise RuntimeError(status.detail or f"The engine is {status.state}.")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


class _Named:
    """ASGI middleware that tells which replica answered."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_name(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA_HEADER] = self._name
            await send(message)

        await self._app(scope, receive, send_with_name)


def build(options: Options) -> serve.Application:
    """Give the application that `serve run` runs."""
    deployment: Any = Replica
    return deployment.options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=max(options.min_replicas, options.max_replicas),
            target_ongoing_requests=options.target_ongoing_requests,
        ),
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
    ).bind(options)
