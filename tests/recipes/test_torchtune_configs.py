"""torchtune's own configs become valid ones of kdtune or are refused with the reason, and its distilled pairs are shipped here."""

import importlib.metadata
import json
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI
from torchtune_text import KD

from kdtune import _assets
from kdtune.config.load import read_yaml
from kdtune.config.migrate import migrate
from kdtune.config.yaml_text import parse_yaml
from kdtune.errors import ConfigError


@dataclass(frozen=True)
class Pair:
    """A distillation of torchtune's: its config there, and what it has of its own."""

    config: str
    student: str
    teacher: str
    folders: tuple[str, str]
    batch_size: int = 4
    rank: int = 64
    epochs: int = 1
    recomputes: bool = False
    processes: int = 1


CASE_STUDY = Pair("llama3_2/8B_to_1B_KD_lora_single_device", "llama3_2.lora_llama3_2_1b", "llama3_1.llama3_1_8b",
                  ("Llama-3.2-1B-Instruct", "Meta-Llama-3.1-8B-Instruct"))  # fmt: skip
QWEN2 = Pair("qwen2/1.5_to_0.5B_KD_lora_single_device", "qwen2.lora_qwen2_0_5b", "qwen2.qwen2_1_5b",
             ("Qwen2-0.5B-Instruct", "Qwen2-1.5B-Instruct"), batch_size=8, rank=32)  # fmt: skip
LONG: dict[str, Any] = {"batch_size": 2, "epochs": 5, "recomputes": True}


def on_two_processes(pair: Pair) -> Pair:
    return replace(pair, config=pair.config.replace("single_device", "distributed"), processes=2)


# torchtune's six, by ours.
PAIRS = {
    "llama3_2/knowledge_distillation_single_device": CASE_STUDY,
    "llama3_2/knowledge_distillation_distributed": on_two_processes(CASE_STUDY),
    "qwen2/1.5B_to_0.5B_kd_single_device": QWEN2,
    "qwen2/1.5B_to_0.5B_kd_distributed": on_two_processes(QWEN2),
    "qwen2_5/14B_to_7B_kd_single_device": Pair(
        "qwen2_5/14B_to_7B_KD_lora_single_device", "qwen2_5.lora_qwen2_5_7b", "qwen2_5.lora_qwen2_5_14b_instruct",
        ("Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct"), **LONG,
    ),
    "qwen3/14B_to_8B_kd_single_device": Pair(
        "qwen3/14B_to_8B_KD_lora_single_device", "qwen3.lora_qwen3_8b_base", "qwen3.lora_qwen3_14b_instruct", ("Qwen3-8B", "Qwen3-14B"),
        **LONG,
    ),
}  # fmt: skip
DEFAULTS = {
    "kd_loss": {"_component_": "kdtune.losses.ForwardKL"},
    "epochs": 1,
    "enable_activation_checkpointing": False,
}
# Arguments of adapters with torchtune's and our default.
AS_WITHOUT = {"apply_lora_to_output": False, "lora_dropout": 0.0}


FORWARD_KL = ("kd_loss=torchtune.modules.loss.ForwardKLWithChunkedOutputLoss", "~kd_loss.sym_kd_ratio")


def of_pair(pair: Pair) -> list[str]:
    """What a pair's config has otherwise than `KD`, as overrides of torchtune's."""
    kind = pair.student.partition(".")[0]
    folder = f"/tmp/{pair.folders[0]}"
    is_adapted = "lora" in pair.teacher
    if kind == "llama3_2":
        tokenizer = ["tokenizer=torchtune.models.llama3.llama3_tokenizer", f"tokenizer.path={folder}/original/tokenizer.model",
                     "~tokenizer.merges_file"]  # fmt: skip
    else:
        tokenizer = [f"tokenizer=torchtune.models.{kind}.{kind}_tokenizer", f"tokenizer.path={folder}/vocab.json",
                     f"tokenizer.merges_file={folder}/merges.txt"]  # fmt: skip
    return [
        f"model=torchtune.models.{pair.student}", "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
        f"model.lora_rank={pair.rank}", f"model.lora_alpha={2 * pair.rank}", "model.lora_dropout=0.0",
        f"teacher_model=torchtune.models.{pair.teacher}", *([] if is_adapted else ["~teacher_model.lora_attn_modules"]),
        *tokenizer, f"checkpointer.checkpoint_dir={folder}/", f"teacher_checkpointer.checkpoint_dir=/tmp/{pair.folders[1]}/",
        f"batch_size={pair.batch_size}", "optimizer.weight_decay=0.01", *FORWARD_KL, "kd_ratio=0.5", f"epochs={pair.epochs}",
        "gradient_accumulation_steps=8", "device=cuda", f"enable_activation_checkpointing={pair.recomputes}",
    ]  # fmt: skip


def what_matters(values: dict[str, Any], processes: int) -> dict[str, Any]:
    """What a distillation is: its models, data, losses and steps.

    By design ours have a validation, clip, and cut examples at 2,048 tokens; they read the folder's chat template; their step is the same
    on one process and on several; the teacher of the case study is finetuned first.
    """
    values = DEFAULTS | values
    keys = ("kd_loss", "kd_ratio", "lr_scheduler", "device", "dtype", "batch_size", *DEFAULTS)
    found = {key: values[key] for key in keys}
    if processes == 1:
        found["gradient_accumulation_steps"] = values["gradient_accumulation_steps"]
    found["optimizer"] = {key: value for key, value in values["optimizer"].items() if key != "fused"}
    found["model"] = {key: value for key, value in values["model"].items() if AS_WITHOUT.get(key) != value}
    found["teacher_model"] = values["teacher_model"]["_component_"]
    found["student's folder"] = Path(values["checkpointer"]["checkpoint_dir"]).name
    found["tokenizer's folder"] = Path(values["tokenizer"]["path"].removesuffix("/original/tokenizer.model")).name
    found["dataset"] = values["dataset"]["_component_"]
    return found


def assert_same(name: str, migrated: dict[str, Any]) -> None:
    processes = PAIRS[name].processes
    ours = read_yaml(_assets.find_config(name).path)
    assert what_matters(migrated, processes) == what_matters(ours, processes)
    teacher = ours["teacher_checkpointer"]["checkpoint_dir"]
    assert Path(migrated["teacher_checkpointer"]["checkpoint_dir"]).name == Path(teacher).name or teacher.endswith(
        "/final"
    )


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_torchtunes_is_shipped(name: str, tmp_path: Path) -> None:
    (tmp_path / "kd.yaml").write_text(KD)
    assert_same(name, dict(parse_yaml(migrate(tmp_path / "kd.yaml", of_pair(PAIRS[name])).text)))
    with pytest.raises(ConfigError, match=f"torchtune's is '{name}' here"):
        _assets.find_config(PAIRS[name].config)


def shipped(folder: Path) -> list[Path]:
    """torchtune's configs: of the installed package, or of its wheel in KDTUNE_TEST_MODELS, unpacked into the folder."""
    try:
        files = importlib.metadata.files("torchtune") or []
        found = [Path(str(file.locate())) for file in files if re.match(r"recipes/configs/.*\.yaml$", str(file))]
        if found:
            return sorted(found)
    except importlib.metadata.PackageNotFoundError:
        pass
    wheels = sorted(Path(os.environ.get("KDTUNE_TEST_MODELS", "/nonexistent")).glob("torchtune-0.6*.whl"))
    if not wheels:
        pytest.skip(
            "torchtune is not installed, and KDTUNE_TEST_MODELS has no wheel of it (pip download torchtune==0.6.1 --no-deps)"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if re.match(r"recipes/configs/.*\.yaml$", name)]
        wheel.extractall(folder, names)
    return sorted(folder / name for name in names)


# Why a config is refused: by its name, or the folder of its family.
REFUSED = {
    r"_dpo|_ppo_": "preferences or rewards",
    r"_qat_": "trains for quantization",
    r"^(gemma|llama3_2_vision)/|^dev/11B": "kdtune has no model",
}


@pytest.mark.slow("validates more than a hundred configs, and builds their models without weights")
def test_every_config_of_torchtunes_becomes_a_valid_one_or_is_refused(cli: CLI, tmp_path: Path) -> None:
    refused: dict[str, list[str]] = {reason: [] for reason in REFUSED.values()}
    valid = []
    for path in shipped(tmp_path / "wheel"):
        name = str(path).rpartition("recipes/configs/")[2]
        new = tmp_path / "new" / name
        new.parent.mkdir(parents=True, exist_ok=True)
        done = cli("migrate", str(path), "-o", str(new))
        reason = next((reason for pattern, reason in REFUSED.items() if re.search(pattern, name)), None)
        if reason is not None:
            assert done.code == 2 and reason in done.err and not new.exists(), name
            refused[reason].append(name)
            continue
        assert done.code == 0, f"{name}: {done.err}"
        done = cli("validate", str(new))
        assert (done.code, done.err) == (0, ""), f"{name}: {done.err}"
        valid.append(name)
        for ours, pair in PAIRS.items():
            if f"{pair.config}.yaml" == name:
                assert_same(ours, read_yaml(new))
    assert len(valid) >= 120 and all(refused.values())


SMOLLM2 = {"vocab_size": 49152, "num_heads": 9, "num_kv_heads": 3, "embed_dim": 576, "intermediate_dim": 1536, "max_seq_len": 8192,
           "rope_base": 100000, "scale_factor": 1}  # fmt: skip


def of_real_pair(folder: Path, rows: Path, output_dir: Path) -> list[str]:
    """What a short distillation of SmolLM2's 30 layers into 12 has otherwise than `KD`."""
    sizes = [f"{key}.{name}={size}" for key in ("model", "teacher_model") for name, size in SMOLLM2.items()]
    return [
        f"output_dir={output_dir}", "model=torchtune.models.llama3_2.lora_llama3_2", "model.num_layers=12",
        "teacher_model=torchtune.models.llama3_2.llama3_2", "teacher_model.num_layers=30", *sizes, "~teacher_model.lora_attn_modules",
        f"tokenizer.path={folder}/student/vocab.json", f"tokenizer.merges_file={folder}/student/merges.txt", "tokenizer.max_seq_len=64",
        f"checkpointer.checkpoint_dir={folder}/student", f"teacher_checkpointer.checkpoint_dir={folder}/teacher",
        "teacher_checkpointer.checkpoint_files=[model.safetensors]", "dataset=torchtune.datasets.instruct_dataset", "~dataset.packed",
        "dataset.source=json", f"dataset.data_files={rows}", "dataset.column_map={input: question, output: answer}",
        "dataset.split=train", "shuffle=False", "batch_size=2", "optimizer.lr=3e-3", "lr_scheduler.num_warmup_steps=1", *FORWARD_KL,
        "kd_ratio=1.0", "epochs=3", "max_steps_per_epoch=1", "gradient_accumulation_steps=1", "dtype=fp32",
        "~save_adapter_weights_only", "~enable_activation_offloading", "~clip_grad_norm", "~mystery",
    ]  # fmt: skip


@pytest.mark.real
@pytest.mark.slow("three steps of a real model")
def test_a_migrated_distillation_of_the_real_pair_runs(real_pair: Path, cli: CLI, tmp_path: Path) -> None:
    rows, old, new = tmp_path / "rows.jsonl", tmp_path / "torchtune.yaml", tmp_path / "new.yaml"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(2)))
    old.write_text(KD)
    done = cli("migrate", str(old), "-o", str(new), *of_real_pair(real_pair, rows, tmp_path / "run"))
    assert done.code == 0, done.err
    done = cli("run", "knowledge_distillation", "--config", str(new))
    assert done.code == 0, done.err
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["kd_loss"] for row in found if "kd_loss" in row]
    # Thrice the same two examples.
    assert len(losses) == 3 and losses[2] < losses[0]
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors").is_file()
