"""Losses with state on several processes: the same numbers as on one."""

from pathlib import Path

import pytest
from distributed_runs import KD, PLAIN, check_same_change, check_same_rows, rows

TAID = ["kd_loss=kdtune.losses.TAID", "kd_loss.rate=1.0"]
HIDDEN = ["hidden_loss=kdtune.losses.HiddenStateLoss", "hidden_loss.weight=2.0", "hidden_loss.projection_lr=0.3"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="FSDP 2", marks=pytest.mark.slow("tensor parallelism, in the quick tests, shards more")),
        pytest.param(["parallelism.tp=2"], id="TP 2"),
    ],
)
def test_one_process_and_two_make_the_same_steps(more: list[str], launch, small_model: Path, tmp_path: Path) -> None:
    """SGD, with two micro-batches a step: a gradient of the maps that is not that of all processes would show."""
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    for name, ranks, accumulation, own in (("1", 1, 4, []), ("2", 2, 4 if more else 2, more)):
        ended = launch.kdtune(*KD, *PLAIN, *TAID, *HIDDEN, *own, "adapter=null", base, f"output_dir={tmp_path / name}",
                              f"gradient_accumulation_steps={accumulation}", ranks=ranks)  # fmt: skip
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "2"), rows(tmp_path / "1"))
    check_same_change(tmp_path / "2" / "final", tmp_path / "1" / "final", small_model)
    trained = [row for row in rows(tmp_path / "1") if "loss" in row]
    assert trained[-1]["hidden_loss"] < trained[0]["hidden_loss"]
