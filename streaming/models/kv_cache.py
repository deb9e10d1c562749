"""A key-value cache that grows in blocks and can be written in place."""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

BLOCK_TOKENS = 256


class GrowingLayer(DynamicLayer):
    """A DynamicLayer (transformers 5.23) with room for more positions behind `keys` and `values`.

    DynamicLayer copies everything at every token; here a token costs its own bytes, and once in
    BLOCK_TOKENS a copy. `keys` and `values` are `(batch, heads, length, head_dim)` views of the rooms, which may hold
    another dtype than the model computes in: `update` takes and returns the model's.
    """

    def __init__(self, room_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.room_dtype = room_dtype
        self.key_room: torch.Tensor | None = None
        self.value_room: torch.Tensor | None = None
        self.length = 0
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.key_room is None else self.key_room[:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self.key_room, self.length = keys, 0 if keys is None else keys.shape[-2]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.value_room is None else self.value_room[:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self.value_room = values

    @property
    def capacity(self) -> int:
        """How many positions fit without growing."""
        return 0 if self.key_room is None else self.key_room.shape[-2]

    def copy_beginning(self, length: int) -> "GrowingLayer":
        """Copy the first `length` positions, with room for more, and not all the room that there is."""
        twin = copy.copy(self)
        if self.is_initialized:
            twin.length = length
            twin.key_room, twin.value_room = (
                _grown(room, length, _round_up(length + 1)) for room in (self.key_room, self.value_room)
            )
        return twin

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = self.room_dtype or key_states.dtype, key_states.device
        self.keys, self.values = (states[:, :, :0].to(self.dtype) for states in (key_states, value_states))
        self.is_initialized = True

    def reserve(self, length: int) -> None:
        """Make room for `length` positions, each head's in one piece."""
        rooms = (self.key_room, self.value_room)
        if length <= self.capacity and all(room is not None and room.is_contiguous() for room in rooms):
            return
        self.key_room, self.value_room = (_grown(room, self.length, _round_up(length)) for room in rooms)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        self.reserve(end)
        assert self.key_room is not None
        assert self.value_room is not None
        self.key_room[:, :, start:end] = key_states
        self.value_room[:, :, start:end] = value_states
        self.length = end
        return self.key_room[:, :, :end].to(key_states.dtype), self.value_room[:, :, :end].to(value_states.dtype)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions; the room stays."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes 0 or a negative number of tokens, not {tokens_to_remove}.")
        self.length = max(0, self.length + tokens_to_remove)


def is_continuable(cache: Any) -> bool:
    """Whether `make_growing` can take this cache: a DynamicCache with layers, not offloaded, of plain attention."""
    return (
        isinstance(cache, DynamicCache)
        and bool(cache.layers)  # one made without a model's config gets them as the model calls
        and not cache.offloading
        and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)
    )


def copy_beginning(cache: Cache, length: int) -> Cache:
    """Copy the first `length` positions of a cache that can be cut, and where it is continuable nothing else."""
    if not is_continuable(cache):
        twin = copy.deepcopy(cache)
        twin.crop(length - cache.get_seq_length())
        return twin
    twin = copy.copy(cache)
    twin.layers = [_copy_layer(layer, length) for layer in cache.layers]
    return twin


def _copy_layer(layer: Any, length: int) -> Any:
    if isinstance(layer, GrowingLayer):
        return layer.copy_beginning(length)
    twin = copy.copy(layer)
    if layer.is_initialized:
        twin.keys, twin.values = (states[..., :length, :].clone() for states in (layer.keys, layer.values))
    return twin


def make_growing(cache: DynamicCache, room_dtype: torch.dtype) -> list[GrowingLayer]:
    """Turn the plain layers of a cache, in place, into growing ones of `room_dtype` and return them."""
    growing = []
    layers: list[Any] = cache.layers
    for layer in layers:
        grown = layer if isinstance(layer, GrowingLayer) else GrowingLayer(room_dtype)
        if grown is not layer and layer.get_seq_length():
            grown.update(layer.keys, layer.values)
        growing.append(grown)
    cache.layers = list(growing)
    return growing


def _round_up(length: int) -> int:
    return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


def _grown(room: torch.Tensor | None, length: int, capacity: int) -> torch.Tensor:
    assert room is not None
    batch, heads, _, head_dim = room.shape
    grown = room.new_empty(batch, heads, capacity, head_dim)
    grown[:, :, :length] = room[:, :, :length]
    return grown
