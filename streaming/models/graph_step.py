"""A decoding step as one CUDA graph, for any model that can be run without a look at its values.

On a GPU the step of a small model is the time that Python takes to launch its kernels one by one; a graph launches them
all at once. It is captured from the model's own forward, over transformers' StaticCache, in a fraction of a second;
torch.compile's graphs, which generate() makes for a static cache, take tens of seconds first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from transformers import DynamicCache, StaticCache

LEAST_CAPACITY = 1024
"""Positions of the smallest graph. Attention reads the whole capacity, which is doubled when it is full."""

Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay, Callable[[], None]], Replay]

_steps: WeakKeyDictionary[Any, "GraphStep | None"] = WeakKeyDictionary()


def graph_step_of(model: Any) -> "GraphStep | None":
    """Return the captured step of a model, made once, or None where the model is not of a kind that allows it."""
    if model not in _steps:
        # What transformers promises to compile without a break never waits for a value (transformers 5.23).
        suits = model.device.type == "cuda" and getattr(model, "_can_compile_fullgraph", False)
        _steps[model] = GraphStep(model) if suits else None
    return _steps[model]


def capture_cuda(forward: Replay, rewind: Callable[[], None]) -> Replay:
    """Capture `forward` as a CUDA graph and return what replays it; `rewind` undoes the run that warms up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = forward()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


class GraphStep:
    """The captured step of one model. Not thread-safe."""

    guess_sizes = (0,)
    """How many guessed tokens to read with a newest one: the graph takes one token."""
    reads_prompts = False
    """The model itself reads the prompt."""

    def __init__(self, model: Any, capture: Capture = capture_cuda) -> None:
        self._model = proxy(model)  # the model owns this object through a weak dictionary
        self._capture = capture
        self._id = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._cache: Any = None
        self._replay: Replay | None = None
        self._capacity = 0
        self._length = 0

    @contextmanager
    def continuing(self, cache: DynamicCache) -> Iterator[Callable[[int], torch.Tensor]]:
        """Give a function that appends a token to a cache of one sequence and returns the logits after it.

        The cache is whole again when the context ends. Logits are float32 `(1, vocab)` and hold until the next call.
        """
        self._take(cache.layers, cache.get_seq_length())
        try:
            yield self._read
        finally:
            layers: list[Any] = cache.layers
            for layer, static in zip(layers, self._cache.layers, strict=True):
                layer.keys = static.keys[:, :, : self._length].clone()
                layer.values = static.values[:, :, : self._length].clone()

    def _read(self, token_id: int) -> torch.Tensor:
        if self._length == self._capacity:
            self._take(self._cache.layers, self._length)
        self._id.fill_(token_id)
        self._position.fill_(self._length)
        if self._replay is None:
            self._replay = self._capture(self._forward, self._rewind)
        logits = self._replay()
        self._length += 1
        return logits

    def _take(self, layers: list[Any], length: int) -> None:
        """Fill the static cache from `layers`; a larger one, with a graph of its own, where they do not fit."""
        if self._cache is None or length >= self._capacity:
            capacity = max(LEAST_CAPACITY, 2 * self._capacity, 2 ** (length + 1).bit_length())
            cache: Any = StaticCache(self._model.config, max_cache_len=capacity)
            for static, layer in zip(cache.layers, layers, strict=True):
                static.lazy_initialization(layer.keys, layer.values)
            # Memory may have run out before this: then all is as it was.
            self._cache, self._capacity, self._replay = cache, capacity, None
        self._length = length
        for static, layer in zip(self._cache.layers, layers, strict=True):
            static.keys[:, :, :length] = layer.keys[:, :, :length]
            static.values[:, :, :length] = layer.values[:, :, :length]
        self._rewind()

    def _rewind(self) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._length)

    def _forward(self) -> torch.Tensor:
        is_read = torch.arange(self._capacity, device=self._position.device) <= self._position
        mask = torch.zeros(is_read.shape, dtype=self._model.dtype, device=is_read.device)
        mask = mask.masked_fill(~is_read, torch.finfo(mask.dtype).min)
        output = self._model(
            input_ids=self._id,
            position_ids=self._position,
            attention_mask=mask[:, None, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
