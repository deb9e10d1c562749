"""A model's parameters, made of the tensors of a GGUF file.

Which tensor is which parameter, and what llama.cpp's converter did to its values, transformers knows, and undoes on
floats. Here, what only moves whole rows is undone on the packed blocks, so that they keep their exact values; for
anything else one parameter at a time is unpacked.

Relied on, and stated by tests/contract/test_gguf_reading.py: transformers 5.23 describes some architectures by
`WeightTransform`s (`integrations.gguf`), and all others by a `TensorProcessor` (`modeling_gguf_pytorch_utils`) beside
the names in the package `gguf`.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import gguf
import numpy as np
import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from streaming.models.gguf import GgufFile, unpack
from streaming.models.packing import EXACT, FOUR_BITS, PACKABLE, TILE_ROWS, pack_ggml, packed_shape, quantize

Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""From the values of a parameter's tensors to those of the parameter."""

_F32 = int(gguf.GGMLQuantizationType.F32)

# Matrices are packed in pieces of so many blocks of 16 x 32 values: whole K-blocks (8), and few enough bytes that
# torch stays in the calling thread (streaming.models.gguf.CHUNK_VALUES).
_PIECE_BLOCKS = 56


class GgufParameter:
    """A parameter of a model, which is made when it is asked for; `shape` is that of its values."""

    def __init__(self, file: GgufFile, sources: Sequence[str], combine: Combine, shape: torch.Size) -> None:
        self.shape = shape
        self._file = file
        self._sources = sources
        self._combine = combine
        self._first = file.tensors[sources[0]]

    @property
    def packs_exactly(self) -> bool:
        """Whether `pack` keeps the exact values."""
        return self._row_order is not None and self._first.ggml_type in EXACT

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """The shape of what `pack` fills: of 4 bits where the file's are, else of 8."""
        bits = 4 if self._row_order is not None and self._first.ggml_type in FOUR_BITS else 8
        n_rows, n_columns = self.shape
        return packed_shape(n_rows, n_columns, bits)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values."""
        if self._row_order is None:
            return self._combined().to(dtype)
        return unpack(self._moved(), self._first.ggml_type, dtype)

    def pack(self, out: torch.Tensor) -> torch.Tensor:
        """Fill a packed matrix and return it; types that are not PACKABLE are rounded to 8 bits."""
        if self._row_order is None:
            blocks, ggml_type = self._combined().contiguous().view(torch.uint8), _F32
        else:
            blocks, ggml_type = self._moved(), self._first.ggml_type
        n_groups = out.shape[1]
        n_tiles, width = max(1, _PIECE_BLOCKS // n_groups), min(_PIECE_BLOCKS, n_groups)
        n_bytes = blocks.shape[1] * width // n_groups
        for tiles, rows in zip(out.split(n_tiles), blocks.split(n_tiles * TILE_ROWS), strict=True):
            for packed, piece in zip(tiles.split(width, dim=1), rows.split(n_bytes, dim=1), strict=True):
                packed.copy_(_pack(piece, ggml_type))
        return out

    @cached_property
    def _row_order(self) -> torch.Tensor | slice | None:
        """Where the rows of the one tensor go; None where more happens to it than that.

        Found by giving, instead of values, the number of each one's row, and of its column.
        """
        shape = self._first.shape
        if len(self._sources) > 1 or shape != self.shape:
            return None
        numbers = torch.arange(shape[0], dtype=torch.int32).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        order = self._combine([numbers])
        if order is numbers:
            return slice(None)
        columns = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
        if len(shape) != 2 or order.shape != shape or not torch.equal(self._combine([columns]), columns):
            return None
        return order[:, 0].long() if torch.equal(order, order[:, :1].expand(shape)) else None

    def _moved(self) -> torch.Tensor:
        """Return the blocks of the one tensor, with its rows where they go."""
        return self._file.read(self._sources[0])[self._row_order]

    def _combined(self) -> torch.Tensor:
        """Return the values, float32, that all tensors together make."""
        types = [self._file.tensors[name].ggml_type for name in self._sources]
        blocks = [self._file.read(name) for name in self._sources]
        values = self._combine([unpack(*tensor, torch.float32) for tensor in zip(blocks, types, strict=True)])
        if values.shape != self.shape:
            name, shape, wanted = self._sources[0], tuple(values.shape), tuple(self.shape)
            raise ValueError(f"{name} is of shape {shape} where {wanted} is wanted; choose another file")
        return values


def find_parameters(file: GgufFile, model: Any) -> dict[str, GgufParameter]:
    """Find a model's parameters, by their names, in a file; what is not there is left out.

    `model` may be on the meta device; no linear layer of it is packed yet.
    """
    find = _find_by_transforms if is_gguf_arch_supported(file.architecture) else _find_by_processor
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return {
        name: GgufParameter(file, sources, combine, shapes[name])
        for name, (sources, combine) in find(file, model).items()
        if name in shapes
    }


def _find_by_transforms(file: GgufFile, model: Any) -> dict[str, tuple[list[str], Combine]]:
    transforms = get_gguf_conversion_mapping(file.architecture, model.config)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for source in file.tensors:
        name, pattern = rename_source_key(source, renamings, converters)
        sources[name].append((source, pattern))

    def convert(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        converter: Any = copy.deepcopy(by_pattern.get(sources[name][0][1] or ""))
        if converter is None:
            return values[0]
        for (source, pattern), value in zip(sources[name], values, strict=True):
            converter.add_tensor(name, source, pattern, value)
        made: torch.Tensor = converter.convert(name)[name]
        return made

    return {name: ([source for source, _ in found], partial(convert, name)) for name, found in sources.items()}


def _find_by_processor(file: GgufFile, model: Any) -> dict[str, tuple[list[str], Combine]]:
    kind: Any = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = _names(file.architecture, model, processor)
    sources = defaultdict(list)
    for source in file.tensors:
        name = names.get(source) or names.get(source.removesuffix(".weight"))  # experts are named without it
        if name is not None:
            sources[name].append(source)

    def process(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        made: dict[str, Any] = {"tensors": {}}  # where a processor puts what it makes of several tensors
        for source, value in zip(sources[name], values, strict=True):
            weights = value.numpy()
            result = processor.process(weights, source, tensor_key_mapping=names, parsed_parameters=made)
            if result.name is not None:
                return value if result.weights is weights else torch.from_numpy(np.ascontiguousarray(result.weights))
        combined: torch.Tensor = made["tensors"][name]
        return combined

    return {name: (sources[name], partial(process, name)) for name in sources}


def _names(architecture: str, model: Any, processor: TensorProcessor) -> dict[str, str]:
    """Map a file's names to the model's, as `get_gguf_hf_weights_map` of transformers does, which takes 8 s."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in map(processor.preprocess_name, model.state_dict()):
        stem, suffix, _ = re.split(r"(\.weight|\.bias|)$", name, maxsplit=1)
        found = known.get_name(stem) or known.get_name(stem.removeprefix(f"{model.base_model_prefix}."))
        if found is not None:
            names.setdefault(found + suffix, name)
        else:
            processor.perform_fallback_tensor_mapping(names, suffix, "", name)
    return names


def _pack(blocks: torch.Tensor, ggml_type: int) -> torch.Tensor:
    if ggml_type in PACKABLE:
        return pack_ggml(blocks, ggml_type)
    return quantize(unpack(blocks, ggml_type, torch.float32), bits=8)
