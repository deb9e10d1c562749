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

from streaming.models import smollm
from streaming.models.assembling import build_skeleton
from streaming.models.gguf import CHUNK_VALUES, GgufFile
from streaming.models.gguf_weights import find_parameters
from streaming.models.packing import TILE_ROWS, unpack
from streaming.models.progress import ProgressCallback, ignore_progress, telling_layers

_WEIGHTS_FILE = "packed.safetensors"


def convert(file: GgufFile, folder: Path, sampling: Mapping[str, Any]) -> None:
    """Write a model of SmolLM's kind into the empty `folder`, with the generation defaults `sampling`.

    Raises ValueError when it has weights that cannot be packed without loss.
    """
    config = smollm.build_config(file)
    config.save_pretrained(folder)
    smollm.build_generation_config(file, **sampling).save_pretrained(folder)
    smollm.build_tokenizer(file).save_pretrained(folder)
    n_rows: dict[str, str] = {}  # of packed weights, whose last tile may be padded
    weights = {}
    for name, parameter in find_parameters(file, build_skeleton(config, trust_remote_code=False)).items():
        if len(parameter.shape) == 1:
            weights[name] = parameter.read(torch.float32)
        elif parameter.packs_exactly:
            weights[name] = parameter.pack(torch.empty(parameter.packed_shape, dtype=torch.uint8))
            n_rows[name] = str(parameter.shape[0])
        else:
            raise ValueError(f"{name} cannot be packed without loss")
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
    chunks = packed.split(max(1, CHUNK_VALUES // tile_values))
    values = torch.empty(len(packed) * TILE_ROWS, tile_values // TILE_ROWS, dtype=dtype)
    for chunk, rows in zip(chunks, values.split(len(chunks[0]) * TILE_ROWS), strict=True):
        rows.copy_(unpack(chunk, len(rows)))
    return values[:n_rows]
