"""A folder of recipes and configs to stand in for the shipped ones, without torch."""

from pathlib import Path

import pytest

from kdtune import _assets

RECIPE = '''\
"""Adds two numbers.

More about it.
"""

import os
import sys
from dataclasses import dataclass
from typing import Any

from kdtune import config
from kdtune.errors import TrainingError

ALIASES = ("add_single_device", "add_distributed")


@dataclass
class Config:
    """Keys."""

    output_dir: str = config.MISSING
    """Folder of the run."""
    left: int = 1
    """The first number."""
    right: int = 2
    tokenizer: Any = config.component(default=None)
    log: str = "${output_dir}/log"


@config.entry_point(Config)
def main(cfg: Config) -> None:
    if cfg.left == 13:
        raise TrainingError("step 1: left is 13")
    line = f"{cfg.left + cfg.right} {os.environ.get('RANK', 'alone')} {os.environ.get('WORLD_SIZE', '1')}"
    sys.stdout.write(line + "\\n")  # in one piece: two processes share the pipe
    sys.stdout.flush()


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with recipes/ and configs/; the working directory is empty and elsewhere."""
    root, work = tmp_path / "assets", tmp_path / "work"
    (root / "recipes").mkdir(parents=True)
    (root / "configs" / "tiny").mkdir(parents=True)
    work.mkdir()
    (root / "recipes" / "add.py").write_text(RECIPE)
    (root / "recipes" / "subtract.py").write_text(RECIPE.replace("Adds", "Subtracts").replace('"add_', '"subtract_'))
    (root / "recipes" / "_private.py").write_text("not python")
    (root / "configs" / "quickstart.yaml").write_text("# First words.\nrecipe: add\noutput_dir: runs/x\n")
    (root / "configs" / "tiny" / "add.yaml").write_text("recipe: add_single_device\noutput_dir: runs/y\nleft: 40\n")
    (root / "configs" / "orphan.yaml").write_text("output_dir: runs/y\n")
    (root / "configs" / "README.md").write_text("not a config")
    monkeypatch.setattr(_assets, "assets_dir", lambda kind: root / kind)
    monkeypatch.chdir(work)
    return root
