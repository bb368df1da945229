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


def made(folder: Path, **families: dict[str, Any]) -> Path:
    """A folder with a model of each of transformers' families, with these settings and the tiny configs' tokenizer."""
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    for seed, (name, settings) in enumerate(families.items()):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(name, **SIZES | ids | settings)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save(folder / name, is_chat=True)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gpt_neox` and `stablelm`."""
    return made(tmp_path_factory.mktemp("hf"), gpt_neox={}, stablelm={})


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


# Of qwen2 and mistral, which kdtune computes too; SGD, where a gradient's scale is seen.
SGD = ("~lr_scheduler", "optimizer=torch.optim.SGD", "optimizer.lr=0.3", "~clip_grad_norm", "gradient_accumulation_steps=1", "batch_size=2",
       "sample_prompts=[]", "save_every_n_steps=null", "max_steps_per_epoch=3", "run_val_every_n_steps=3", "tokenizer.max_seq_len=96",
       "dataset_val.split=test[:4]")  # fmt: skip
LORA = ("adapter=kdtune.models.apply_lora", "optimizer.lr=3.0")
# One linear of a layer: several are drawn in the order of their names, which differ.
ADAPTED = {"transformers": "adapter.lora_modules=[q_proj]", "kdtune": "adapter.lora_attn_modules=[q_proj]"}
OPTIONS = {
    "all recomputed": ("activation_checkpointing=full",),
    "selectively recomputed": ("activation_checkpointing=selective",),
    "every second layer recomputed": ("activation_checkpointing=2",),
    "updated in backward": ("optimizer_in_backward=true",),
    "padded": ("padding_free=false",),
    "cut by tokens": ("tokens_per_micro_batch=96",),
    "clipped": ("clip_grad_norm=0.05", "gradient_accumulation_steps=2"),
    "teacher on a named device": ("teacher_device=cpu",),
    "bf16 teacher": ("teacher_dtype=bf16",),
    "fp32 master": ("dtype=bf16", "weight_update=fp32_master"),
    "stochastic": ("dtype=bf16", "weight_update=stochastic"),
    "LoRA": (*LORA, "adapter.lora_dropout=0.1"),
    "DoRA": (*LORA, "adapter.use_dora=true", "adapter.apply_lora_to_output=true"),
    "QLoRA": (*LORA, "adapter.quantize_base=true"),
    "QLoRA, recomputed": (*LORA, "adapter.quantize_base=true", "activation_checkpointing=full"),
    "QLoRA, own base": (*LORA, "adapter.quantize_base=true", "~teacher_checkpointer", "teacher=kdtune.teachers.BaseOfStudent"),
    "top-k targets": ("teacher_targets=kdtune.losses.TopKTargets", "teacher_targets.k=8"),
}  # fmt: skip
QUICK = ("selectively recomputed", "QLoRA")


@pytest.fixture(scope="module")
def own_families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen2` and `mistral`, with a window shorter than the examples."""
    return made(tmp_path_factory.mktemp("own"), qwen2={"num_key_value_heads": 2, "tie_word_embeddings": True},
                mistral={"num_key_value_heads": 2, "sliding_window": 16})  # fmt: skip


@pytest.mark.parametrize(
    "option",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow("two runs for each of many options; two are quick"))
     for name in OPTIONS],
)  # fmt: skip
def test_an_option_computes_what_it_does_in_kdtunes_own_decoder(
    option: str, cli: CLI, own_families: Path, tmp_path: Path
) -> None:
    settings, found = OPTIONS[option], {}
    for computed_by, adapted in ADAPTED.items():
        models = [*node("", own_families / "qwen2"), *node("teacher_", own_families / "mistral")]
        if computed_by == "kdtune":
            models = [one for one in models if ".family=" not in one]
        own = [adapted] if settings[: len(LORA)] == LORA else []
        done = cli(*KD, *SGD, *models, *settings, *own, f"output_dir={tmp_path / computed_by}")
        assert done.code == 0, done.err
        found[computed_by] = rows(tmp_path / computed_by)
    in_bf16 = any("bf16" in setting for setting in settings)
    for ours, theirs in zip(found["transformers"], found["kdtune"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.03 if in_bf16 else 1e-5, abs=1e-7)
    assert found["kdtune"][-1]["loss"] < found["kdtune"][1]["loss"]
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers" / "final")
    assert type(final).__name__ == "Qwen2ForCausalLM"


REFUSED = [
    (("parallelism.tp=2",), "parallelism: tp=2: does not divide a model that transformers computes; allowed: 1, and dp_shard"),
    (("parallelism.cpu_offload=true",), "parallelism: cpu_offload=true: of a model that transformers computes"),
    (("teacher_quantization=int8",), "teacher_quantization=int8: a model that transformers computes is not quantized"),
    (("compile=true",), "compile=true: is there for kdtune's own decoder"),
    (("float8_training=tensorwise",), "float8_training=tensorwise: is there for kdtune's own decoder"),
    (("activation_offloading=true",), "or activation_checkpointing=full for memory"),
    (("teacher_offload=true",), "or teacher_device=cpu for memory"),
    (("hidden_loss=kdtune.losses.HiddenStateLoss",), "hidden_loss: "),
]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), REFUSED)
def test_what_it_lacks_is_refused_by_the_key_before_a_weight_is_read(
    given: tuple[str, ...], wanted: str, cli: CLI, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdtune.checkpoint.checkpointer.fill_model", lambda *_, **__: pytest.fail("a weight is read"))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items() if "parallelism" in given[0] else ():
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
