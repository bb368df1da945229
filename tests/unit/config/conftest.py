"""A whole small config, and the samples its components point at, importable by name."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

BASE = """\
recipe: sample
output_dir: runs/x
tokenizer:
  _component_: config_samples.Tokenizer
  path: ${output_dir}/tok
dataset:
  _component_: config_samples.Dataset
  source: alpaca
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path
