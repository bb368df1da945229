"""A teacher cache as a step that cells share: what the shipped sweep runs, and cells that equal those with the teacher itself."""

import json
from pathlib import Path

import pytest
import yaml
from command_line import CLI, ROOT

from kdtune.sweeps.plan import make_plan

SWEEP = """recipe: sweep
output_dir: {folder}/sweep
steps:
  teacher:
    config: tiny/finetune
    overrides: [max_steps_per_epoch=3, "sample_prompts=[]", save_every_n_steps=null, adapter=null]
  cache_teacher:
    config: tiny/cache_teacher
    when: {{targets: cached}}
    overrides: [&teacher "teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {{teacher.dir}}/final}}",
      ~teacher_model, "dataset.split=train[:40]", stored_dtype=fp32]
  train:
    config: tiny/knowledge_distillation
    overrides: ["kd_ratio={{kd_ratio}}", "optimizer.lr={{lr}}", "dataset.split=train[:40]", ~teacher_model, ~dataset_val, epochs=2,
      optimizer=torch.optim.SGD, ~lr_scheduler, "sample_prompts=[]", save_every_n_steps=null, run_val_every_n_steps=null]
axes:
  targets:
    live: {{train: [*teacher]}}
    cached: {{train: [teacher=kdtune.teachers.CachedTeacher, "teacher.path={{cache_teacher.dir}}"]}}
  kd_ratio: [0.5, 1.0]
  lr: [0.1, 0.3]
metrics: [train.loss]
"""


def test_the_cells_of_the_case_study_share_one_capture_of_each_part() -> None:
    cells = {}
    for name in ("case_study_table5", "case_study_table5_cached"):
        text = (ROOT / "configs" / "sweeps" / f"{name}.yaml").read_text()
        config = yaml.safe_load(text.replace("${models_dir}", "/models"))
        plan = make_plan(steps_dir="/steps", **{key: config[key] for key in ("steps", "axes", "grids")})
        assert not plan.problems
        cells[name] = [cell.axes for cell in plan.cells]
    assert cells["case_study_table5_cached"] == cells["case_study_table5"] and len(plan.cells) == 18
    by_name = [step.name for step in plan.steps]
    assert [by_name.count(name) for name in ("cache_teacher", "cache_held_out", "kd")] == [1, 1, 12]
    (kd, *_) = (step for step in plan.steps if step.name == "kd")
    captures = {step.name: step.folder for step in plan.steps if step.name.startswith("cache_")}
    assert f"teacher.path={captures['cache_teacher']}" in kd.overrides
    assert f"teacher.validation={captures['cache_held_out']}" in kd.overrides


@pytest.mark.slow(
    "a sweep of ten processes, each of which imports torch; tests/recipes/test_cached_runs.py compares runs"
)
def test_cells_from_a_cache_equal_those_of_the_teacher(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path))
    done = cli("run", "sweep", "--config", str(tmp_path / "sweep.yaml"))
    assert done.code == 0, done.out + done.err
    results = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    found = {tuple(one["axes"][axis] for axis in ("targets", "kd_ratio", "lr")): one["metrics"] for one in results}
    assert len(found) == 8 and len(list((tmp_path / "sweep" / "steps").glob("cache_teacher-*.json"))) == 1
    for (targets, *others), metrics in found.items():
        if targets == "cached":
            live = found["live", *others]
            for name in ("train.loss", "train.kd_loss", "train.class_loss"):
                assert metrics[name] == pytest.approx(live[name], rel=1e-5), (others, name)
