"""Loading a model and its tokenizer, from files on this machine, which `sources.py` brings here.

Code that comes with a model is not run unless the caller trusts it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from streaming.errors import ModelDamaged, ModelTooLarge, ModelUnavailable, NotACausalLM
from streaming.models import converted, smollm
from streaming.models.assembling import assemble, build_skeleton, lazy_weights
from streaming.models.device import choose_device, choose_dtype, choose_int4, free_bytes, require_memory
from streaming.models.embedded import DEFAULT_MODEL
from streaming.models.gguf import GgufFile
from streaming.models.gguf_weights import GgufParameter, find_parameters
from streaming.models.llama3_rope import stretch_frequencies
from streaming.models.progress import LoadProgress as LoadProgress
from streaming.models.progress import ProgressCallback, ignore_progress
from streaming.models.sources import find_model
from streaming.settings import DTYPES, QUANTIZATIONS

# How the classes are called whose heads continue text; "forconditionalgeneration" is that of models which also see.
_CAUSAL_ENDINGS = ("forcausallm", "lmheadmodel", "forconditionalgeneration")

MakeRoom = Callable[[int, int], None]
"""Takes the bytes that a model needs and those that are free, before its weights are touched; may free some, or raise
ModelTooLarge."""


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


@dataclass(frozen=True, slots=True)
class _Form:
    """How a model's weights will be held.

    `skeleton` is the model as it will be, on the meta device, or None where only its files say how it is quantized;
    `parameters` are those of a GGUF file; what is not packed is in `dtype`.
    """

    skeleton: Any
    parameters: Mapping[str, GgufParameter]
    int4: bool
    dtype: torch.dtype
    device: torch.device


def load_model(
    model: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "auto",
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: ProgressCallback | None = None,
    make_room: MakeRoom | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load `model`: None for the default one, a hub id, a local folder, or the path of a `.gguf` file.

    `device`, `dtype` and `quantize` are as in `streaming.settings`. `cache_dir` is for the converted default model
    (by default the system's cache folder for "brook"); models from the hub stay where huggingface_hub keeps them.
    `progress` is called in this thread and, while a model comes from the hub, in the hub's threads. With
    `trust_remote_code`, code that comes with the model is run.

    Raises ModelUnavailable: one of its subclasses, whose message is one sentence for the person who chose the model.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    report = progress or ignore_progress
    torch_device = choose_device(device)
    source = find_model(model, offline=offline, cache_dir=cache_dir, progress=report, with_code=trust_remote_code)
    name = model or DEFAULT_MODEL.model_id
    with _explaining(name):
        files = _open(source.fetch(weights=False))
        config = _load_config(files, name, trust_remote_code)
        form = _choose_form(files, config, quantize, dtype, torch_device, trust_remote_code)
        tokenizer = _load_tokenizer(files, trust_remote_code)
        n_bytes = _count_bytes(form) if form.skeleton else _count_file_bytes(source.fetch(weights=True))
        if make_room is not None:
            make_room(n_bytes, free_bytes(torch_device))
        require_memory(n_bytes, torch_device, name)
        if not isinstance(files, GgufFile):
            files = source.fetch(weights=True)
        loaded = _load_weights(files, config, form, report, trust_remote_code)
        if form.int4:
            _tune_threads(loaded)
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
    source = find_model(model, offline=offline, cache_dir=cache_dir, progress=progress or ignore_progress)
    with _explaining(model or DEFAULT_MODEL.model_id):
        return _load_tokenizer(_open(source.fetch(weights=False)), trust_remote_code=False)


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


def _open(files: Path) -> Path | GgufFile:
    return files if files.is_dir() else GgufFile.open(files)


def _load_config(files: Path | GgufFile, name: str, trust_remote_code: bool) -> Any:
    if isinstance(files, GgufFile):
        if smollm.is_smollm(files):
            return smollm.build_config(files)
    elif not (files / "config.json").is_file():
        raise ModelDamaged(f"{name} cannot be loaded: there is no config.json in {files}.")
    try:
        config = transformers.AutoConfig.from_pretrained(**_arguments(files, trust_remote_code))
    except ValueError as error:
        raise NotACausalLM(
            f"{name} is of a kind that transformers {transformers.__version__} does not know by itself, and code that "
            f"comes with a model is not run without --trust-remote-code; choose another model."
        ) from error
    architectures = [architecture.lower() for architecture in config.architectures or ()]
    is_causal = any(architecture.endswith(_CAUSAL_ENDINGS) for architecture in architectures) or not architectures
    has_class = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or (
        trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    )
    if config.is_encoder_decoder or not is_causal or not has_class:
        kind = ", ".join(config.architectures or [config.model_type])
        raise NotACausalLM(f"{name} ({kind}) does not continue text token by token; choose a causal language model.")
    return stretch_frequencies(config, files) if isinstance(files, GgufFile) else config


def _load_tokenizer(files: Path | GgufFile, trust_remote_code: bool) -> Any:
    if isinstance(files, GgufFile) and smollm.is_smollm(files):
        return smollm.build_tokenizer(files)
    return transformers.AutoTokenizer.from_pretrained(**_arguments(files, trust_remote_code))


def _choose_form(
    files: Path | GgufFile, config: Any, quantize: str, dtype: str, device: torch.device, trust_remote_code: bool
) -> _Form:
    """Choose how to hold a model's weights; raise ModelUnavailable where they cannot be as they must."""
    is_quantized = getattr(config, "quantization_config", None) is not None
    int4 = choose_int4(quantize, dtype, device, is_quantized=is_quantized)
    torch_dtype = choose_dtype(dtype, device)
    if is_quantized:
        return _Form(None, {}, False, torch_dtype, device)
    skeleton = build_skeleton(config, trust_remote_code)
    parameters = find_parameters(files, skeleton) if isinstance(files, GgufFile) else {}
    if int4 and _pack_skeleton(skeleton, parameters, must_pack=quantize == "int4"):
        return _Form(skeleton, parameters, True, torch.float32, device)
    return _Form(skeleton, parameters, False, torch_dtype, device)


def _pack_skeleton(skeleton: Any, parameters: Mapping[str, GgufParameter], must_pack: bool) -> bool:
    """Replace what loading will pack, with the shapes that it will have; return whether there is any.

    Raises ModelUnavailable if there must be.
    """
    from streaming.models.int4 import replace_linears

    try:
        replace_linears(skeleton)
    except ModelUnavailable:
        if must_pack:
            raise
        return False
    for name, packed in skeleton.named_parameters():
        if packed.dtype == torch.uint8 and name in parameters:
            packed.data = packed.new_empty(parameters[name].packed_shape)
    skeleton.tie_weights()
    return True


def _count_bytes(form: _Form) -> int:
    """Count the bytes that a model's weights will take."""
    parameters = form.skeleton.parameters()
    return sum(p.numel() * (form.dtype if p.is_floating_point() else p.dtype).itemsize for p in parameters)


def _count_file_bytes(files: Path) -> int:
    """Count the bytes of a model's weights as they lie on the disk."""
    paths = [files] if files.is_file() else [*files.glob("*.safetensors"), *files.glob("pytorch_model*.bin")]
    return sum(path.stat().st_size for path in paths)


def _load_weights(
    files: Path | GgufFile, config: Any, form: _Form, progress: ProgressCallback, trust_remote_code: bool
) -> Any:
    quantization = _quantization() if form.int4 else None
    arguments: dict[str, Any] = {"dtype": form.dtype, "device_map": {"": form.device}}
    if isinstance(files, Path) and not converted.is_converted(files):
        arguments |= _arguments(files, trust_remote_code) | {"quantization_config": quantization}
        return assemble(transformers.AutoModelForCausalLM, files, progress, **arguments)
    if quantization:  # the config says that weights come packed
        config.quantization_config = quantization.to_dict()
    arguments |= {"pretrained_model_name_or_path": None, "config": config}
    if isinstance(files, GgufFile):
        weights = lazy_weights(form.parameters, form.skeleton, form.dtype)
        return assemble(type(form.skeleton), files.path, progress, **arguments, state_dict=weights)
    tensors = converted.read_packed(files) if form.int4 else converted.read_weights(files, form.dtype, progress)
    arguments["generation_config"] = transformers.GenerationConfig.from_pretrained(files)
    # They are there: a bar would only flash up.
    return assemble(type(form.skeleton), files, ignore_progress, shows_bar=False, **arguments, state_dict=tensors)


def _quantization() -> Any:
    from streaming.models.int4 import Int4Config  # the kernels, which come with it, take a second to import

    return Int4Config()


@torch.no_grad()
def _tune_threads(model: Any) -> None:
    """Choose the thread count with which a model with packed weights writes a token fastest."""
    from streaming.models import llama_step, parallel

    step = llama_step.step_of(model)
    if step is None:
        parallel.tune_threads(lambda: model(torch.zeros(1, 1, dtype=torch.long), use_cache=False))
    else:
        parallel.tune_threads(lambda: step.read_on(transformers.DynamicCache(config=model.config), [0]))


def _arguments(files: Path | GgufFile, trust_remote_code: bool) -> dict[str, Any]:
    """Return how `from_pretrained` is called for `files`, with no network."""
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if isinstance(files, GgufFile):
        return {"pretrained_model_name_or_path": files.path.parent, "gguf_file": files.path.name, **arguments}
    return {"pretrained_model_name_or_path": files, **arguments}
