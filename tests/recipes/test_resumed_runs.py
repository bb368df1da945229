"""What a resumed run may change, and that it is otherwise the run it would have been: data, epochs, rates, weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdtune.checkpoint import load_model

# Of a row of metrics.jsonl, what a clock or the machine says.
MEASURED = {"time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_rss"}
BASE = ["run", "finetune", "--config", "tiny/finetune", "adapter=null", "sample_prompts=[]", "dataset_val=null",
        "run_val_every_n_steps=null", "save_every_n_steps=1", "clip_grad_norm=null", "batch_size=2"]  # fmt: skip
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.25}"
LINEAR = "lr_scheduler={_component_: kdtune.training.get_linear_schedule_with_warmup, num_warmup_steps: 1, num_training_steps: 4}"
RESUME = "resume_from_checkpoint=true"


@pytest.fixture(scope="module")
def run(cli: Callable[..., Any]) -> Callable[..., Any]:
    """A run into a folder with some settings; gives how it ended, which must be as told."""

    def run(folder: Path, *settings: str, code: int = 0) -> Any:
        ended = cli(*BASE, f"output_dir={folder}", *settings)
        assert ended.code == code, ended.err
        return ended

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the steps, without what was measured."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found if row["step"] > 0]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in load_model(folder).parameters()])


def test_a_longer_run_is_the_run_it_would_have_been(run: Callable[..., Any], tmp_path: Path) -> None:
    """Two epochs cut after 2 steps, then after 3: the pass over the data goes on where it was left, and `epoch` with it."""
    run(tmp_path / "whole", SGD, "lr_scheduler=null", "max_steps_per_epoch=3", "epochs=2")
    run(tmp_path / "parts", SGD, "lr_scheduler=null", "max_steps_per_epoch=2")
    run(tmp_path / "parts", SGD, "lr_scheduler=null", "max_steps_per_epoch=3", "epochs=2", RESUME)
    assert [row["epoch"] for row in rows(tmp_path / "whole")] == [0, 0, 0, 1, 1, 1]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_shorter_epoch_begins_the_next_one_at_once(run: Callable[..., Any], tmp_path: Path) -> None:
    run(tmp_path, SGD, "lr_scheduler=null", "max_steps_per_epoch=3")
    run(tmp_path, SGD, "lr_scheduler=null", "max_steps_per_epoch=2", "epochs=3", RESUME)
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 0, 0, 1, 2, 2]


def test_another_learning_rate_takes_effect(run: Callable[..., Any], tmp_path: Path) -> None:
    """Of SGD's first step after the resume, the change of the weights is the rate's share of what it was."""
    kept, changed, still = tmp_path / "kept", tmp_path / "changed", tmp_path / "still"
    for folder in (kept, changed, still):
        run(folder, SGD, LINEAR, "max_steps_per_epoch=2")
    run(kept, SGD, LINEAR, "max_steps_per_epoch=4", RESUME)
    run(changed, SGD, LINEAR, "max_steps_per_epoch=4", RESUME, "optimizer.lr=0.125", "resume_changes=[optimizer.lr]")
    run(still, SGD, LINEAR, "max_steps_per_epoch=4", RESUME, "optimizer.lr=0.0", "resume_changes=[optimizer.lr]")
    shares = (1, 1, 2 / 3, 1 / 3)
    assert [row["lr"] for row in rows(kept)] == pytest.approx([0.25 * share for share in shares], rel=1e-12)
    assert [row["lr"] for row in rows(changed)] == pytest.approx([0.25, 0.25, 0.125 * 2 / 3, 0.125 / 3], rel=1e-12)
    start = weights(kept / "step_2")
    full, half = (weights(folder / "step_3") - start for folder in (kept, changed))
    assert full.abs().max() > 1e-3
    torch.testing.assert_close(2 * half, full, rtol=0, atol=1e-6)
    assert torch.equal(weights(still / "final"), weights(still / "step_2"))
    starts = json.loads((changed / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["changed"] == {
        "resume_changes": {"was": [], "is": ["optimizer.lr"]},
        "optimizer.lr": {"was": 0.25, "is": 0.125},
        "max_steps_per_epoch": {"was": 2, "is": 4},
    }


def test_another_schedule_is_at_the_step_that_was_reached(run: Callable[..., Any], tmp_path: Path) -> None:
    run(tmp_path, SGD, LINEAR, "max_steps_per_epoch=2")
    other = "lr_scheduler={_component_: torch.optim.lr_scheduler.ExponentialLR, gamma: 0.5}"
    run(tmp_path, SGD, other, "max_steps_per_epoch=3", RESUME, "resume_changes=[lr_scheduler]")
    # Killed before its next checkpoint, the run needs no asking again, and keeps what it was told.
    (tmp_path / "step_3" / "state" / "state.json").unlink()
    run(tmp_path, SGD, other, "max_steps_per_epoch=4", RESUME)
    run(tmp_path, SGD, "lr_scheduler=null", "max_steps_per_epoch=5", RESUME, "resume_changes=[lr_scheduler]")
    assert [row["lr"] for row in rows(tmp_path)] == [0.25, 0.25, 0.0625, 0.03125, 0.25]


def test_without_asking_it_is_refused_with_what_to_type(run: Callable[..., Any], tmp_path: Path) -> None:
    run(tmp_path, SGD, "lr_scheduler=null", "max_steps_per_epoch=1")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    more = ("lr_scheduler=null", "max_steps_per_epoch=2", RESUME)
    refused = run(tmp_path, SGD, *more, "optimizer.lr=0.1", code=2)
    assert "optimizer.lr: was 0.25, is 0.1" in refused.err
    assert refused.err.rstrip().endswith("to resume with optimizer.lr changed: resume_changes=[optimizer.lr]")
    refused = run(tmp_path, SGD, *more, "optimizer.lr=0.1", "batch_size=1", "clip_grad_norm=1", code=2)
    assert "resume_changes=[optimizer.lr,clip_grad_norm]; the others would make it another run" in refused.err.replace(
        "clip_grad_norm,optimizer.lr", "optimizer.lr,clip_grad_norm"
    )
    refused = run(tmp_path, SGD, *more, "seed=1", code=2)
    assert "seed: was 0, is 1" in refused.err and "resume_changes" not in refused.err
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_what_is_asked_for_and_the_same_is_told(run: Callable[..., Any], tmp_path: Path) -> None:
    run(tmp_path, SGD, "lr_scheduler=null", "max_steps_per_epoch=1")
    again = (SGD, "lr_scheduler=null", RESUME, "clip_grad_norm=1", "resume_changes=[optimizer.lr,clip_grad_norm]")
    told = "resume_changes: {} is what the run already has"
    ended = run(tmp_path, *again, "max_steps_per_epoch=2")
    assert told.format("optimizer.lr") in ended.err and told.format("clip_grad_norm") not in ended.err
    assert "clip_grad_norm None -> 1.0 from step 2\n" in ended.err


def test_what_changes_is_told_with_the_step_from_which_it_counts(run: Callable[..., Any], tmp_path: Path) -> None:
    """The rates are those of the run's own log."""
    begun, length = (
        tmp_path / "begun",
        "lr_scheduler goes by the number of steps: from step 3 its rates are those of a run",
    )
    by_length = LINEAR.replace(", num_training_steps: 4", "")
    run(begun, SGD, by_length, "max_steps_per_epoch=2")
    same = run(begun, SGD, by_length, "max_steps_per_epoch=2", RESUME)
    assert "->" not in same.err and length not in same.err
    ended = run(
        begun, SGD, by_length, "max_steps_per_epoch=4", RESUME, "optimizer.lr=0.125", "resume_changes=[optimizer.lr]"
    )
    for line in ("optimizer.lr 0.25 -> 0.125 from step 3", "max_steps_per_epoch 2 -> 4 from step 3"):
        assert f"\n{line}\n" in ended.err
    assert length in ended.err and rows(begun)[2]["lr"] == pytest.approx(0.125 * 2 / 3, rel=1e-12)
    constant = tmp_path / "constant"
    run(constant, SGD, "lr_scheduler=null", "max_steps_per_epoch=1", "epochs=2")
    ended = run(constant, SGD, "lr_scheduler=null", "max_steps_per_epoch=1", "epochs=3", RESUME)
    assert "\nepochs 2 -> 3 from step 3\n" in ended.err and length not in ended.err


def test_a_state_without_settings_takes_no_change(run: Callable[..., Any], tmp_path: Path) -> None:
    """As earlier versions wrote it. What would be ignored is refused, and recorded nowhere."""
    run(tmp_path, SGD, "lr_scheduler=null", "max_steps_per_epoch=1")
    file = tmp_path / "step_1" / "state" / "state.json"
    state = json.loads(file.read_text())
    del state["extra"]["settings"]
    file.write_text(json.dumps(state))
    before = [(tmp_path / name).read_bytes() for name in ("config.yaml", "run.json", "metrics.jsonl")]
    again = (SGD, "lr_scheduler=null", "max_steps_per_epoch=2", RESUME)
    refused = run(tmp_path, *again, "optimizer.lr=0.125", "resume_changes=[optimizer.lr]", code=2)
    assert "did not record these settings" in refused.err and "resume without the change" in refused.err
    assert before == [(tmp_path / name).read_bytes() for name in ("config.yaml", "run.json", "metrics.jsonl")]
    run(tmp_path, *again)
    assert [row["lr"] for row in rows(tmp_path)] == [0.25, 0.25]


@pytest.mark.parametrize(
    "asked, found",
    [
        ("[batch_size]", "batch_size would make it another run; allowed are optimizer.ARGUMENT"),
        ("[optimizer]", "optimizer cannot be changed"),
        ("[optimizer._component_]", "optimizer._component_ cannot be changed"),
        ("[optimiser.lr]", "optimiser.lr would make it another run"),
    ],
)
def test_keys_that_cannot_be_asked_for_are_named(
    run: Callable[..., Any], tmp_path: Path, asked: str, found: str
) -> None:
    assert found in run(tmp_path / "out", SGD, RESUME, f"resume_changes={asked}", code=2).err
    assert not (tmp_path / "out").exists()


def test_it_is_about_a_resumed_run(run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run(tmp_path / "out", SGD, "resume_changes=[optimizer.lr]", code=2)
    assert "set resume_from_checkpoint=true too" in ended.err
