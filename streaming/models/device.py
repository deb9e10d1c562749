"""Where a model runs and in which dtype, and whether it fits."""

import platform

import psutil
import torch

from streaming.errors import DeviceUnavailable, ModelTooLarge, ModelUnavailable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Turn "auto" into the fastest device here (cuda, then mps, then cpu), and any other name into that device.

    Raises DeviceUnavailable.
    """
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if n_cuda else "mps" if has_mps else "cpu")
    device = torch.device(name)
    n_devices = {"cpu": 1, "cuda": n_cuda, "mps": int(has_mps)}.get(device.type, 0)
    if (device.index or 0) >= n_devices:
        raise DeviceUnavailable(f"This machine has no device {name}; leave the device at auto, or choose cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto" into the fastest dtype on `device`, and any other name into that dtype."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    # A CPU without these instructions computes bfloat16 by way of float32, and slower than float32 itself.
    fast_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast_bfloat16 else torch.float32


def choose_int4(name: str, dtype_name: str, device: torch.device, *, is_quantized: bool) -> bool:
    """Turn the setting `quantize` into whether to hold weights in 4 bits.

    "auto" does on a CPU, unless a dtype was asked for, the model is quantized already, or the processor cannot.
    Raises ModelUnavailable when "int4" is asked for and cannot be had.
    """
    if name == "int4":
        if is_quantized:
            raise ModelUnavailable("This model's weights are quantized already; use --quantize auto.")
        if device.type != "cpu":
            raise ModelUnavailable(f"4-bit weights run on the CPU, not on {device}; use --quantize none.")
        if dtype_name not in ("auto", "float32"):
            raise ModelUnavailable(
                f"4-bit weights compute in float32, not in {dtype_name}; use --dtype auto, or --quantize none."
            )
        if missing := _missing_for_int4():
            raise ModelUnavailable(f"4-bit weights need a processor with {missing}; use --quantize none.")
        return True
    suits = device.type == "cpu" and dtype_name == "auto" and not is_quantized
    return name == "auto" and suits and not _missing_for_int4()


def _missing_for_int4() -> str:
    """Name what the kernels of `streaming.models.simd` are slow without and this processor lacks."""
    is_x86 = platform.machine().lower() in {"x86_64", "amd64"}
    capabilities = torch.cpu.get_capabilities()
    return ", ".join(name for name in ("avx2", "fma3", "f16c") if is_x86 and not capabilities.get(name))


def require_memory(n_bytes: int, device: torch.device, model_id: str) -> None:
    """Raise ModelTooLarge unless `device` has `n_bytes` free."""
    n_free = free_bytes(device)
    if n_bytes > n_free:
        raise ModelTooLarge(
            f"{model_id} needs {n_bytes / 1e9:,.1f} GB but {device.type} has {n_free / 1e9:,.1f} GB free; choose a "
            f"smaller model, or a smaller --dtype."
        )


def free_bytes(device: torch.device) -> int:
    """Count the bytes that `device` has free: with what torch keeps of tensors that are gone, for those to come."""
    if device.type == "cuda":
        n_kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + n_kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return int(psutil.virtual_memory().available)
