"""Loading costs about one copy of the weights. Measured as the peak of a fresh process, over what torch itself takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import meta_state, write_params

from kdtune.checkpoint import save_model
from kdtune.models import llama

# ru_maxrss of a child starts at its parent's resident size on Linux; VmHWM belongs to the process itself.
SCRIPT = """
import sys, torch
from kdtune.checkpoint import load_model
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
load_model(sys.argv[2])  # everything that is imported or allocated only once
before = peak()
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("sharded, untied", "bfloat16"),
        *(
            pytest.param(layout, "float32", marks=pytest.mark.slow("a process of its own, and 100 MB of weights"))
            for layout in ("single, tied", "meta")
        ),
    ],
)
def test_loading_takes_about_one_copy(tmp_path: Path, layout: str, dtype: str) -> None:
    sizes = {"vocab_size": 8192, "embed_dim": 1024, "num_heads": 8, "intermediate_dim": 2816}
    model = llama(**sizes, num_layers=3, tie_embeddings="untied" not in layout)
    small = llama(vocab_size=8, embed_dim=8, num_layers=1, num_heads=1, intermediate_dim=8)
    save_model(small, tmp_path / "small")
    if layout == "meta":
        state = meta_state(model)
        (tmp_path / "big").mkdir()
        torch.save(state, tmp_path / "big" / "consolidated.00.pth")
        write_params(tmp_path / "big", model, multiple_of=256, ffn_dim_multiplier=1)
    else:
        shard = 60 * 2**20 if "sharded" in layout else 2**40
        save_model(model, tmp_path / "big", max_shard_bytes=shard)
    arguments = [str(tmp_path / "big"), str(tmp_path / "small"), dtype]
    run = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    size, peak = (int(word) for word in run.stdout.split())
    print(f"{layout} {dtype}: {size / 2**20:.0f} MiB of weights, peak {peak / size:.3f} copies")
    assert size > 80 * 2**20
    # The largest tensor passes through memory once more; nothing else does. Below 0.9 the measurement would be broken.
    assert 0.9 < peak / size < 1.35
