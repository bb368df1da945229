"""Sparse targets of a live teacher through the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

SAMPLED = "teacher_targets={_component_: kdtune.losses.SampledTargets, num_samples: 8}"
TOP_K = "teacher_targets={_component_: kdtune.losses.TopKTargets, k: 4}"


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(cli: CLI, out: Path, *overrides: str) -> list[dict[str, Any]]:
    done = cli(
        "run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={out}", "sample_prompts=[]",
        "run_val_every_n_steps=null", "save_every_n_steps=2", *overrides,
    )  # fmt: skip
    assert done.code == 0, done.err
    return rows(out)


def test_draws_go_on_where_they_stopped(cli: CLI, tmp_path: Path) -> None:
    """A resumed run draws what the uninterrupted one draws: the generator's state is part of the checkpoint."""
    whole = train(cli, tmp_path / "whole", SAMPLED, "max_steps_per_epoch=4")
    train(cli, tmp_path / "parts", SAMPLED, "max_steps_per_epoch=2")
    resumed = train(cli, tmp_path / "parts", SAMPLED, "max_steps_per_epoch=4", "resume_from_checkpoint=true")
    steps = [[row["kd_loss"] for row in found if "kd_loss" in row and row["step"] > 2] for found in (whole, resumed)]
    assert len(steps[0]) == 2 and steps[0] == steps[1]
    # The KL of the whole distribution is measured all the same.
    assert whole[-1]["val_forward_kl"] > 0


def test_the_tail_is_a_lower_bound_of_what_is_validated(cli: CLI, tmp_path: Path) -> None:
    found = train(cli, tmp_path / "run", TOP_K, "max_steps_per_epoch=2")
    validated = [row for row in found if "val_kd_loss" in row]
    assert validated and all(0 <= row["val_kd_loss"] <= row["val_forward_kl"] for row in validated)


@pytest.mark.parametrize(
    ("kd_loss", "targets", "said"),
    [
        (
            "kdtune.losses.AdaptiveKL",
            TOP_K,
            "TopKTargets cannot serve adaptive KL (0.5): AdaptiveKL needs the probability of each id",
        ),
        (
            "{_component_: kdtune.losses.ForwardKL, temperature: 2.0}",
            SAMPLED,
            "temperature=2 needs all of the teacher's probabilities",
        ),
    ],
)
def test_what_is_not_defined_is_refused_when_the_config_is_read(
    cli: CLI, tmp_path: Path, kd_loss: str, targets: str, said: str
) -> None:
    done = cli(
        "validate", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={tmp_path / 'run'}",
        f"kd_loss={kd_loss}", targets,
    )  # fmt: skip
    assert done.code == 2 and said in done.err and "teacher_targets: " in done.err
