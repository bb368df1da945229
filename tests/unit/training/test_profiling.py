import json

import pytest
import torch

from kdtune.errors import ConfigError
from kdtune.training import Profiler


def test_writes_a_trace_and_a_table_of_the_active_steps(tmp_path):
    with Profiler(str(tmp_path), wait_steps=1, warmup_steps=1, active_steps=2, num_cycles=1) as profiler:
        for step in range(6):
            with torch.profiler.record_function(f"recipe_step_{step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == ["operators_step_4.txt", "trace_step_4.json"]
    trace = (tmp_path / "profile" / "trace_step_4.json").read_text()
    names = {event.get("name") for event in json.loads(trace)["traceEvents"]}
    assert {"recipe_step_2", "recipe_step_3", "aten::mm"} <= names
    assert not {"recipe_step_0", "recipe_step_1", "recipe_step_4"} & names
    assert "aten::mm" in (tmp_path / "profile" / "operators_step_4.txt").read_text()


def test_bad_numbers_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"profiler: .*active_steps=0"):
        Profiler(str(tmp_path), active_steps=0)
