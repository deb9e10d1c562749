"""How much memory a piece of code takes."""

import subprocess
import sys
from pathlib import Path

import pytest

# Not `ru_maxrss`, which a process inherits from the one that started it.
_CODE = """
import sys
import streaming.models.int4, streaming.models.llama_step, accelerate
from streaming.models.loading import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
def mb(field):
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # the most so far is what there is now
before = mb("VmRSS")
model = load_model({model!r}, quantize="int4")
print(mb("VmHWM") - before)
"""


def mb_to_load(model: str | None) -> float:
    """Load a model with packed weights in a process of its own; return by how many MB it grew at most."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell how much memory a process has taken at most")
    code = _CODE.format(model=model)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])
