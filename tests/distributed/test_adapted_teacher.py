"""A teacher with an adapter merged into it while it is loaded, in shards of every kind."""

from pathlib import Path

import pytest
from distributed_runs import FINETUNE, KD, check_same_rows, rows

LAYOUTS = {
    "1": (1, 4, []),
    "FSDP 2": (2, 2, []),
    "TP 2": (2, 4, ["parallelism.tp=2"]),
    "2 x 2": (4, 2, ["parallelism.tp=2"]),
}


@pytest.mark.parametrize(
    ("use_dora", "names"),
    [
        pytest.param(True, ["1", "FSDP 2", "TP 2"], id="dora"),
        pytest.param(
            True, ["1", "2 x 2"], id="dora, 2 x 2", marks=pytest.mark.slow("four processes on two cores; two cut each way")
        ),
        pytest.param(
            False, list(LAYOUTS), id="lora", marks=pytest.mark.slow("11 processes; DoRA's merge is LoRA's and a norm of whole rows")
        ),
    ],
)  # fmt: skip
def test_an_adapter_merged_into_shards(
    use_dora: bool, names: list[str], launch, small_model: Path, tmp_path: Path
) -> None:
    node = f"{{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}"
    ended = launch.kdtune(
        *FINETUNE, "adapter=kdtune.models.apply_lora", f"adapter.use_dora={use_dora}", "save_weights=adapter",
        "optimizer.lr=1e-2", "max_steps_per_epoch=4", f"checkpointer={node}}}", f"output_dir={tmp_path / 'made'}", ranks=1,
    )  # fmt: skip
    assert ended[0].code == 0, ended[0].text
    run = [*KD, f"teacher_checkpointer={node}, adapter_dir: {tmp_path / 'made' / 'final'}}}", "teacher_model=null",
           "optimizer=torch.optim.SGD", "~lr_scheduler", "max_steps_per_epoch=1", "sample_prompts=[]"]  # fmt: skip
    for name in names:
        ranks, accumulation, layout = LAYOUTS[name]
        ended = launch.kdtune(
            *run, *layout, f"gradient_accumulation_steps={accumulation}", f"output_dir={tmp_path / name}", ranks=ranks
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
        check_same_rows(rows(tmp_path / name), rows(tmp_path / "1"))
    # The adapter changes the teacher: without it, the first row has the base's cross entropy.
    ended = launch.kdtune(
        *run,
        f"teacher_checkpointer={node}}}",
        "gradient_accumulation_steps=4",
        f"output_dir={tmp_path / 'base'}",
        ranks=1,
    )
    assert ended[0].code == 0, ended[0].text
    first, base = rows(tmp_path / "1")[0], rows(tmp_path / "base")[0]
    assert abs(first["val_teacher_class_loss"] - base["val_teacher_class_loss"]) > 0.01
