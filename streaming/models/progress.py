"""How far a model's loading has come: one value, and the functions that take it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One step of loading a model.

    `stage` is "waiting" (for another process that prepares the same model), "download" (`done` of `total` bytes),
    "conversion" or "weights" (of steps of any size). `total` is 0 while it is not known.
    """

    stage: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[LoadProgress], None]


def ignore_progress(_: LoadProgress) -> None:
    """Take a `LoadProgress` and do nothing: for callers that did not ask."""
