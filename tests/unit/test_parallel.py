"""Kernels on fewer threads than they were meant for: OpenMP gives what the machine and its settings allow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMPARE = """
import torch
from streaming.models import kernels, packing, parallel

torch.set_num_threads(4)
assert parallel.team_size() in (1, 4)  # 1 where there is no OpenMP
packed = packing.quantize(torch.randn(320, 64), 4)
weight, x = packing.unpack(packed, 320), torch.randn(5, 64)
for multiply in (kernels.multiply, kernels.multiply_unpacked):
    assert torch.allclose(multiply(packed, x), x @ weight.T, atol=1e-2), multiply
"""


@pytest.mark.parametrize("settings", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}])
def test_products_are_whole_on_fewer_threads_than_asked_for(settings):
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
