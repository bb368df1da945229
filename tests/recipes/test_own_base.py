"""Distillation of a LoRA student from its own base: no KL at the start, and a run that is resumed to the bit."""

import json
import shutil
from pathlib import Path

import torch
from command_line import CLI
from safetensors.torch import load_file

RUN = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "~teacher_model",
       "teacher=kdtune.teachers.BaseOfStudent", "save_every_n_steps=2", "max_steps_per_epoch=4", "run_val_every_n_steps=4"]  # fmt: skip
ADAPTER = ["adapter=kdtune.models.apply_lora", "adapter.lora_dropout=0.2", "adapter.use_dora=true"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_from_no_kl_at_the_start_and_resumed(cli: CLI, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = cli(*RUN, *ADAPTER, f"output_dir={whole}")
    assert done.code == 0, done.err
    first, *_, last = rows(whole)
    assert abs(first["val_kd_loss"]) < 1e-6 and first["val_agreement"] == 1.0
    assert last["val_kd_loss"] > 1e-5 and last["val_class_loss"] < first["val_class_loss"]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [one["model"] for one in samples] == ["student", "teacher", "student"]
    assert samples[0]["answer"] == samples[1]["answer"]

    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "step_4")
    done = cli(*RUN, *ADAPTER, f"output_dir={part}", "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    end, resumed = (load_file(folder / "final" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(end[key], resumed[key]) for key in end)
    assert rows(part)[-1]["val_kd_loss"] == last["val_kd_loss"]


def test_a_student_without_adapters_is_refused_before_a_weight_is_read(cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, f"output_dir={tmp_path / 'out'}")
    assert done.code == 2 and "the student without its adapters, and it has none; give `adapter`" in done.err
    assert not (tmp_path / "out").exists()
