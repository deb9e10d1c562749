"""What can be refused before the seconds that the heavy imports take."""

from streaming.models.sources import find_model
from streaming.server.address import require_free, require_reachable
from streaming.settings import Settings


def check(settings: Settings) -> None:
    """Raise BrookError where the address is taken, or the model or the remote server cannot be had."""
    require_free(settings.host, settings.port)
    if settings.base_url is not None:
        require_reachable(settings.base_url)
        return
    for model in settings.models or (None,):
        find_model(model, offline=settings.offline, cache_dir=settings.cache_dir).check()
