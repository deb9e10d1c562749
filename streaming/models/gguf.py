"""GGUF files as they lie on the disk: what they say about themselves, and their tensors in packed blocks.

The package `gguf` says what types of blocks there are and unpacks them. Its reader takes 5 s for a vocabulary of
49,000 tokens, and transformers' own (5.23, `integrations.gguf.reader`) refuses types of blocks that it cannot unpack,
Q5_0 among them. So files are read here, which takes 0.1 s.

Source: ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

# torch runs an operation on up to 32,768 values in the calling thread (at::internal::GRAIN_SIZE). Larger ones meet
# all threads at a barrier at every step: no faster here, and 10 to 50 times as long while something else computes.
CHUNK_VALUES = 1 << 15

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_CUT_SHORT = "the file is cut short; fetch it again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file: its values' shape, rows first as in torch, and where its blocks lie."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file, of which the tensors are not read yet."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read what the file says about itself. Raises ValueError if it is none, or a part of one."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return cls(path, *_read_header(data))
            except struct.error as error:
                raise ValueError(_CUT_SHORT) from error

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor's blocks, uint8: `(rows, bytes a row)` of a matrix. Plain values are blocks of one."""
        tensor = self.tensors[name]
        blocks = np.fromfile(self.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        return torch.from_numpy(blocks.reshape(*tensor.shape[:-1], -1))


def unpack(blocks: torch.Tensor, ggml_type: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack blocks, uint8 `(..., bytes a row)`, into values `(..., columns)`."""
    kind = gguf.GGMLQuantizationType(ggml_type)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    flat = blocks.numpy().reshape(1, -1)
    n_blocks = flat.size // block_bytes
    values = torch.empty(n_blocks * block_values, dtype=dtype)
    step = CHUNK_VALUES // block_values
    for start in range(0, n_blocks, step):
        chunk = gguf.quants.dequantize(flat[:, start * block_bytes : (start + step) * block_bytes], kind)
        values[start * block_values : (start + step) * block_values] = torch.from_numpy(chunk[0])
    return values.view(*blocks.shape[:-1], -1)


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    header = _Header(data)
    if data[:4] != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("it is not a GGUF file of version 2 or 3")
    n_tensors, n_keys = header.number("Q"), header.number("Q")
    metadata = {header.string(): header.value(header.number("I")) for _ in range(n_keys)}
    entries = [header.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-header.at // alignment) * alignment
    tensors = {}
    for name, shape, ggml_type, offset in entries:
        if ggml_type not in gguf.GGML_QUANT_SIZES:
            raise ValueError(f"GGML type {ggml_type} of {name} is not known; choose a file of another quantization")
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type)]
        n_bytes = math.prod(shape) // block_values * block_bytes
        if start + offset + n_bytes > len(data):
            raise ValueError(_CUT_SHORT)
        tensors[name] = GgufTensor(shape, ggml_type, start + offset, n_bytes)
    return metadata, tensors


class _Header:
    """Reads one thing after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 4

    def number(self, code: str) -> Any:
        (number,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return number

    def string(self) -> str:
        n_bytes = self.number("Q")
        self.at += n_bytes
        return self._data[self.at - n_bytes : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, n_elements = self.number("I"), self.number("Q")
            return [self.value(element) for _ in range(n_elements)]
        if kind not in _NUMBERS:
            raise ValueError(f"a value of kind {kind} is not known")
        return self.number(_NUMBERS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return a tensor's name, shape, ggml type and offset."""
        name = self.string()
        shape = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
        return name, shape, self.number("I"), self.number("Q")
