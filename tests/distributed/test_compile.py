"""torch.compile on several processes gives the numbers of one process without it."""

import shutil
from pathlib import Path

import pytest
from distributed_runs import ADAPTERS, FULL, KD, PLAIN, check_same_rows, rows

from kdtune._cli.main import main

LAYOUTS = {
    "FSDP 2": (2, 1, []),
    "FSDP 2, recomputed": (2, 1, ["enable_activation_checkpointing=true"]),
    "FSDP 2, NF4": (2, 1, ADAPTERS["qdora"]),
    "TP 2": (2, 2, ["parallelism.tp=2"]),
    "TP 2, recomputed": (2, 2, ["parallelism.tp=2", "enable_activation_checkpointing=true"]),
}


@pytest.mark.slow("a C++ compiler works for minutes, on each process anew")
@pytest.mark.skipif(not FULL, reason="compiling takes minutes: KDTUNE_TEST_FULL=1")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers(layout: str, launch, tmp_path: Path) -> None:
    ranks, accumulation, settings = LAYOUTS[layout]
    run = [*KD, *PLAIN, "max_steps_per_epoch=3", "dataset_val=null", "run_val_every_n_steps=null"]
    model = settings if settings == ADAPTERS["qdora"] else []
    ended = launch.kdtune(*run, *model, "gradient_accumulation_steps=2", f"output_dir={tmp_path / 'plain'}", ranks=1)
    assert ended[0].code == 0, ended[0].text
    started = launch.start(
        main, [*run, *settings, "compile=true", f"gradient_accumulation_steps={accumulation}",
                      f"output_dir={tmp_path / 'compiled'}"], ranks=ranks,
    )  # fmt: skip
    ended = launch.wait(started, timeout=600)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), tolerance=1e-4)
