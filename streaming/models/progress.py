"""How far a model's loading has come: one value, and the functions that take it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Weight = TypeVar("Weight")

_LAYER = re.compile(r".*?\.\d+(?=\.)")  # model.layers.12, transformer.h.12; experts in it have later numbers


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One step of loading a model.

    `stage` is "waiting" (for another process that prepares the same model), "download" (`done` of `total` bytes),
    "conversion" (of steps of any size) or "weights" (of layers). `total` is 0 while it is not known.
    """

    stage: str
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        """Say it in words: `Loading the model · layer 12 of 30`, `Fetching the model · 39 of 93 MB`."""
        words = _STAGES.get(self.stage, "Loading the model")
        if not self.total:
            return words
        if self.stage == "download":
            return f"{words} · {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        if self.stage == "weights":
            return f"{words} · layer {self.done} of {self.total}"
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


def telling_layers(
    weights: Iterable[tuple[str, Weight]], names: Iterable[str], progress: ProgressCallback
) -> Iterator[tuple[str, Weight]]:
    """Go through weights, which have `names`, in any order, and tell of each layer once all that is in it was done."""
    left = Counter(layer[0] for name in names if (layer := _LAYER.match(name)))
    n_layers = len(left)
    for name, weight in weights:
        yield name, weight
        layer = _LAYER.match(name)
        if layer:
            left[layer[0]] -= 1
            if not left[layer[0]]:
                del left[layer[0]]
                progress(LoadProgress("weights", n_layers - len(left), n_layers))


def ignore_progress(_: LoadProgress) -> None:
    """Take a `LoadProgress` and do nothing: for callers that did not ask."""
