"""4-bit weights on CPU for every causal language model of transformers.

Importing this module registers the method "brook_int4" with transformers, after which
`AutoModelForCausalLM.from_pretrained(name, quantization_config=Int4Config())` rounds each `nn.Linear` to 4 bits while
it loads, one at a time, and `save_pretrained` keeps the packed form, which loads memory-mapped. The output head, the
token embedding and some others (`_IN_8_BITS`) take 8 bits. Everything else of the model is float32, which on CPUs
without matrix units computes faster than bfloat16.

Source: transformers 5.23 `quantizers.auto.register_quantizer`, `register_quantization_config`,
`quantizers.base.HfQuantizer`, `core_model_loading.ConversionOps`.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from streaming.errors import ModelUnavailable
from streaming.models.arena import move_to_arena
from streaming.models.kernels import multiply, multiply_unpacked, take_rows
from streaming.models.packing import GROUP_COLUMNS, bits_of, packed_shape, quantize

METHOD = "brook_int4"

# What these write goes into the residual stream as it is: with them in 8 bits, a model of 135M parameters quantized at
# load comes three times as near to itself (KL 0.07 instead of 0.21 nats), for an eighth more memory to read a token.
_IN_8_BITS = ("v_proj", "down_proj")

# Up to here it is faster to multiply packed weights row by row than to unpack them for torch.mm.
_FEW_ROWS = 128


class PackedLinear(nn.Module):
    """A linear layer whose `weight` is packed; it takes any float input and returns the same dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        shape = packed_shape(out_features, in_features, bits)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False) if bias else None

    @property
    def bits(self) -> int:
        return bits_of(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():  # cast to `weight.dtype`, as Mamba does before its head: nothing is left of it
            raise ModelUnavailable("This kind of model cannot run with packed weights; use --quantize none.")
        rows = x.reshape(-1, self.in_features).float().contiguous()
        product = multiply if len(rows) <= _FEW_ROWS else multiply_unpacked
        y = product(self.weight, rows)[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedEmbedding(nn.Module):
    """An embedding whose `weight` is packed, which can be that of the output head."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        shape = packed_shape(num_embeddings, embedding_dim, bits=8)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)

    @property
    def bits(self) -> int:
        return bits_of(self.weight)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.num_embeddings:
            raise IndexError(f"a token id is not between 0 and {self.num_embeddings - 1}")
        return take_rows(self.weight, token_ids)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """How to quantize: the names of modules to leave as they are, as in transformers' other configurations."""

    def __init__(self, modules_to_not_convert: list[str] | None = None, **_unused: Any) -> None:
        self.quant_method: Any = METHOD
        self.modules_to_not_convert = modules_to_not_convert


class _Pack(ConversionOps):
    """Pack one weight as it is read."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, **_unused: Any
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, full_layer_name)
        return {full_layer_name: quantize(weight, module.bits)}


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """Replaces modules before the weights come, and packs the weights as they come."""

    quantization_config: Int4Config

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(torch.device(device).type != "cpu" for device in devices if device not in (None, "auto")):
            raise ModelUnavailable("4-bit weights run on the CPU only; choose the device cpu or quantize none.")

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map == "auto" else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def param_needs_quantization(self, model: Any, param_name: str, **_unused: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedLinear | PackedEmbedding) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        replace_linears(model, self.quantization_config.modules_to_not_convert)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        move_to_arena(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace_linears(model: Any, keep: list[str] | None = None) -> None:
    """Put packed modules, still without weights, in place of the linear layers of a model on the meta device.

    Left alone are subclasses, which may do more than multiply, columns that do not divide by 32, and names in `keep`.
    The head is replaced or left alone together with the embedding, because they may be one tensor.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules())
    wanted = {name for name in modules if should_convert_module(name, keep)}
    pair = {name for name, module in modules.items() if module in (embedding, head)}
    if not (pair <= wanted and _packs(head, nn.Linear) and _packs(embedding, nn.Embedding)):
        wanted -= pair
    replaced = 0
    for name, module in modules.items():
        if name not in wanted:
            continue
        with torch.device("meta"):
            if module is embedding:
                new: nn.Module = PackedEmbedding(module.num_embeddings, module.embedding_dim)
            elif _packs(module, nn.Linear):
                bits = 8 if module is head or name.endswith(_IN_8_BITS) else 4
                new = PackedLinear(module.in_features, module.out_features, module.bias is not None, bits)
            else:
                continue
        model.set_submodule(name, new)
        replaced += 1
    if not replaced:
        raise ModelUnavailable("This model has no linear layers that can be quantized; use quantize none.")


def _packs(module: Any, kind: type[nn.Module]) -> bool:
    weight: Any = module.weight if type(module) is kind else None
    return weight is not None and weight.shape[1] % GROUP_COLUMNS == 0
