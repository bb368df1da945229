"""Which step folders are whole, which is best, and which are deleted."""

import json
import math
import socket
from pathlib import Path

import pytest
import torch
from checkpoint_samples import assert_same_weights, tiny_model

from kdtune.checkpoint import CheckpointManager, best_step, discard_steps_after, load_model, newest_step, step_folders
from kdtune.errors import CheckpointError, ConfigError


def save(manager: CheckpointManager, step: int, **metrics: float) -> Path:
    model = tiny_model(seed=step)
    return manager.save(
        step,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        extra={"position": [0, step]},
        metrics=metrics,
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in step_folders(folder)]


def test_a_step_folder_is_a_model_folder_with_state(tmp_path: Path) -> None:
    folder = save(CheckpointManager(tmp_path), 3, loss=1.5)
    assert folder == tmp_path / "step_3"
    assert_same_weights(load_model(folder), tiny_model(seed=3))
    state = json.loads((folder / "state" / "state.json").read_text())
    assert state["extra"] == {"position": [0, 3], "step": 3, "metrics": {"loss": 1.5}}
    assert newest_step(tmp_path) == folder


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (9, 10, 100):
        save(manager, step)
    assert names(tmp_path) == ["step_9", "step_10", "step_100"]
    assert newest_step(tmp_path) == tmp_path / "step_100"
    assert newest_step(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "gone", ["model.safetensors", "config.json", "state", "state/state.json", "state/.metadata"], ids=str
)
def test_folders_that_are_not_whole_do_not_count(tmp_path: Path, gone: str) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    broken = save(manager, 2)
    (broken / gone).rename(tmp_path / "elsewhere")
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_3").mkdir()
    assert newest_step(tmp_path) == tmp_path / "step_1"
    discard_steps_after(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_1", "step_x"]


def test_whole_newer_steps_are_not_discarded(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    save(manager, 2)
    with pytest.raises(CheckpointError, match="step_2: is whole and newer than step 1"):
        discard_steps_after(tmp_path, 1)
    assert names(tmp_path) == ["step_1", "step_2"]


def test_shards_that_are_missing_make_a_folder_not_whole(tmp_path: Path) -> None:
    folder = save(CheckpointManager(tmp_path), 1)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert newest_step(tmp_path) is None
    (folder / "model-00001-of-00001.safetensors").write_text("")
    assert newest_step(tmp_path) == folder
    index.write_text("{")
    assert newest_step(tmp_path) is None


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=2, best_metric="val_loss")
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 1.5], start=1):
        save(manager, step, val_loss=loss)
    assert names(tmp_path) == ["step_2", "step_4", "step_5"]
    assert best_step(tmp_path, "val_loss") == tmp_path / "step_2"
    # A new best lets go of the old one.
    save(manager, 6, val_loss=0.5)
    assert names(tmp_path) == ["step_5", "step_6"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_more_agreement_is_better(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1, best_metric="val_agreement")
    for step, value in enumerate([0.2, 0.9, 0.5], start=1):
        save(manager, step, val_agreement=value)
    assert names(tmp_path) == ["step_2", "step_3"]


def test_nan_and_absent_metrics_are_never_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1, best_metric="val_loss")
    save(manager, 1, val_loss=math.nan)
    save(manager, 2)
    assert best_step(tmp_path, "val_loss") is None
    save(manager, 3, val_loss=2.0)
    save(manager, 4, val_loss=math.nan)
    assert names(tmp_path) == ["step_3", "step_4"]


def test_all_are_kept_without_a_number_and_none_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in range(1, 5):
        save(manager, step)
    assert len(names(tmp_path)) == 4
    with pytest.raises(ConfigError, match="keep_last_n_checkpoints=0: must be 1 or more"):
        CheckpointManager(tmp_path, keep_last_n=0)


def test_a_new_manager_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / f".step_4.partial-{socket.gethostname()}-999999999-0123abcd" / "state").mkdir(parents=True)
    (tmp_path / f".step_1.deleted-{socket.gethostname()}-999999999-0123abcd").mkdir()
    CheckpointManager(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_a_step_twice_is_an_error(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    with pytest.raises(CheckpointError, match="step_1: exists and is not empty"):
        save(manager, 1)
