"""Brook: stream a Hugging Face model's `generate()` to people, token by token.

The names load when they are first used: `python -m streaming --help` need not wait for torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# libgomp reads it when torch loads, so it only helps where Brook is imported first, as in its own app. Its threads
# spin for 300,000 rounds (some 15 ms) when they have nothing to do, in the way of the threads that serve the page:
# with 1,000 decoding is 15 to 20 % faster. What the person has set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from streaming.engine.base import Generation as Generation
    from streaming.engine.base import GenerationRequest as GenerationRequest
    from streaming.engine.load import load_engine as load_engine
    from streaming.errors import BrookError as BrookError
    from streaming.events import FinishEvent as FinishEvent
    from streaming.events import TokenEvent as TokenEvent
    from streaming.streamers import CallbackStreamer as CallbackStreamer
    from streaming.streamers import ConsoleStreamer as ConsoleStreamer
    from streaming.streamers import FileStreamer as FileStreamer
    from streaming.streamers import IteratorStreamer as IteratorStreamer
    from streaming.streamers import SocketStreamer as SocketStreamer
    from streaming.streamers import SSEStreamer as SSEStreamer
    from streaming.streamers import TeeStreamer as TeeStreamer

_HOMES = {
    "BrookError": "streaming.errors",
    "CallbackStreamer": "streaming.streamers",
    "ConsoleStreamer": "streaming.streamers",
    "FileStreamer": "streaming.streamers",
    "FinishEvent": "streaming.events",
    "Generation": "streaming.engine.base",
    "GenerationRequest": "streaming.engine.base",
    "IteratorStreamer": "streaming.streamers",
    "SSEStreamer": "streaming.streamers",
    "SocketStreamer": "streaming.streamers",
    "TeeStreamer": "streaming.streamers",
    "TokenEvent": "streaming.events",
    "load_engine": "streaming.engine.load",
}

__all__ = sorted(_HOMES)  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
