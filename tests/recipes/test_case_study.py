"""The case study's command lines, as written: the configs' models at their exact sizes, and the pipeline on a tiny pair."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_tasks import write_tasks

from kdtune import _assets
from kdtune.checkpoint import load_model
from kdtune.config import instantiate, load
from kdtune.config.recipe import import_recipe
from kdtune.models import FAMILIES

SIZES = {name: size for family in FAMILIES for name, (_, size) in family.sizes.items()}
STUDY = {"70b": 70_553_706_496, "8b": 8_030_261_248, "3b": 3_212_749_824, "1b": 1_235_814_400}
CONFIGS = [
    config.name
    for config in _assets.configs()
    if config.name.startswith(("llama3", "mistral", "qwen", "olmo", "gemma"))
]
WITH_MODELS_DIR = [config for config in _assets.configs()
                   if config.recipe != "sweep" and "models_dir" in config.path.read_text()]  # fmt: skip


def adapter_parameters(builder: str, rank: int) -> int:
    """Rank times the sum of inputs and outputs of q, v, output projection, gate, up and down, in each layer."""
    size = SIZES[builder]
    q, kv = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    shapes = [
        (size.embed_dim, q),
        (size.embed_dim, kv),
        (q, size.embed_dim),
        *[(size.embed_dim, size.intermediate_dim)] * 3,
    ]
    return size.num_layers * sum(rank * (a + b) for a, b in shapes)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_the_shipped_configs_have_their_sizes(name: str) -> None:
    config = _assets.find_config(name)
    assert config.recipe
    cfg = load(name, [], import_recipe(_assets.find_recipe(config.recipe)).schema)
    for key in ("model", "teacher_model"):
        node = getattr(cfg, key, None)
        if node is None:
            continue
        builder = node["_component_"].rpartition(".")[2]
        with torch.device("meta"):
            model = instantiate(node)
        size = builder.partition("lora_")[2] or builder
        expected = STUDY[size.rpartition("_")[2]] if size.startswith("llama3") else SIZES[size].num_parameters
        if "lora_" in builder:
            expected += adapter_parameters(size, node["lora_rank"])
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_distillation_reads_its_teacher_where_the_finetuning_leaves_it() -> None:
    finetune = import_recipe(_assets.find_recipe("lora_finetune_single_device")).schema
    distil = import_recipe(_assets.find_recipe("knowledge_distillation_single_device")).schema
    for teacher_name, names in (
        ("8B_lora_single_device", ("knowledge_distillation_single_device", "8B_to_3B_kd_single_device")),
        ("8B_lora_distributed", ("knowledge_distillation_distributed",)),
    ):
        teacher = load(f"llama3_1/{teacher_name}", ["models_dir=/elsewhere"], finetune)
        assert teacher.output_dir.startswith("/elsewhere/")
        for name in names:
            student = load(f"llama3_2/{name}", ["models_dir=/elsewhere"], distil)
            assert student.teacher_checkpointer["checkpoint_dir"] == f"{teacher.output_dir}/final"


def test_the_evaluation_reads_what_the_runs_leave() -> None:
    schemas = {
        name: import_recipe(_assets.find_recipe(name)).schema
        for name in ("finetune", "knowledge_distillation", "evaluate")
    }
    elsewhere = ["models_dir=/elsewhere"]
    teacher = load("llama3_1/8B_lora_single_device", elsewhere, schemas["finetune"])
    student = load("llama3_2/knowledge_distillation_single_device", elsewhere, schemas["knowledge_distillation"])
    evaluation = load("llama3_2/evaluation", elsewhere, schemas["evaluate"])
    assert evaluation.checkpointer["checkpoint_dir"] == f"{student.output_dir}/final"
    assert evaluation.teacher_checkpointer["checkpoint_dir"] == f"{teacher.output_dir}/final"


@pytest.mark.parametrize("config", WITH_MODELS_DIR, ids=lambda config: config.name)
def test_a_config_with_models_dir_has_no_path_outside_it(config: _assets.ConfigFile) -> None:
    assert config.recipe
    cfg = load(config.name, ["models_dir=/elsewhere"], import_recipe(_assets.find_recipe(config.recipe)).schema)
    nodes = [cfg.tokenizer, *(getattr(cfg, key, None) for key in ("checkpointer", "teacher_checkpointer"))]
    paths = [node[key] for node in nodes if node for key in ("path", "checkpoint_dir") if key in node]
    assert paths and all(path.startswith("/elsewhere/") for path in paths), paths


def test_the_case_study_on_a_tiny_pair(cli, good: Path, tmp_path: Path) -> None:
    """The commands of the study with other weights, data and device: finetune the teacher, distil with the study's LoRA."""
    small = (
        f"models_dir={tmp_path}", f"tokenizer.path={good / 'model'}", "tokenizer.max_seq_len=256", "device=cpu", "dtype=fp32",
        "dataset=kdtune.data.quickstart_dataset", "dataset_val={_component_: kdtune.data.quickstart_dataset, split: test}",
        f"checkpointer.checkpoint_dir={good / 'model'}", "~checkpointer.checkpoint_files", "model=null",
        "lr_scheduler.num_warmup_steps=1", "max_steps_per_epoch=4", "gradient_accumulation_steps=1",
        "run_val_every_n_steps=2", "save_every_n_steps=2",
    )  # fmt: skip
    lora = "adapter={_component_: kdtune.models.apply_lora, lora_rank: 64, lora_alpha: 128}"
    done = cli("run", "lora_finetune_single_device", "--config", "llama3_1/8B_lora_single_device", *small, lora)
    assert done.code == 0, done.err
    teacher = tmp_path / "kdtune" / "llama3_1_8B" / "lora_single_device" / "final"
    load_model(teacher)
    done = cli("run", "knowledge_distillation_single_device", "--config", "llama3_2/knowledge_distillation_single_device", *small,
               lora, "teacher_model=null", "kd_ratio=0.75", "optimizer.lr=1e-4")  # fmt: skip
    assert done.code == 0, done.err
    output_dir = tmp_path / "kdtune" / "llama3_2_1B" / "knowledge_distillation_single_device"
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_kd_loss"] < rows[0]["val_kd_loss"]
    assert rows[1]["loss"] == pytest.approx(0.25 * rows[1]["class_loss"] + 0.75 * rows[1]["kd_loss"], rel=1e-6)
    load_model(output_dir / "final")
    tasks = write_tasks(tmp_path / "tasks", 4)
    done = cli("run", "eleuther_eval", "--config", "llama3_2/evaluation", *(setting for setting in small if setting.startswith(
               ("models_dir", "tokenizer", "device", "dtype", "dataset_val"))), f"include_path={tasks}", "tasks=[own_endings]",
               "max_seq_length=256", "~rouge")  # fmt: skip
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "kdtune" / "llama3_2_1B" / "evaluation" / "results.json").read_text())["metrics"]
    assert metrics["held_out/kd_loss"] == pytest.approx(rows[-1]["val_kd_loss"], rel=1e-4)
    assert 0 <= metrics["own_endings/acc_norm"] <= 1


@pytest.mark.slow("a plan builds both models on the meta device, which takes seconds")
@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if not name.startswith("llama3") and name != "mistral/prune"]
)
def test_the_configs_of_other_families_are_planned(name: str, cli) -> None:
    # What the pruning writes is not there.
    model = ["model=kdtune.models.mistral_7b_v0_3"] if name == "mistral/7B_to_16_layers_kd_single_device" else []
    processes = "8" if name.endswith("_distributed") else "1"
    done = cli("plan", name, "--world-size", processes, *model)
    assert done.code == 0, done.err
    assert (
        "fits into a100-80gb" in done.out and " no" not in done.out.partition("fits into a100-80gb")[2].splitlines()[0]
    )
