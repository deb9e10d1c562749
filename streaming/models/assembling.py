"""Models put together by transformers: one at a time, of files or of weights that are read when their turn comes.

Relied on, and stated by tests/contract/test_gguf_reading.py: `from_pretrained` takes each value of a state dict by
`[...]` and asks it for `get_dtype()`, as it does the slices of a safetensors file (transformers 5.23,
`core_model_loading._materialize_copy`, `HfQuantizer.get_new_dtype`).
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from streaming.errors import ModelDamaged
from streaming.models.arena import allocate
from streaming.models.gguf_weights import GgufParameter
from streaming.models.progress import LoadProgress, ProgressCallback, telling_layers

# While transformers builds a model, torch's default dtype is that model's, for every thread (transformers 5.23,
# `modeling_utils.local_torch_dtype`); and it has one hook for all progress bars.
_building = threading.Lock()


class LazyWeight:
    """A weight that is read when `from_pretrained` takes it."""

    def __init__(self, read: Callable[[], torch.Tensor], is_packed: bool) -> None:
        self._read = read
        self._is_packed = is_packed

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()

    def get_dtype(self) -> str:
        """Say whether it may be cast, as safetensors names dtypes."""
        return "U8" if self._is_packed else "F32"


def build_skeleton(config: Any, trust_remote_code: bool) -> Any:
    """Build a model on the meta device, in float32, which is torch's default already."""
    with _building, torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
        )


def lazy_weights(parameters: Mapping[str, GgufParameter], skeleton: Any, dtype: torch.dtype) -> dict[str, LazyWeight]:
    """Return the weights of a GGUF file as `skeleton` has them: packed, in one piece of memory, or in `dtype`."""
    state = skeleton.state_dict()
    packed = {name: state[name].shape for name in parameters if state[name].dtype == torch.uint8}
    places = dict(zip(packed, allocate(list(packed.values())), strict=True))
    return {
        name: LazyWeight(
            partial(parameter.pack, places[name]) if name in packed else partial(parameter.read, dtype),
            is_packed=name in packed,
        )
        for name, parameter in parameters.items()
    }


def assemble(
    model_class: Any, files: Path, progress: ProgressCallback, *, shows_bar: bool = True, **arguments: Any
) -> Any:
    """Call `from_pretrained` with `arguments`; raise ModelDamaged where `files` lack a weight."""
    progress(LoadProgress("weights"))
    with _building, _reporting(progress, shows_bar):
        loaded, report = model_class.from_pretrained(**arguments, output_loading_info=True)
    if report["missing_keys"]:
        raise ModelDamaged(f"{files} lacks {len(report['missing_keys'])} of its weights; fetch the model again.")
    return loaded


@contextmanager
def _reporting(progress: ProgressCallback, shows_bar: bool) -> Iterator[None]:
    """Tell `progress` what transformers' bar of loaded weights shows (5.23: `utils.logging.set_tqdm_hook`)."""

    def hook(make_bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != "Loading weights":
            return make_bar(*args, **options)
        weights = make_bar(*args, **options) if shows_bar else args[0]
        return telling_layers(weights, [name for name, _ in args[0]], progress)

    before = transformers.utils.logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)
