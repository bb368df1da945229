"""The finetune recipe on tiny models: adapters and all parameters, what it writes, how it resumes."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import Fork
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kdtune.checkpoint import load_model, step_folders
from kdtune.distributed import SINGLE_PROCESS
from kdtune.evaluation import evaluate_ce

ROOT = Path(__file__).parents[2]
DROPOUT = "adapter.lora_dropout=0.1"


def arguments(output_dir: Path, *overrides: str) -> list[str]:
    return ["run", "lora_finetune_single_device", "--config", "tiny/finetune", f"output_dir={output_dir}", "sample_prompts=[]",
            *overrides]  # fmt: skip


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(output_dir) if "loss" in row]


@pytest.fixture(scope="module")
def base(good: Path) -> str:
    return f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good / 'model'}}}"


@pytest.fixture(scope="module")
def finished(cli, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("finetune") / "out"
    done = cli(*arguments(output_dir, base, DROPOUT, "save_every_n_steps=5"))
    assert done.code == 0, done.err
    assert "model, step 0" in done.out and "KL" not in done.out
    return output_dir


def test_the_held_out_loss_falls_and_is_the_models(finished: Path) -> None:
    validated = [row["val_class_loss"] for row in rows(finished) if "val_class_loss" in row]
    assert validated[-1] < validated[0] - 0.05
    from kdtune import data, tokenizers

    tokenizer = tokenizers.load(finished / "final", max_seq_len=256)
    held_out = data.batches(data.quickstart_dataset(tokenizer, split="test"), 4, pad_id=tokenizer.pad_id)
    merged = evaluate_ce(load_model(finished / "final"), held_out, world=SINGLE_PROCESS)
    assert merged["class_loss"] == pytest.approx(validated[-1], rel=1e-5)


def test_only_the_adapters_are_trained(finished: Path, good: Path) -> None:
    before, after = (load_model(folder).state_dict() for folder in (good / "model", finished / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if any(part in name for part in ("q_proj", "v_proj", "output_proj", "mlp.")
                                              ) and not name.endswith("norm.weight")}  # fmt: skip
    assert changed == adapted


def test_merged_and_adapter_agree_with_peft(finished: Path, good: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(finished / "final").eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(good / "model"), finished / "final" / "adapter"
    )
    tokens = torch.randint(0, 258, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted.eval()(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("save_weights", "merged"), [("adapter", False), ("merged", True)])
def test_one_form_of_the_weights(cli, base: str, tmp_path: Path, save_weights: str, merged: bool) -> None:
    output_dir = tmp_path / "out"
    done = cli(*arguments(output_dir, base, f"save_weights={save_weights}", "max_steps_per_epoch=2", "dataset_val=null",
                          "run_val_every_n_steps=null", "save_every_n_steps=null"))  # fmt: skip
    assert done.code == 0, done.err
    assert (output_dir / "final" / "model.safetensors").exists() == merged
    assert (output_dir / "final" / "adapter_model.safetensors").exists() != merged
    assert not (output_dir / "final" / "adapter").exists()


def test_a_finetuned_adapter_serves_as_teacher_and_as_start(cli, finished: Path, good: Path, tmp_path: Path) -> None:
    """base + adapter as the teacher gives the KL that the merged model gives; the student starts from an adapter too."""
    node = "{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: %s%s}"
    adapted = node % (good / "model", f", adapter_dir: {finished / 'final' / 'adapter'}")
    first = {}
    for name, teacher in (("adapter", adapted), ("merged", node % (finished / "final", ""))):
        done = cli("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={tmp_path / name}",
                   "sample_prompts=[]", "max_steps_per_epoch=2", "model=null", "teacher_model=null",
                   f"teacher_checkpointer={teacher}", f"checkpointer={adapted}",
                   "adapter={_component_: kdtune.models.apply_lora, lora_rank: 4, lora_alpha: 8}")  # fmt: skip
        assert done.code == 0, done.err
        first[name] = rows(tmp_path / name)
    assert first["adapter"][0]["val_kd_loss"] == pytest.approx(0.0, abs=1e-5)
    assert first["adapter"][2]["kd_loss"] == pytest.approx(first["merged"][2]["kd_loss"], abs=1e-6)


def test_a_base_in_four_bits_learns(cli, base: str, tmp_path: Path) -> None:
    done = cli(*arguments(tmp_path / "out", base, "adapter.quantize_base=true"))
    assert done.code == 0, done.err
    validated = [row["val_class_loss"] for row in rows(tmp_path / "out") if "val_class_loss" in row]
    assert validated[-1] < validated[0] - 0.05
    load_model(tmp_path / "out" / "final")


@pytest.mark.parametrize(
    ("num_kills", "adapter"),
    [
        pytest.param(1, (DROPOUT,), id="once"),
        *(
            pytest.param(2, adapter, id=kind, marks=pytest.mark.slow("two kills of a process for every kind of adapter"))
            for kind, adapter in {"lora": (DROPOUT,), "dora": ("adapter.use_dora=true",), "full": ("adapter=null",)}.items()
        ),
    ],
)  # fmt: skip
def test_killed_and_resumed_is_bit_identical(
    cli, base: str, tmp_path: Path, num_kills: int, adapter: tuple[str, ...]
) -> None:
    """Dropout draws the same after a resume, and adapters come back from the step folder."""
    settings = (base, *adapter, "save_every_n_steps=1", "run_val_every_n_steps=null", "resume_from_checkpoint=true")
    assert cli(*arguments(tmp_path / "whole", *settings)).code == 0
    expected, output_dir = losses(tmp_path / "whole"), tmp_path / "killed"
    draw = random.Random(0)
    for _ in range(num_kills):
        before, process = len(step_folders(output_dir)), Fork(*arguments(output_dir, *settings))
        while process.is_running and len(step_folders(output_dir)) <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.05))
        process.send(signal.SIGKILL)
        process.end()
        assert step_folders(output_dir)
    assert len(step_folders(output_dir)) < len(expected), "the run ended before it was killed"
    assert cli(*arguments(output_dir, *settings)).code == 0
    assert losses(output_dir) == expected
    ours, whole = (load_model(tmp_path / name / "final").state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_refuses_an_adapter_for_another_base(cli, finished: Path, good: Path, tmp_path: Path) -> None:
    other = tmp_path / "adapter"
    shutil.copytree(finished / "final" / "adapter", other)
    settings = json.loads((other / "adapter_config.json").read_text())
    settings["r"] = 3
    (other / "adapter_config.json").write_text(json.dumps(settings))
    node = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good / 'model'}, adapter_dir: {other}}}"
    done = cli(*arguments(tmp_path / "out", node))
    assert done.code == 2
    assert "lora_A" in done.err and "3" in done.err and "4" in done.err
    assert not (tmp_path / "out").exists()


def test_refuses_save_weights_without_adapters(cli, base: str, tmp_path: Path) -> None:
    done = cli(*arguments(tmp_path / "out", base, "adapter=null", "save_weights=adapter"))
    assert done.code == 2 and "save_weights=adapter" in done.err
    assert not (tmp_path / "out").exists()


def test_refuses_save_weights_of_a_builder_without_adapters(cli, tmp_path: Path) -> None:
    done = cli(*arguments(tmp_path / "out", "adapter=null", "save_weights=merged"))
    assert done.code == 2 and "save_weights=merged: the model has no adapters" in done.err
    assert not (tmp_path / "out").exists()


def test_refuses_more_steps_where_no_step_folder_is_left(cli, base: str, tmp_path: Path) -> None:
    settings = (
        base,
        "max_steps_per_epoch=2",
        "dataset_val=null",
        "run_val_every_n_steps=null",
        "save_every_n_steps=null",
    )
    assert cli(*arguments(tmp_path / "out", *settings)).code == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    again = cli(*arguments(tmp_path / "out", *settings, "resume_from_checkpoint=true"))
    assert again.code == 0 and "all 2 steps are done" in again.out
    more = cli(*arguments(tmp_path / "out", *settings, "resume_from_checkpoint=true", "epochs=2"))
    assert more.code == 2 and "finished run of 2 steps without a step folder" in more.err
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_its_single_device_name_is_refused_under_torchrun(process, tmp_path: Path) -> None:
    command, *rest = arguments(tmp_path / "out")
    done = process(command, "--nproc_per_node", "2", *rest)
    assert done.code == 2 and "runs on one process, found torchrun" in done.err
    assert not (tmp_path / "out").exists()


def test_the_second_logger_gets_every_validation(cli, base: str, tmp_path: Path) -> None:
    done = cli(*arguments(tmp_path / "out", base, "log_every_n_steps=4", "run_val_every_n_steps=5",
                          "metric_logger=kdtune.training.TensorBoardLogger", f"metric_logger.log_dir={tmp_path / 'tb'}"))  # fmt: skip
    assert done.code == 0, done.err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    expected = {row["step"]: row["val_class_loss"] for row in rows(tmp_path / "out") if "val_class_loss" in row}
    assert {event.step: pytest.approx(event.value, rel=1e-6) for event in events.Scalars("val_class_loss")} == expected
    assert sorted(expected) == [0, 5, 10]
