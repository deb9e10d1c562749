"""The stretched rotary frequencies of Llama 3.1 and later, in a GGUF file.

llama.cpp's converter writes what each frequency is divided by as a tensor, which transformers 5.23 leaves out: its
config then has the frequencies of Llama 3.0. (Source: llama.cpp, `convert_hf_to_gguf.py`,
`LlamaModel.generate_extra_tensors`.)
"""

import copy
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streaming.models.gguf import GgufFile, unpack

_TENSOR = "rope_freqs.weight"

# The same in all of them; only the factor differs.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def stretch_frequencies(config: Any, file: GgufFile) -> Any:
    """Return `config` with the frequencies of the file. Raises ValueError if they are none of Llama's."""
    if _TENSOR not in file.tensors:
        return config
    divisors = unpack(file.read(_TENSOR), file.tensors[_TENSOR].ggml_type, torch.float32)
    stretched = copy.deepcopy(config)
    stretched.rope_parameters = {**config.rope_parameters, **_LLAMA3, "factor": divisors.max().item()}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](stretched)
    plain = stretched.rope_parameters["rope_theta"] ** (-torch.arange(len(divisors)) / len(divisors))
    if frequencies.shape != divisors.shape or not torch.allclose(plain / divisors, frequencies, rtol=1e-3):
        raise ValueError("its rotary frequencies are stretched in a way that is not known; choose another file")
    return stretched
