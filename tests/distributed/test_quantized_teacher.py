"""A teacher with quantized weights: a copy on each process, or on one of its own; never in shards."""

from pathlib import Path

import pytest
from distributed_runs import COPY, KD, PLAIN, check_same_rows, rows

QUANTIZE = ["run", "quantize", "--config", "tiny/quantize"]


@pytest.mark.parametrize(
    "scheme",
    ["int8_weight_only", pytest.param("nf4", marks=pytest.mark.slow("nine processes, as for the other scheme"))],
)
def test_a_copy_on_each_process(scheme: str, launch, tmp_path: Path) -> None:
    ended = launch.kdtune(*QUANTIZE, f"scheme={scheme}", f"output_dir={tmp_path / 'teacher'}", ranks=1)
    assert ended[0].code == 0, ended[0].text
    node = f"{{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path / 'teacher'}}}"
    run = [*KD, *PLAIN, f"teacher_checkpointer={node}", "teacher_model=null", "max_steps_per_epoch=2"]
    layouts = {
        "alone": (1, 2, []),
        "copies": (2, 1, COPY),
        "apart": (3, 1, ["teacher_processes=1"]),
        "sharded": (2, 1, []),
    }
    for name, (ranks, accumulation, layout) in layouts.items():
        out = tmp_path / name
        ended = launch.kdtune(
            *run, *layout, f"gradient_accumulation_steps={accumulation}", f"output_dir={out}", ranks=ranks
        )
        if name == "sharded":
            assert [rank.code for rank in ended] == [2, 2] and not out.exists()
            assert "holds quantized weights, which cannot be sharded; a teacher can be a copy" in ended[0].text
        else:
            assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
            check_same_rows(rows(out), rows(tmp_path / "alone"))
