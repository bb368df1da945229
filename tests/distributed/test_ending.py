"""Processes that have done their work end well, whatever gloo's threads are still at."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from torch import distributed as dist
from kdtune.distributed import start_world

with start_world(torch.device("cpu")) as world:
    for _ in range(30):
        world.gather(world.rank)
    kept = dist.distributed_c10d._get_default_group()  # as a mesh and FSDP keep it
"""


@pytest.mark.slow("six imports of torch on two cores; fewer processes do not show the race")
def test_processes_end_well_after_their_last_message(tmp_path: Path) -> None:
    """More processes than cores: some are interrupted right after it. Without a pause, most runs end with SIGABRT."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "6",
               str(tmp_path / "script.py")]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
