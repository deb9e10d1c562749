"""The converted copy of a GGUF model: a transformers folder whose weights lie as the kernels want them.

All is as transformers saves it (config, generation config, tokenizer, chat template), but for the weights: matrices
are packed (streaming.models.packing) without any rounding, so the folder is as small as the file and is used by
mapping it into memory; for a float dtype they are unpacked to the file's exact values, rounded once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from streaming.models.gguf import SmolGguf
from streaming.models.packing import PACKABLE, TILE_ROWS, pack_ggml, unpack
from streaming.models.progress import ProgressCallback, ignore_progress, telling_layers

_WEIGHTS_FILE = "packed.safetensors"

# torch runs an operation on up to 32,768 values in the calling thread (at::internal::GRAIN_SIZE). Larger ones meet
# all threads at a barrier at every step: no faster here, and 10 to 50 times as long while something else computes.
_CHUNK_VALUES = 1 << 15


def convert(gguf: SmolGguf, folder: Path, sampling: Mapping[str, Any]) -> None:
    """Write a model into the empty `folder`, with the generation defaults `sampling`.

    Raises ValueError when it has weights that cannot be packed without loss.
    """
    gguf.build_config().save_pretrained(folder)
    gguf.build_generation_config(**sampling).save_pretrained(folder)
    gguf.build_tokenizer().save_pretrained(folder)
    n_rows: dict[str, str] = {}  # of packed weights, whose last tile may be padded
    weights = {}
    for name, (blocks, ggml_type) in gguf.read_blocks().items():
        if ggml_type in PACKABLE:
            weights[name], n_rows[name] = pack_ggml(blocks, ggml_type), str(len(blocks))
        elif blocks.dim() == 1:
            weights[name] = blocks.float()
        else:
            raise ValueError(f"{name} is of GGML type {ggml_type}, which cannot be packed without loss")
    save_file(weights, folder / _WEIGHTS_FILE, metadata=n_rows)


def is_converted(folder: Path) -> bool:
    """Whether `convert` has written this folder."""
    return (folder / _WEIGHTS_FILE).is_file()


def read_packed(folder: Path) -> dict[str, torch.Tensor]:
    """Map the weights of a converted folder into memory: packed matrices, and vectors in float32."""
    with safe_open(folder / _WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_weights(
    folder: Path, dtype: torch.dtype, progress: ProgressCallback = ignore_progress
) -> dict[str, torch.Tensor]:
    """Read the weights of a converted folder in `dtype`: the exact values, rounded once."""
    weights = {}
    with safe_open(folder / _WEIGHTS_FILE, framework="pt") as file:
        n_rows = file.metadata()
        names = list(file.keys())
        for name, weight in telling_layers(((name, file.get_tensor(name)) for name in names), names, progress):
            weights[name] = _unpack(weight, int(n_rows[name]), dtype) if name in n_rows else weight.to(dtype)
    return weights


def _unpack(packed: torch.Tensor, n_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack some tiles at a time."""
    tile_values = unpack(packed[:1], TILE_ROWS).numel()
    chunks = packed.split(max(1, _CHUNK_VALUES // tile_values))
    values = torch.empty(len(packed) * TILE_ROWS, tile_values // TILE_ROWS, dtype=dtype)
    for chunk, rows in zip(chunks, values.split(len(chunks[0]) * TILE_ROWS), strict=True):
        rows.copy_(unpack(chunk, len(rows)))
    return values[:n_rows]
