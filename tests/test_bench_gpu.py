"""bench/gpu.sh, which is for a CUDA device, runs from end to end on a CPU at a tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow("runs the tests of tests/gpu and two benchmarks as processes of their own")
def test_the_script_for_a_gpu_runs_on_a_cpu() -> None:
    environment = os.environ | {
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    for line in ("utilization", "matmul", "fused", "plain"):
        assert line in done.stdout
