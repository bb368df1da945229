"""torch's optimizers without its compiler: the same numbers, hooks and profile, in a process of its own."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from kdtune.training.uncompiled import without_compiler

PROGRAM = """
import json, sys
import torch
from torch import nn
from kdtune.training.uncompiled import without_compiler

without_compiler()
made = {}
for name in ("AdamW", "SGD", "Adafactor", "Muon", "RMSprop"):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for _ in range(3):
        optimizer.zero_grad()
        (weight ** 3).sum().backward()
        optimizer.step()
        scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.is_grad_enabled() and calls == ["before", "after"] * 3, calls
    made[name] = (optimizer, weight)
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
for name, (optimizer, weight) in made.items():
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.key == f"Optimizer.step#{name}.step" for event in profile.key_averages())
print(json.dumps({name: weight.tolist() for name, (_, weight) in made.items()}))
"""


def trained(name: str) -> list[list[float]]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        optimizer.zero_grad()
        (weight**3).sum().backward()
        optimizer.step()
        scheduler.step()
    optimizer.step()
    values: list[list[float]] = weight.tolist()
    return values


def test_optimizers_make_the_same_steps_without_importing_the_compiler() -> None:
    importlib.import_module("torch._dynamo")
    without_compiler()  # does nothing here: this process has torch's own wrappers
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"AdamW", "SGD", "Adafactor", "Muon", "RMSprop"}
    for name, values in found.items():
        assert values == trained(name), name
