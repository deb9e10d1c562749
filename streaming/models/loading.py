"""Loading a model and its tokenizer: the only caller of `from_pretrained`.

A model is first found (the default one, a folder, a `.gguf` file, a name on the hub) and then always loaded from
files on this machine. Code that comes with a model is never run.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import platformdirs
import torch
import transformers

from streaming.errors import (
    DefaultModelUnavailable,
    ModelDamaged,
    ModelNotFound,
    ModelTooLarge,
    ModelUnavailable,
    NotACausalLM,
)
from streaming.models.device import choose_device, choose_dtype, require_memory
from streaming.models.embedded import DEFAULT_MODEL, prepare_embedded_model
from streaming.models.gguf import BLOCKS_FILE, SmolGguf, read_weights
from streaming.models.hub import HubModel
from streaming.models.progress import LoadProgress as LoadProgress
from streaming.models.progress import ProgressCallback, ignore_progress
from streaming.settings import QUANTIZATIONS

# How the classes are called whose heads continue text; "forconditionalgeneration" is that of models which also see.
_CAUSAL_ENDINGS = ("forcausallm", "lmheadmodel", "forconditionalgeneration")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer.

    `model_id` is what was asked for: a hub id or a path. `n_context` is the most tokens, prompt and reply together,
    that the model can attend to.
    """

    model: Any
    tokenizer: Any
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
    """Load `model`: None for the default one, a hub id, a local folder, or the path of a `.gguf` file.

    `device`, `dtype` and `quantize` are as in `streaming.settings`. `cache_dir` is for the converted default model
    (by default the system's cache folder for "brook"); models from the hub stay where huggingface_hub keeps them.
    `progress` is called in this thread and, while a model comes from the hub, in the hub's threads.

    Raises ModelUnavailable: one of its subclasses, whose message is one sentence for the person who chose the model.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r}")
    report = progress or ignore_progress
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    source = _find(model, offline, cache_dir, report)
    name = model or DEFAULT_MODEL.model_id
    with _explaining(name):
        files = _open(source.fetch(weights=False))
        config = _load_config(files, name)
        tokenizer = _load_tokenizer(files)
        require_memory(_count_bytes(config, torch_dtype), torch_device, name)
        files = _open(source.fetch(weights=True))
        loaded = _load_weights(files, config, torch_dtype, torch_device, report)
    return LoadedModel(
        model=loaded.eval(),
        tokenizer=tokenizer,
        model_id=name,
        n_context=getattr(config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length),
    )


def load_tokenizer(
    model: str | None = None,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Any:
    """Load only the tokenizer of `model`, which takes a fraction of the time; as `load_model` otherwise."""
    source = _find(model, offline, cache_dir, progress or ignore_progress)
    with _explaining(model or DEFAULT_MODEL.model_id):
        return _load_tokenizer(_open(source.fetch(weights=False)))


class _Source(Protocol):
    def fetch(self, *, weights: bool) -> Path:
        """Return the model's folder or file: with its weights, or with all that is small."""


@dataclass(frozen=True, slots=True)
class _Local:
    path: Path

    def fetch(self, *, weights: bool) -> Path:
        return self.path


def _find(model: str | None, offline: bool, cache_dir: Path | None, progress: ProgressCallback) -> _Source:
    if model is None:
        return _find_default(offline, cache_dir or platformdirs.user_cache_path("brook"), progress)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return _Local(path)
    if path.exists():
        raise ModelNotFound(f"{model} is neither a model's folder nor a .gguf file.")
    if path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise ModelNotFound(f"There is nothing at {model}; check the path.")
    return HubModel(model, offline=offline, progress=progress)


def _find_default(offline: bool, cache_dir: Path, progress: ProgressCallback) -> _Source:
    hub = HubModel(DEFAULT_MODEL.model_id, offline=offline, progress=progress)
    if "SPACE_ID" in os.environ:  # there the hub is next door, and the model preloaded
        try:
            return _Local(hub.fetch(weights=True))
        except ModelUnavailable:
            pass
    try:
        return _Local(prepare_embedded_model(cache_dir, offline=offline, progress=progress, before_fetch=hub.ask))
    except DefaultModelUnavailable as unavailable:
        try:
            return _Local(hub.fetch(weights=True))
        except ModelUnavailable:
            raise unavailable from None


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Turn whatever a library raises about a model's files into one sentence."""
    try:
        yield
    except ModelUnavailable:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelTooLarge(f"{name} does not fit the device's memory; choose a smaller model or dtype.") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelDamaged(f"{name} cannot be loaded: {reason}.") from error


def _open(files: Path) -> Path | SmolGguf:
    """Return a `.gguf` file that Brook reads by itself as such, and anything else as it is."""
    return files if files.is_dir() else SmolGguf.open(files) or files


def _load_config(files: Path | SmolGguf, name: str) -> Any:
    if isinstance(files, SmolGguf):
        return files.build_config()
    if files.is_dir() and not (files / "config.json").is_file():
        raise ModelDamaged(f"{name} cannot be loaded: there is no config.json in {files}.")
    try:
        config = transformers.AutoConfig.from_pretrained(**_arguments(files))
    except ValueError as error:
        raise NotACausalLM(
            f"{name} is of a kind that transformers {transformers.__version__} does not know by itself, and code that "
            f"comes with a model is never run; choose another model."
        ) from error
    architectures = [architecture.lower() for architecture in config.architectures or ()]
    is_causal = any(architecture.endswith(_CAUSAL_ENDINGS) for architecture in architectures) or not architectures
    if config.is_encoder_decoder or not is_causal or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = ", ".join(config.architectures or [config.model_type])
        raise NotACausalLM(f"{name} ({kind}) does not continue text token by token; choose a causal language model.")
    return config


def _load_tokenizer(files: Path | SmolGguf) -> Any:
    if isinstance(files, SmolGguf):
        return files.build_tokenizer()
    return transformers.AutoTokenizer.from_pretrained(**_arguments(files))


def _count_bytes(config: Any, dtype: torch.dtype) -> int:
    """Count the bytes that a model's weights take in `dtype`, from its shape alone."""
    if getattr(config, "quantization_config", None):  # it says for itself how its weights are held
        return 0
    with torch.device("meta"):
        skeleton: Any = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return dtype.itemsize * sum(parameter.numel() for parameter in skeleton.parameters())


def _load_weights(
    files: Path | SmolGguf, config: Any, dtype: torch.dtype, device: torch.device, progress: ProgressCallback
) -> Any:
    if isinstance(files, SmolGguf):
        return _assemble(config, files.read_weights(dtype, progress), files.build_generation_config()).to(device)
    if (files / BLOCKS_FILE).is_file():
        generation_config = transformers.GenerationConfig.from_pretrained(files)
        return _assemble(config, read_weights(files, dtype, progress), generation_config).to(device)
    progress(LoadProgress("weights", 0, 1))
    extra = {} if files.is_dir() else {"quantization_config": transformers.GgufConfig(dequantize=True)}
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        **_arguments(files), **extra, dtype=dtype, device_map={"": device}, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ModelDamaged(f"{files} lacks {len(report['missing_keys'])} of its weights; fetch the model again.")
    progress(LoadProgress("weights", 1, 1))
    return loaded


def _assemble(config: Any, weights: dict[str, torch.Tensor], generation_config: Any) -> Any:
    """Make a model of tensors that are already here, without a copy of them."""
    dtype = weights["model.norm.weight"].dtype
    return transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, generation_config=generation_config, dtype=dtype
    )


def _arguments(files: Path) -> dict[str, Any]:
    """Return how `from_pretrained` is called for `files`, with no network and none of the model's own code."""
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if files.is_dir():
        return {"pretrained_model_name_or_path": files, **arguments}
    return {"pretrained_model_name_or_path": files.parent, "gguf_file": files.name, **arguments}
