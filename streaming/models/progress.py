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
        """Say it in words: `Loading the model · 42 %`, `Fetching the model · 39 of 93 MB`."""
        words = _STAGES.get(self.stage, "Loading the model")
        if not self.total:
            return words
        if self.stage == "download":
            return f"{words} · {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        return f"{words} · {100 * self.done // self.total} %"

    @property
    def part(self) -> float | None:
        """How much of the step is done, from 0 to 1; None while its size is not known."""
        return min(1.0, self.done / self.total) if self.total else None


_STAGES = {
    "waiting": "Waiting for another process to prepare the model",
    "download": "Fetching the model",
    "conversion": "Converting the model",
    "weights": "Loading the model",
}

ProgressCallback = Callable[[LoadProgress], None]


def ignore_progress(_: LoadProgress) -> None:
    """Take a `LoadProgress` and do nothing: for callers that did not ask."""
