"""What the distributed tests run, and how they compare two runs."""

import json
from pathlib import Path

import pytest

KD = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation"]
FINETUNE = ["run", "finetune", "--config", "tiny/finetune"]


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def check_same_rows(found: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    """Losses, norms and validations are equal; speed and memory may differ."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs.keys() - {"tokens_per_second", "peak_memory_rss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-7), (theirs["step"], name)
