"""Options that save memory where the student lies in shards."""

from pathlib import Path

import pytest
from distributed_runs import KD, PLAIN, check_same_rows, rows

OPTIONS = {
    "in backward": ["optimizer_in_backward=true", "~clip_grad_norm"],
    "selective": ["activation_checkpointing=selective", "~clip_grad_norm"],
    "every second layer": ["activation_checkpointing=2", "~clip_grad_norm"],
}


@pytest.mark.slow("three processes of the launcher for each option; pairs of options are tested in one process")
@pytest.mark.parametrize("name", OPTIONS)
def test_shards_give_the_numbers_of_one_process(name: str, launch, tmp_path: Path) -> None:
    layouts = {"one": (1, ["batch_size=4", "~clip_grad_norm"]), "two": (2, ["batch_size=2", *OPTIONS[name]])}
    for layout, (ranks, settings) in layouts.items():
        out = f"output_dir={tmp_path / layout}"
        run = [
            *KD,
            *PLAIN,
            "optimizer.lr=0.03",
            "gradient_accumulation_steps=1",
            "max_steps_per_epoch=3",
            *settings,
            out,
        ]
        ended = launch.kdtune(*run, ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "two"), rows(tmp_path / "one"))
