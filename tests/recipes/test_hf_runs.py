"""Runs whose teacher or student transformers computes, through the recipes; the folders are made here, by transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import CLI, ROOT
from safetensors.torch import load_file

from kdtune.tokenizers import byte_tokenizer

KD = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation")
FINETUNE = ("run", "finetune", "--config", "tiny/finetune")
SHORT = ("max_steps_per_epoch=4", "save_every_n_steps=2", "run_val_every_n_steps=2", "dataset.split=train[:40]",
         "dataset_val.split=test[:4]", "sample_max_new_tokens=4")  # fmt: skip
MEASURED = {"time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_rss"}
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gpt_neox` and `stablelm`, with the tiny configs' tokenizer."""
    found = tmp_path_factory.mktemp("hf")
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    for seed, name in enumerate(("gpt_neox", "stablelm")):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(name, **SIZES, **ids)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found / name)
        tokenizer.save(found / name, is_chat=True)
    return found


def node(prefix: str, folder: Path) -> list[str]:
    return [
        f"~{prefix}model",
        f"{prefix}checkpointer=kdtune.checkpoint.Checkpointer",
        f"{prefix}checkpointer.checkpoint_dir={folder}",
        f"{prefix}checkpointer.family=kdtune.models.hf_model",
    ]


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def discard(folder: Path, *names: str) -> None:
    """As if the run had been killed before it wrote them."""
    for name in names:
        for file in sorted((folder / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (folder / name).rmdir()


@pytest.mark.parametrize("adapter", ["null", "kdtune.models.apply_lora"])
def test_teacher_and_student_of_transformers_train_and_resume_to_the_bit(
    adapter: str, cli: CLI, folders: Path, tmp_path: Path
) -> None:
    arguments = [*KD, *SHORT, *node("", folders / "stablelm"), *node("teacher_", folders / "gpt_neox"), "kd_ratio=0.7",
                 f"adapter={adapter}",
                 "activation_checkpointing=full"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = cli(*arguments, f"output_dir={whole}")
    assert done.code == 0, done.err
    found = rows(whole)
    assert found[-1]["val_class_loss"] < found[0]["val_class_loss"] and found[-1]["val_kd_loss"] >= 0
    assert cli(*arguments, f"output_dir={cut}").code == 0
    discard(cut, "final", "step_4")
    assert cli(*arguments, f"output_dir={cut}", "resume_from_checkpoint=true").code == 0
    assert rows(cut) == found
    first, second = (load_file(out / "final" / "model.safetensors") for out in (whole, cut))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "final")
    assert type(model).__name__ == "StableLmForCausalLM"
    measured = cli("run", "evaluate", f"run={whole}")
    assert measured.code == 0, measured.err
    results = json.loads((whole / "evaluation" / "results.json").read_text())["metrics"]
    assert results["held_out/class_loss"] == pytest.approx(found[-1]["val_class_loss"], rel=1e-4)
    assert results["held_out/kd_loss"] == pytest.approx(found[-1]["val_kd_loss"], rel=1e-4)
    said = cli("run", "generate", "--config", "tiny/generate", *node("", whole / "final"), "max_new_tokens=3",
               "tokenizer=kdtune.tokenizers.load", f"tokenizer.path={whole / 'final'}")  # fmt: skip
    assert said.code == 0, said.err


def test_a_teacher_with_another_tokenizer(cli: CLI, folders: Path, other_tokenizer: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "gpt_neox", **SIZES | {"vocab_size": 700, "max_position_embeddings": 512}
    )
    folder = tmp_path / "teacher"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    done = cli(*KD, *SHORT, *node("teacher_", folder), "kd_loss=kdtune.losses.HybridULD", f"output_dir={tmp_path / 'run'}",
               "teacher_tokenizer=kdtune.tokenizers.load", f"teacher_tokenizer.path={other_tokenizer}")  # fmt: skip
    assert done.code == 0, done.err
    found = rows(tmp_path / "run")
    assert found[-1]["val_kd_loss"] < found[0]["val_kd_loss"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("parallelism.tp=2",), "parallelism: tp=2"),
        (("teacher_quantization=int8",), "teacher_quantization=int8: a model that transformers computes"),
        (("compile=true",), "compile=true: is there for kdtune's own decoder"),
        (("hidden_loss=kdtune.losses.HiddenStateLoss",), "hidden_loss: "),
    ],
)  # fmt: skip
def test_what_it_lacks_is_refused_by_the_key_before_a_weight_is_read(
    given: tuple[str, ...], wanted: str, cli: CLI, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdtune.checkpoint.checkpointer.fill_model", lambda *_, **__: pytest.fail("a weight is read"))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items() if "tp" in given[0] else ():
        monkeypatch.setenv(name, value)
    done = cli(
        *KD,
        *SHORT,
        *node("", folders / "stablelm"),
        *node("teacher_", folders / "gpt_neox"),
        *given,
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.code == 2 and wanted in done.err, done.err


def test_plan_prune_and_quantize_refuse_it(cli: CLI, folders: Path, tmp_path: Path) -> None:
    planned = cli("plan", "tiny/knowledge_distillation", *node("", folders / "stablelm"))
    assert planned.code == 2 and "family=kdtune.models.hf_model" in planned.err
    for recipe in ("prune", "quantize"):
        done = cli(
            "run",
            recipe,
            "--config",
            f"tiny/{recipe}",
            *node("", folders / "stablelm"),
            f"output_dir={tmp_path / recipe}",
        )
        assert done.code == 2 and "transformers" in done.err, done.err


@pytest.mark.slow(
    "a process of its own that imports torch and trains; test_hf_model.py sees the import in one that does not"
)
def test_a_run_without_it_does_not_import_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from kdtune._cli.main import main\n"
        f"try: main({[*KD, *SHORT, f'output_dir={tmp_path}']!r})\n"
        "except SystemExit as ended: print(ended.code, 'transformers' in sys.modules, 'kdtune.models.hf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "0 False False"
