"""Loading a model and its tokenizer: the only caller of `from_pretrained`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers

from streaming.errors import DeviceUnavailable, ModelDamaged, ModelNotFound, ModelUnavailable
from streaming.models.embedded import DEFAULT_MODEL, prepare_embedded_model
from streaming.models.gguf import WEIGHTS_FILE, read_weights
from streaming.models.progress import LoadProgress as LoadProgress
from streaming.models.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer.

    `model_id` is the hub id or the path it came from; `n_context` is the most tokens, prompt and reply together,
    that it was trained to read.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    model_id: str
    n_context: int


def load_model(
    model: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "auto",
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: ProgressCallback | None = None,
) -> LoadedModel:
    """Load `model`: None for the default one, a hub id, a local folder, or the path of a `.gguf` file."""
    progress = progress or ignore_progress
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    folder = _locate(model, offline, cache_dir or platformdirs.user_cache_path("brook"), progress)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / WEIGHTS_FILE).is_file():
        loaded = _load_blocks(folder, torch_device, torch_dtype, progress)
    else:
        loaded = _load_folder(folder, torch_device, torch_dtype, progress)
    return LoadedModel(
        model=loaded.eval(),
        tokenizer=tokenizer,
        model_id=model or DEFAULT_MODEL.model_id,
        n_context=loaded.config.max_position_embeddings,
    )


def choose_device(device: str) -> torch.device:
    """Turn "auto" into the best device here (cuda, then mps, then cpu) and anything else into that device."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device(device)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not available.get(chosen.type, lambda: False)():
        raise DeviceUnavailable(f"This machine has no {device}; leave --device at auto or choose cpu.")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn "auto" into the fastest dtype of `device` and a name into that dtype."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    # Without these instructions a CPU computes bfloat16 by way of float32, and slower than in float32.
    has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _locate(model: str | None, offline: bool, cache_dir: Path, progress: ProgressCallback) -> Path:
    if model is None:
        return prepare_embedded_model(cache_dir, offline=offline, progress=progress)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ModelNotFound(f"There is no model folder {model}; check the path.")
    return folder


def _load_blocks(
    folder: Path, device: torch.device, dtype: torch.dtype, progress: ProgressCallback
) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM.from_pretrained(
        None,
        config=transformers.LlamaConfig.from_pretrained(folder),
        state_dict=read_weights(folder, dtype, progress),
        generation_config=transformers.GenerationConfig.from_pretrained(folder),
        dtype=dtype,
        attn_implementation="sdpa",
    ).to(device)


def _load_folder(
    folder: Path, device: torch.device, dtype: torch.dtype, progress: ProgressCallback
) -> transformers.PreTrainedModel:
    progress(LoadProgress("weights", 0, 1))
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except ModelUnavailable:
        raise
    except Exception as error:
        raise ModelDamaged(f"The model in {folder} cannot be loaded: {error}") from error
    progress(LoadProgress("weights", 1, 1))
    return loaded.to(device)
