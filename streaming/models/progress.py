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

    def __str__(self) -> str:
        """Say it in words: `Fetching the model · 42 %`."""
        words = _STAGES.get(self.stage, "Loading the model")
        return f"{words} · {100 * self.done // self.total} %" if self.total else words


_STAGES = {
    "waiting": "Waiting for another process to prepare the model",
    "download": "Fetching the model",
    "conversion": "Converting the model",
    "weights": "Loading the model",
}

ProgressCallback = Callable[[LoadProgress], None]


def ignore_progress(_: LoadProgress) -> None:
    """Take a `LoadProgress` and do nothing: for callers that did not ask."""
