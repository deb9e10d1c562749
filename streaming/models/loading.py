"""Loading a model and its tokenizer: the only caller of `from_pretrained`.

A model is always loaded from files on this machine, which `sources.py` brings here. Code that comes with a model is
not run unless the caller trusts it.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from streaming.errors import ModelDamaged, ModelTooLarge, ModelUnavailable, NotACausalLM
from streaming.models import converted
from streaming.models.device import choose_device, choose_dtype, choose_int4, free_bytes, require_memory
from streaming.models.embedded import DEFAULT_MODEL
from streaming.models.gguf import SmolGguf, unpack_blocks
from streaming.models.progress import LoadProgress as LoadProgress
from streaming.models.progress import ProgressCallback, ignore_progress, telling_layers
from streaming.models.sources import find_model
from streaming.settings import QUANTIZATIONS

# How the classes are called whose heads continue text; "forconditionalgeneration" is that of models which also see.
_CAUSAL_ENDINGS = ("forcausallm", "lmheadmodel", "forconditionalgeneration")

MakeRoom = Callable[[int, int], None]
"""Takes the bytes that a model needs and those that are free, before its weights are touched; may free some, or raise
ModelTooLarge."""

# While transformers builds a model, torch's default dtype is that model's, for every thread (transformers 5.23,
# `modeling_utils.local_torch_dtype`); and it has one hook for all progress bars.
_building = threading.Lock()


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
    report = progress or ignore_progress
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    source = find_model(model, offline=offline, cache_dir=cache_dir, progress=report, with_code=trust_remote_code)
    name = model or DEFAULT_MODEL.model_id
    with _explaining(name):
        files = _open(source.fetch(weights=False))
        config = _load_config(files, name, trust_remote_code)
        is_quantized = getattr(config, "quantization_config", None) is not None
        int4 = choose_int4(quantize, dtype, torch_device, is_quantized=is_quantized)
        tokenizer = _load_tokenizer(files, trust_remote_code)
        if is_quantized:  # only its files say how large it is
            files = source.fetch(weights=True)
            n_bytes = _count_file_bytes(files)
        else:
            skeleton = _build_skeleton(config, trust_remote_code)
            int4 = int4 and _pack_skeleton(skeleton, must_pack=quantize == "int4")
            n_bytes = _count_bytes(skeleton, torch.float32 if int4 else torch_dtype)
        if make_room is not None:
            make_room(n_bytes, free_bytes(torch_device))
        require_memory(n_bytes, torch_device, name)
        files = _open(source.fetch(weights=True))
        if int4:
            loaded = _load_int4(files, config, report, trust_remote_code)
            _tune_threads(loaded)
        else:
            loaded = _load_weights(files, config, torch_dtype, torch_device, report, trust_remote_code)
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


def _open(files: Path) -> Path | SmolGguf:
    """Return a `.gguf` file that Brook reads by itself as such, and anything else as it is."""
    return files if files.is_dir() else SmolGguf.open(files) or files


def _load_config(files: Path | SmolGguf, name: str, trust_remote_code: bool) -> Any:
    if isinstance(files, SmolGguf):
        return files.build_config()
    if files.is_dir() and not (files / "config.json").is_file():
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
    return config


def _load_tokenizer(files: Path | SmolGguf, trust_remote_code: bool) -> Any:
    if isinstance(files, SmolGguf):
        return files.build_tokenizer()
    return transformers.AutoTokenizer.from_pretrained(**_arguments(files, trust_remote_code))


def _build_skeleton(config: Any, trust_remote_code: bool) -> Any:
    """Build the model without its weights, in float32, which is torch's default already."""
    with _building, torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
        )


def _pack_skeleton(skeleton: Any, must_pack: bool) -> bool:
    """Replace what loading will pack; return whether there is any, or raise ModelUnavailable if there must be."""
    from streaming.models.int4 import replace_linears

    try:
        replace_linears(skeleton)
    except ModelUnavailable:
        if must_pack:
            raise
        return False
    skeleton.tie_weights()
    return True


def _count_bytes(skeleton: Any, dtype: torch.dtype) -> int:
    """Count the bytes that a model's weights take, what is not packed in `dtype`."""
    parameters = skeleton.parameters()
    return sum(p.numel() * (dtype if p.is_floating_point() else p.dtype).itemsize for p in parameters)


def _count_file_bytes(files: Path) -> int:
    """Count the bytes of a model's weights as they lie on the disk."""
    paths = [files] if files.is_file() else [*files.glob("*.safetensors"), *files.glob("pytorch_model*.bin")]
    return sum(path.stat().st_size for path in paths)


def _load_weights(
    files: Path | SmolGguf,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    progress: ProgressCallback,
    trust_remote_code: bool,
) -> Any:
    if isinstance(files, SmolGguf):
        weights = files.read_weights(functools.partial(unpack_blocks, dtype=dtype), progress)
        return _assemble(files, config, weights).to(device)
    if converted.is_converted(files):
        return _assemble(files, config, converted.read_weights(files, dtype, progress)).to(device)
    extra = {} if files.is_dir() else {"quantization_config": transformers.GgufConfig(dequantize=True)}
    arguments = _arguments(files, trust_remote_code) | extra
    return _from_pretrained(progress, **arguments, dtype=dtype, device_map={"": device})


@torch.no_grad()
def _tune_threads(model: Any) -> None:
    """Choose the thread count with which a model with packed weights writes a token fastest."""
    from streaming.models import llama_step, parallel

    step = llama_step.step_of(model)
    if step is None:
        parallel.tune_threads(lambda: model(torch.zeros(1, 1, dtype=torch.long), use_cache=False))
    else:
        parallel.tune_threads(lambda: step.read_on(transformers.DynamicCache(config=model.config), [0]))


def _load_int4(files: Path | SmolGguf, config: Any, progress: ProgressCallback, trust_remote_code: bool) -> Any:
    """Load for the CPU with packed weights; the kernels, which take a second to import, are only needed here."""
    from streaming.models import int4

    if isinstance(files, SmolGguf) or converted.is_converted(files):
        config.quantization_config = int4.Int4Config().to_dict()
        if isinstance(files, SmolGguf):
            return _assemble(files, config, files.read_weights(int4.pack_blocks, progress))
        return _assemble(files, config, converted.read_packed(files))
    if files.is_dir():
        arguments = _arguments(files, trust_remote_code)
        return _from_pretrained(progress, **arguments, quantization_config=int4.Int4Config())
    unpacked = _load_weights(files, config, torch.float32, torch.device("cpu"), progress, trust_remote_code)
    return int4.pack_model(unpacked)


def _assemble(files: Path | SmolGguf, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Make a Llama of weights that are read already, without another copy of them."""
    if isinstance(files, SmolGguf):
        generation_config = files.build_generation_config()
    else:
        generation_config = transformers.GenerationConfig.from_pretrained(files)
    dtype = weights["model.norm.weight"].dtype
    with _building, _no_progress_bar():
        return transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, generation_config=generation_config, dtype=dtype
        )


def _from_pretrained(progress: ProgressCallback, **arguments: Any) -> Any:
    progress(LoadProgress("weights"))
    auto_model: Any = transformers.AutoModelForCausalLM
    with _reporting(progress):
        loaded, report = auto_model.from_pretrained(**arguments, output_loading_info=True)
    if report["missing_keys"]:
        files = arguments["pretrained_model_name_or_path"]
        raise ModelDamaged(f"{files} lacks {len(report['missing_keys'])} of its weights; fetch the model again.")
    return loaded


@contextmanager
def _reporting(progress: ProgressCallback) -> Iterator[None]:
    """Tell `progress` what transformers' bar of loaded weights shows (5.23: `utils.logging.set_tqdm_hook`)."""

    def hook(make_bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        bar = make_bar(*args, **options)
        if options.get("desc") != "Loading weights":
            return bar
        return telling_layers(bar, [name for name, _ in args[0]], progress)

    with _building:
        before = transformers.utils.logging.set_tqdm_hook(hook)
        try:
            yield
        finally:
            transformers.utils.logging.set_tqdm_hook(before)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' bar from the terminal where it would only flash up."""
    bars = transformers.utils.logging
    was_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()


def _arguments(files: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return how `from_pretrained` is called for `files`, with no network."""
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if files.is_dir():
        return {"pretrained_model_name_or_path": files, **arguments}
    return {"pretrained_model_name_or_path": files.parent, "gguf_file": files.name, **arguments}
