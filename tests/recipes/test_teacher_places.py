"""Where the teacher is computed: keys that change nothing in the numbers, and what is refused before a weight is read."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import CLI

from kdtune import _assets, training
from kdtune.config.load import load
from kdtune.config.recipe import import_recipe
from kdtune.errors import ConfigError

RUN = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "max_steps_per_epoch=2", "save_every_n_steps=null",
       "run_val_every_n_steps=2", "sample_every_n_steps=null", "best_metric=null"]  # fmt: skip


def numbers(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "loss" in name or name == "grad_norm"} for row in rows]


def test_a_teacher_on_a_named_device_gives_the_same_run(cli: CLI, tmp_path: Path) -> None:
    more = ["hidden_loss=kdtune.losses.HiddenStateLoss", "dataset_val.split=test[:4]"]
    folders = tmp_path / "plain", tmp_path / "named"
    for folder, device in zip(folders, ([], ["teacher_device=cpu"]), strict=True):
        done = cli(*RUN, *more, *device, f"output_dir={folder}")
        assert done.code == 0, done.err
    plain, named = map(numbers, folders)
    assert plain == named and len(plain) == 3
    done = cli("run", "evaluate", f"run={folders[1]}", "batch_size=4")
    assert done.code == 0, done.err
    measured = json.loads((folders[1] / "evaluation" / "results.json").read_text())["metrics"]
    assert measured["held_out/kd_loss"] == pytest.approx(named[-1]["val_kd_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher_device=cuda:7"], "teacher_device=cuda:7: torch .* sees no CUDA device; use teacher_device=cpu"),
        (["teacher_device=tpu"], "teacher_device=tpu: unknown; use cpu, cuda, cuda:N, mps, or null for the student's"),
        (["teacher_offload=true"], "teacher_offload=true: needs a CUDA device for the teacher.* on cpu; set it to false"),
        (["teacher_offload=true", "teacher_device=cpu"], "teacher_offload=true: needs a CUDA device for the teacher"),
        (["teacher_overlap=true"], "teacher_overlap=true: needs a CUDA device, whose streams .* on cpu; set it to false"),
        (["teacher_overlap=true", "teacher_device=cpu"], "teacher_overlap=true, teacher_device=cpu: .* ~teacher_overlap"),
        (["teacher_offload=true", "teacher_quantization=int4"], "teacher_offload=true, teacher_quantization=int4: the layers are"),
        (["teacher_device=cpu", "~teacher_model", "teacher=kdtune.teachers.BaseOfStudent"], "teacher_device: has no effect beside"),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no GPU")
def test_what_is_refused(settings: list[str], message: str, cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, *settings, f"output_dir={tmp_path / 'out'}")
    assert done.code == 2 and re.search(message, " ".join(done.err.split())), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["teacher_device=cpu", "teacher_offload=true", "teacher_overlap=true"])
def test_what_several_processes_exclude(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = import_recipe(_assets.find_recipe("knowledge_distillation")).schema
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=f"{key}: is for a teacher in the student's processes, and with teacher_processes=1"
    ):
        load("tiny/knowledge_distillation", [key, "teacher_processes=1"], schema)
    divided = [key, "teacher_parallelism=kdtune.distributed.Parallelism"]
    copies = [*divided, "teacher_parallelism.dp_shard=1", "teacher_parallelism.dp_replicate=-1"]
    message = f"{key}: with teacher_parallelism, the teacher is divided among the processes; allowed is a copy on every process"
    for settings, is_refused in ((divided, True), (copies, False)):
        found = training.placement_problems(load("tiny/knowledge_distillation", settings, schema))
        assert any(one.startswith(message) for one in found) == is_refused, found
