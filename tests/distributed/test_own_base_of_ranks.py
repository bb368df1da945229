"""The base of a LoRA student as its teacher, where the base lies in shards."""

from pathlib import Path

import pytest
from distributed_runs import ADAPTERS, KD, PLAIN, check_same_rows, rows


@pytest.mark.slow("three processes of the launcher; the tests of one process say what it computes")
@pytest.mark.parametrize("kind", ["dora", "qdora"])
def test_shards_give_the_numbers_of_one_process(kind: str, launch, tmp_path: Path) -> None:
    run = [
        *KD,
        *PLAIN,
        *ADAPTERS[kind],
        "~teacher_model",
        "teacher=kdtune.teachers.BaseOfStudent",
        "max_steps_per_epoch=3",
    ]
    for name, ranks, accumulation in (("one", 1, 2), ("two", 2, 1)):
        ended = launch.kdtune(
            *run, f"gradient_accumulation_steps={accumulation}", f"output_dir={tmp_path / name}", ranks=ranks
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "two"), rows(tmp_path / "one"))
