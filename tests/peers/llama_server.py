"""llama-cpp-python's server with its repacked weights off: a program of its own, run where that package is.

Repacking picks AMX kernels wherever the processor announces AMX; on virtual machines that do not lend it they crash.
"""

import llama_cpp
import llama_cpp.llama_cpp as binding

_default_params = binding.llama_model_default_params


def without_repacking() -> binding.llama_model_params:
    params = _default_params()
    params.use_extra_bufts = False
    return params


llama_cpp.llama_model_default_params = binding.llama_model_default_params = without_repacking

if __name__ == "__main__":
    from llama_cpp.server.__main__ import main

    main()
