"""What a resumed run must keep beside its config: how a step is cut and how it is rounded."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from kdtune.config.load import to_yaml
from kdtune.distributed import SINGLE_PROCESS
from kdtune.errors import CheckpointError, ConfigError
from kdtune.runs import check_unchanged, start_run, step_to_resume
from kdtune.runs.record import last_start, read_resolved_config
from kdtune.training import TrainingConfig, may_change

CONFIG = "gradient_accumulation_steps: 4\nparallelism: {_component_: kdtune.distributed.Parallelism}\n"
NODE = {"_component_": "kdtune.distributed.Parallelism"}


def resume(folder: Path, accumulation: int, processes: int, **parallelism: object) -> Path | None:
    values = {"gradient_accumulation_steps": accumulation, "parallelism": NODE | parallelism}
    return step_to_resume(
        folder, values, may_change=may_change(TrainingConfig), batches_per_step=accumulation * processes
    )


@pytest.mark.parametrize("record", [{"batches_per_step": 4}, {}], ids=["recorded", "of an older version"])
def test_as_many_micro_batches_on_any_number_of_processes(record: dict, tmp_path: Path) -> None:
    start_run(tmp_path, SINGLE_PROCESS, step=0, resolved_config=CONFIG, record=record)
    for accumulation, processes in ((4, 1), (2, 2), (1, 4)):
        assert resume(tmp_path, accumulation, processes, dp_replicate=processes) is None
    for accumulation, processes in ((8, 1), (4, 2)):
        with pytest.raises(ConfigError, match="= 8: the run makes its steps of 4 micro-batches"):
            resume(tmp_path, accumulation, processes)


@pytest.mark.parametrize("setting", ["param_dtype", "reduce_dtype"])
def test_the_same_rounding(setting: str, tmp_path: Path) -> None:
    start_run(tmp_path, SINGLE_PROCESS, step=0, resolved_config=CONFIG, record={})
    with pytest.raises(ConfigError, match=f"parallelism.{setting}: was None, is 'bf16'; a resumed run keeps it"):
        resume(tmp_path, 4, 1, **{setting: "bf16"})


def test_only_what_differs_inside_a_component_is_named() -> None:
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}
    before = {"optimizer": optimizer, "adapter": None, "epochs": 1}
    now = {
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3, "foreach": True},
        "adapter": {"lora_rank": 8},
        "epochs": 2,
    }
    with pytest.raises(ConfigError) as refused:
        check_unchanged(before, now, may_change=("epochs",))
    assert str(refused.value).splitlines()[1:-1] == [
        "  optimizer.lr: was 0.001, is 0.002",
        "  optimizer.fused: was True, is not given",
        "  optimizer.foreach: was not given, is True",
        "  adapter: was None, is {'lora_rank': 8}",
    ]


def test_a_text_with_an_interpolations_sign_is_the_same_in_a_resumed_run(tmp_path: Path) -> None:
    values = {"dataset": {"_component_": "mine.rows", "system": "costs ${amount}"}, "optimizer": {"lr": 1e-5}}
    for _ in range(2):
        start_run(tmp_path, SINGLE_PROCESS, step=0, resolved_config=to_yaml(values), record={})
    assert read_resolved_config(tmp_path) == values and last_start(tmp_path)["changed"] == {}
    check_unchanged(read_resolved_config(tmp_path), values, may_change=())


def test_a_run_changed_by_hand_is_read_as_any_config(tmp_path: Path) -> None:
    """YAML 1.1 alone takes 1e-5 for a text."""
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 1e-5}\n")
    assert read_resolved_config(tmp_path) == {"optimizer": {"lr": 1e-5}}
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(CheckpointError, match="a config is a mapping of keys to values; it was cut off or changed"):
        read_resolved_config(tmp_path)


def test_a_component_under_its_older_name_is_the_same_run(tmp_path: Path) -> None:
    before = CONFIG + "kd_loss: {_component_: kdtune.losses.ForwardKLLoss}\n"
    start_run(tmp_path, SINGLE_PROCESS, step=0, resolved_config=before, record={"batches_per_step": 4})
    values = {"gradient_accumulation_steps": 4, "parallelism": NODE}
    for name, differs in (("ForwardKL", False), ("ForwardKLLoss", False), ("Other", True)):
        now = {**values, "kd_loss": {"_component_": f"kdtune.losses.{name}"}}
        with pytest.raises(ConfigError, match="kd_loss") if differs else nullcontext():
            assert step_to_resume(tmp_path, now, may_change=may_change(TrainingConfig), batches_per_step=4) is None
