"""torchtune's own configs become valid ones of kdtune or are refused with the reason, and its distilled pairs are shipped here."""

import importlib.metadata
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

from kdtune import _assets
from kdtune.config.load import read_yaml
from kdtune.config.migrate import migrate
from kdtune.config.yaml_text import parse_yaml
from kdtune.errors import ConfigError

# torchtune's six: ours, theirs, processes; builders of student and teacher; folders; rank, alpha; batch size, epochs, recomputation.
PAIRS: dict[str, tuple[str, int, tuple[str, str], tuple[str, str], tuple[int, int], tuple[int, int, bool]]] = {
    "llama3_2/knowledge_distillation_single_device": (
        "llama3_2/8B_to_1B_KD_lora_single_device", 1, ("llama3_2.lora_llama3_2_1b", "llama3_1.llama3_1_8b"),
        ("Llama-3.2-1B-Instruct", "Meta-Llama-3.1-8B-Instruct"), (64, 128), (4, 1, False),
    ),
    "llama3_2/knowledge_distillation_distributed": (
        "llama3_2/8B_to_1B_KD_lora_distributed", 2, ("llama3_2.lora_llama3_2_1b", "llama3_1.llama3_1_8b"),
        ("Llama-3.2-1B-Instruct", "Meta-Llama-3.1-8B-Instruct"), (64, 128), (4, 1, False),
    ),
    "qwen2/1.5B_to_0.5B_kd_single_device": (
        "qwen2/1.5_to_0.5B_KD_lora_single_device", 1, ("qwen2.lora_qwen2_0_5b", "qwen2.qwen2_1_5b"),
        ("Qwen2-0.5B-Instruct", "Qwen2-1.5B-Instruct"), (32, 64), (8, 1, False),
    ),
    "qwen2/1.5B_to_0.5B_kd_distributed": (
        "qwen2/1.5_to_0.5B_KD_lora_distributed", 2, ("qwen2.lora_qwen2_0_5b", "qwen2.qwen2_1_5b"),
        ("Qwen2-0.5B-Instruct", "Qwen2-1.5B-Instruct"), (32, 64), (8, 1, False),
    ),
    "qwen2_5/14B_to_7B_kd_single_device": (
        "qwen2_5/14B_to_7B_KD_lora_single_device", 1, ("qwen2_5.lora_qwen2_5_7b", "qwen2_5.lora_qwen2_5_14b_instruct"),
        ("Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct"), (64, 128), (2, 5, True),
    ),
    "qwen3/14B_to_8B_kd_single_device": (
        "qwen3/14B_to_8B_KD_lora_single_device", 1, ("qwen3.lora_qwen3_8b_base", "qwen3.lora_qwen3_14b_instruct"),
        ("Qwen3-8B", "Qwen3-14B"), (64, 128), (2, 5, True),
    ),
}  # fmt: skip
DEFAULTS = {
    "kd_loss": {"_component_": "kdtune.losses.ForwardKL"},
    "epochs": 1,
    "enable_activation_checkpointing": False,
}
# Arguments of adapters with torchtune's and our default.
AS_WITHOUT = {"apply_lora_to_output": False, "lora_dropout": 0.0}


def in_torchtunes_manner(name: str) -> str:
    """The config of a pair as a user of torchtune has it, in our words."""
    _, _, (student, teacher), folders, (rank, alpha), (batch_size, epochs, recomputes) = PAIRS[name]
    tokenizer = f"path: /tmp/{folders[0]}/vocab.json\n  merges_file: /tmp/{folders[0]}/merges.txt"
    kind = student.partition(".")[0]
    if kind == "llama3_2":
        kind, tokenizer = "llama3", f"path: /tmp/{folders[0]}/original/tokenizer.model"
    checkpointers = "".join(
        f"""{role}checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/{folder}/
  checkpoint_files:
    filename_format: model-{{}}-of-{{}}.safetensors
    max_filename: "00050"
  recipe_checkpoint: null
  output_dir: ${{output_dir}}
  model_type: SOME
"""
        for role, folder in zip(("", "teacher_"), folders, strict=True)
    )
    adapters = "\n  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']"
    return f"""\
output_dir: /tmp/x
model:
  _component_: torchtune.models.{student}{adapters}
  apply_lora_to_mlp: True
  lora_rank: {rank}
  lora_alpha: {alpha}
  lora_dropout: 0.0
teacher_model:
  _component_: torchtune.models.{teacher}{adapters if "lora" in teacher else ""}
tokenizer:
  _component_: torchtune.models.{kind}.{kind}_tokenizer
  {tokenizer}
  max_seq_len: null
{checkpointers}resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
batch_size: {batch_size}
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.01
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
kd_loss:
  _component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss
kd_ratio: 0.5
epochs: {epochs}
gradient_accumulation_steps: 8
device: cuda
dtype: bf16
enable_activation_checkpointing: {recomputes}
"""


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
    processes = PAIRS[name][1]
    ours = read_yaml(_assets.find_config(name).path)
    assert what_matters(migrated, processes) == what_matters(ours, processes)
    teacher = ours["teacher_checkpointer"]["checkpoint_dir"]
    assert Path(migrated["teacher_checkpointer"]["checkpoint_dir"]).name == Path(teacher).name or teacher.endswith(
        "/final"
    )


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_torchtunes_is_shipped(name: str, tmp_path: Path) -> None:
    (tmp_path / "kd.yaml").write_text(in_torchtunes_manner(name))
    assert_same(name, dict(parse_yaml(migrate(tmp_path / "kd.yaml").text)))
    with pytest.raises(ConfigError, match=f"torchtune's is '{name}' here"):
        _assets.find_config(PAIRS[name][0])


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
        for pair, (theirs, *_) in PAIRS.items():
            if f"{theirs}.yaml" == name:
                assert_same(pair, read_yaml(new))
    assert len(valid) >= 120 and all(refused.values())


SMOLLM2 = """\
# A student of 12 layers and its teacher of 30.
output_dir: {output_dir}
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2
  lora_attn_modules: ['q_proj', 'v_proj']
  apply_lora_to_mlp: True
  lora_rank: 8
  lora_alpha: 16
  vocab_size: 49152
  num_layers: 12
  num_heads: 9
  num_kv_heads: 3
  embed_dim: 576
  intermediate_dim: 1536
  max_seq_len: 8192
  rope_base: 100000
  scale_factor: 1
teacher_model:
  _component_: torchtune.models.llama3_2.llama3_2
  vocab_size: 49152
  num_layers: 30
  num_heads: 9
  num_kv_heads: 3
  embed_dim: 576
  intermediate_dim: 1536
  max_seq_len: 8192
  rope_base: 100000
  scale_factor: 1
tokenizer:
  _component_: torchtune.models.qwen2.qwen2_tokenizer
  path: {pair}/student/vocab.json
  merges_file: {pair}/student/merges.txt
  max_seq_len: 64
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {pair}/student
  checkpoint_files: [model.safetensors]
  output_dir: ${{output_dir}}
  model_type: LLAMA3_2
teacher_checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {pair}/teacher
  checkpoint_files: [model.safetensors]
  output_dir: ${{output_dir}}
  model_type: LLAMA3_2
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: {rows}
  column_map: {{input: question, output: answer}}
  split: train
seed: null
shuffle: False
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-3
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 1
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
kd_loss:
  _component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss
kd_ratio: 1.0
epochs: 3
max_steps_per_epoch: 1
gradient_accumulation_steps: 1
device: cpu
dtype: fp32
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${{output_dir}}/logs
"""


@pytest.mark.real
@pytest.mark.slow("three steps of a real model")
def test_a_migrated_distillation_of_the_real_pair_runs(real_pair: Path, cli: CLI, tmp_path: Path) -> None:
    rows, old, new = tmp_path / "rows.jsonl", tmp_path / "torchtune.yaml", tmp_path / "new.yaml"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(2)))
    old.write_text(SMOLLM2.format(output_dir=tmp_path / "run", pair=real_pair, rows=rows))
    done = cli("migrate", str(old), "-o", str(new))
    assert done.code == 0, done.err
    done = cli("run", "knowledge_distillation", "--config", str(new))
    assert done.code == 0, done.err
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["kd_loss"] for row in found if "kd_loss" in row]
    # Thrice the same two examples.
    assert len(losses) == 3 and losses[2] < losses[0]
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors").is_file()
