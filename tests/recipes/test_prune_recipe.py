"""The prune recipe's checks before anything is measured; what it writes is in test_run_output.py."""

import pytest

from kdtune.config import load
from recipes.prune import Config


def prune(cli, folder, *overrides):
    return cli("run", "prune", "--config", "tiny/prune", f"output_dir={folder}", *overrides)


def test_a_folder_that_is_not_empty_is_refused_at_the_start(cli, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr("kdtune.distributed.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    done = prune(cli, tmp_path / "out")
    assert done.code == 2 and "is not empty (holds 'notes.txt'); choose another output_dir" in done.err


def test_a_vocabulary_that_is_too_small_is_refused(cli, tmp_path):
    done = prune(cli, tmp_path / "out", "model.vocab_size=257")
    assert done.code == 2 and "the model's vocabulary is 257" in done.err


def test_models_dir_is_where_everything_lies():
    cfg = load("smollm2/prune", ["models_dir=/elsewhere"], Config)
    assert cfg.output_dir == "/elsewhere/SmolLM2-12-layers"
    assert cfg.checkpointer["checkpoint_dir"] == cfg.tokenizer["path"] == "/elsewhere/SmolLM2-135M-Instruct"
