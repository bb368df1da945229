"""`kdtune migrate`: configs in torchtune's manner, what they become, and what is said of their keys."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from exit_codes import run_command
from torchtune_text import KD

from kdtune.config.migrate import Migrated, migrate
from kdtune.config.migrate.comments import Comment, read_comments
from kdtune.config.migrate.text import to_text
from kdtune.config.yaml_text import parse_yaml
from kdtune.errors import ConfigError

KD_HERE = """\
# Made from torchtune's kd.yaml by `kdtune migrate`.
#
# Distils a large model into a small one.
#   kdtune download owner/Small --output-dir /m/small --hf-token TOKEN
#
# To run it:
#   kdtune run --nnodes 1 --nproc_per_node 2 knowledge_distillation_distributed --config new.yaml kd_ratio=0.7
recipe: knowledge_distillation
output_dir: /runs/kd  # change it

# The student
model:
  _component_: kdtune.models.lora_qwen2_0_5b
  lora_attn_modules: [q_proj, v_proj]
  apply_lora_to_mlp: true
  lora_rank: 32  # higher is more accurate
  lora_alpha: 64
teacher_model:
  _component_: kdtune.models.qwen2_5_1_5b
tokenizer:
  _component_: kdtune.tokenizers.load
  path: /m/small
  max_seq_len: 512
checkpointer:
  _component_: kdtune.checkpoint.Checkpointer
  checkpoint_dir: /m/small
  checkpoint_files: [model.safetensors]
teacher_checkpointer:
  _component_: kdtune.checkpoint.Checkpointer
  checkpoint_dir: /m/large
resume_from_checkpoint: false
save_weights: adapter
# The data
dataset:
  _component_: kdtune.data.alpaca_cleaned_dataset
  packed: false
batch_size: 8
optimizer:
  _component_: torch.optim.AdamW
  lr: 3.0e-4
lr_scheduler:
  _component_: kdtune.training.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
kd_loss:
  _component_: kdtune.losses.SymmetricKL
  forward_weight: 0.25  # of the forward direction
kd_ratio: 0.7
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 4
device: cpu
dtype: bf16
activation_offloading: true
"""

FINETUNE = """\
output_dir: /runs/x
model:
  _component_: torchtune.models.llama3_2.llama3_2_1b
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /m/original/tokenizer.model
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /m
dataset:
  _component_: torchtune.datasets.alpaca_dataset
optimizer:
  _component_: torch.optim.AdamW
  lr: 2e-5
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
"""


def made(folder: Path, text: str, *overrides: str, name: str = "mine/kd.yaml") -> Migrated:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return migrate(path, overrides, target="new.yaml")


def values(migrated: Migrated) -> dict[str, Any]:
    return dict(parse_yaml(migrated.text))


def notes(migrated: Migrated, kind: str) -> dict[str, str]:
    return {note.key: note.text for note in migrated.notes if note.kind == kind}


def finetune(folder: Path, *overrides: str) -> Migrated:
    return made(folder, FINETUNE, *overrides)


def test_a_distillation_with_its_comments(tmp_path: Path) -> None:
    assert made(tmp_path, KD).text == KD_HERE


def test_every_key_that_is_not_carried_is_told(tmp_path: Path) -> None:
    migrated = made(tmp_path, KD)
    told = {note.key.partition("=")[0] for note in migrated.notes}
    carried = set(values(migrated))
    assert not [key for key in parse_yaml(KD) if key not in carried and key not in told]
    lost = notes(migrated, "lost")
    assert lost.keys() == {"clip_grad_norm=1.0", "mystery=3"}
    assert "divides the gradient by the tokens twice" in lost["clip_grad_norm=1.0"]
    changed = notes(migrated, "changed")
    assert "the KL plus the teacher's entropy" in changed["kd_loss"]
    assert "teacher_checkpointer.adapter_dir" in changed["teacher_model"]
    assert "does not read it" in changed["enable_activation_offloading"]
    dropped = notes(migrated, "dropped")
    assert dropped["checkpointer.model_type"] == "the architecture is read from the folder's own configuration"
    assert dropped["teacher_checkpointer.checkpoint_files"] == "every weight file of the folder is read"
    assert dropped["loss"].startswith("CEWithChunkedOutputLoss: the loss is cross entropy")
    assert dropped["metric_logger"] == "DiskLogger: every run writes metrics.jsonl, and shows its steps"


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["optimizer.lr=1e-5"], "optimizer", {"_component_": "torch.optim.AdamW", "lr": 1e-5}),
        (["optimizer=bitsandbytes.optim.PagedAdamW8bit"], "optimizer", {"_component_": "torchao.optim.AdamW8bit", "lr": 2e-5}),
        (["optimizer=bitsandbytes.optim.PagedAdamW"], "optimizer", {"_component_": "torch.optim.AdamW", "lr": 2e-5}),
        (["optimizer=torchao.prototype.low_bit_optim.AdamW4bit", "optimizer.fused=True"], "optimizer",
         {"_component_": "torchao.optim.AdamW4bit", "lr": 2e-5}),
        (["optimizer_in_bwd=True"], "optimizer_in_backward", True),
        (["clip_grad_norm=1.0"], "clip_grad_norm", 1.0),
        (["clip_grad_norm=inf"], "clip_grad_norm", None),
        (["max_steps_per_epoch=None"], "max_steps_per_epoch", None),
        (["fsdp_cpu_offload=True", "tensor_parallel_dim=2"], "parallelism", {"cpu_offload": True, "tp": 2}),
        (["fsdp.cpu_offload=True"], "parallelism", {"cpu_offload": True}),
        (["ac_mode=selective", "ac_option=2", "enable_activation_checkpointing=True"], "activation_checkpointing", 2),
        (["ac_mode=selective", "ac_option=op"], "activation_checkpointing", "selective"),
        (["ac_mode=full"], "activation_checkpointing", "full"),
        (["model=torchtune.models.llama3_3.llama3_3_70b"], "model", {"_component_": "kdtune.models.llama3_1_70b"}),
        (["dataset=torchtune.datasets.samsum_dataset", "dataset.train_on_input=True"], "dataset",
         {"_component_": "kdtune.data.instruct_dataset", "source": "Samsung/samsum",
          "column_map": {"input": "dialogue", "output": "summary"}, "train_on_input": True}),
        (["dataset=torchtune.datasets.wikitext_dataset", "dataset.subset=wikitext-2-v1", "dataset.packed=True"], "dataset",
         {"_component_": "kdtune.data.text_completion_dataset", "source": "EleutherAI/wikitext_document_level",
          "name": "wikitext-2-v1", "column": "page", "packed": True, "split_across_pack": True}),
        (["metric_logger={_component_: torchtune.training.metric_logging.WandBLogger, log_dir: /l, job_type: x}"], "metric_logger",
         {"_component_": "kdtune.training.WandBLogger", "project": "torchtune", "log_dir": "/l"}),
        (["profiler={_component_: torchtune.training.setup_torch_profiler, enabled: true, cpu: true, wait_steps: 5}"], "profiler",
         {"_component_": "kdtune.training.Profiler", "wait_steps": 5}),
        (["tokenizer=torchtune.models.llama2.llama2_tokenizer"], "tokenizer",
         {"_component_": "kdtune.tokenizers.load", "path": "/m"}),
        (["base=/elsewhere", "output_dir='${base}/x'"], "output_dir", "/elsewhere/x"),
    ],
)  # fmt: skip
def test_overrides_are_torchtunes_and_become_ours(
    overrides: list[str], key: str, value: object, tmp_path: Path
) -> None:
    assert values(finetune(tmp_path, *overrides))[key] == value


def test_a_removed_key_is_gone(tmp_path: Path) -> None:
    assert "kd_ratio" not in values(made(tmp_path, KD, "~kd_ratio"))


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [([], False), (["dataset.train_on_input=False"], True), (["dataset=torchtune.datasets.samsum_dataset"], True),
     (["dataset=torchtune.datasets.samsum_dataset", "dataset.train_on_input=True"], False),
     (["dataset=torchtune.datasets.text_completion_dataset", "dataset.source=x"], False)],
)  # fmt: skip
def test_that_an_answers_header_is_not_trained_on_is_told(overrides: list[str], is_told: bool, tmp_path: Path) -> None:
    told = [note for note in finetune(tmp_path, *overrides).notes if "header before an answer" in note.text]
    assert bool(told) == is_told


@pytest.mark.parametrize("builder", ["mistral.qlora_mistral_7b", "code_llama2.qlora_code_llama2_7b"])
def test_a_model_without_a_builder_here_is_read_from_its_folder(builder: str, tmp_path: Path) -> None:
    migrated = finetune(
        tmp_path, f"model=torchtune.models.{builder}", "model.lora_rank=4", "model.lora_attn_modules=[q_proj]"
    )
    assert "model" not in values(migrated)
    assert values(migrated)["adapter"] == {
        "_component_": "kdtune.models.apply_lora", "lora_rank": 4, "lora_attn_modules": ["q_proj"], "quantize_base": True,
    }  # fmt: skip
    assert "config.json" in notes(migrated, "changed")["model"]


def test_sizes_given_to_a_builder_are_those_of_the_folder(tmp_path: Path) -> None:
    migrated = finetune(
        tmp_path, "model=torchtune.models.llama3_2.llama3_2", "model.num_layers=30", "model.embed_dim=576"
    )
    assert "which has num_layers, embed_dim too" in notes(migrated, "changed")["model"]


def test_pickles_are_told(tmp_path: Path) -> None:
    migrated = finetune(tmp_path, "checkpointer.checkpoint_files=[pytorch_model-00001-of-00002.bin]")
    assert values(migrated)["checkpointer"] == {"_component_": "kdtune.checkpoint.Checkpointer", "checkpoint_dir": "/m"}
    assert "safetensors" in notes(migrated, "lost")["checkpointer.checkpoint_files"]


def test_an_sgd_learning_rate_of_a_distillation_is_marked(tmp_path: Path) -> None:
    migrated = made(tmp_path, KD, "optimizer=torch.optim.SGD", "optimizer.lr=0.5")
    assert "this value does not carry over" in notes(migrated, "lost")["optimizer.lr=0.5"]
    assert re.search(r"\n  # torchtune divides the gradient .*\n  lr: 0\.5\n", migrated.text)
    assert not [key for key in notes(finetune(tmp_path, "optimizer=torch.optim.SGD"), "lost") if "lr" in key]


def test_datasets_in_a_list_become_a_mixture(tmp_path: Path) -> None:
    both = "[{_component_: torchtune.datasets.alpaca_dataset}, {_component_: mine.rows, path: x}]"
    migrated = finetune(tmp_path, f"dataset={both}")
    assert values(migrated)["dataset"] == {
        "_component_": "kdtune.data.mixed_dataset",
        "datasets": [{"_component_": "kdtune.data.alpaca_dataset"}, {"_component_": "mine.rows", "path": "x"}],
        "weights": [1, 1],
    }
    assert "weights" in notes(migrated, "lost")["dataset"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ref_checkpointer={a: 1}"], "preferences or rewards"),
        (["loss=torchtune.rlhf.loss.DPOLoss"], "preferences or rewards"),
        (["quantizer={_component_: torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer}"], "finetune, then `kdtune run quan"),
        (["model=torchtune.models.gemma.gemma_7b"], "kdtune has no model gemma_7b .* it has llama, llama2_7b.*, qwen3_32b.*docs"),
        (["dataset=torchtune.datasets.preference_dataset"], "no counterpart of torchtune.datasets.preference_dataset"),
        (["optimizer=bitsandbytes.optim.Lion"], "bitsandbytes.optim.Lion has no counterpart"),
        (["lr_scheduler={_component_: torchtune.training.other}"], "lr_scheduler: torchtune.training.other: kdtune has no component"),
        (["model=torchtune.models.gemma.gemma_2b", "dataset=torchtune.datasets.hh_rlhf_helpful_dataset"], "(?s)gemma_2b.*hh_rlhf"),
        (["~optimizer", "~dataset"], "is of no recipe that is known"),
        (["recipe=finetune"], "already"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_with_the_reason(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        finetune(tmp_path, *overrides)


@pytest.mark.parametrize(
    "key", ["model", "tokenizer", "checkpointer", "dataset", "optimizer", "loss", "checkpointer.checkpoint_files"]
)
@pytest.mark.parametrize("value", ["3", "x", "[1]", "{a: 1}", "null", "{_component_: 3}"])
def test_odd_values_are_carried_for_validation_to_refuse(key: str, value: str, tmp_path: Path) -> None:
    assert values(finetune(tmp_path, f"{key}={value}"))["recipe"] == "finetune"


def test_a_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no component of torchtune's"):
        made(tmp_path, "a: 1\n")


GENERATE = """\
output_dir: ./
model:
  _component_: torchtune.models.llama3.llama3_70b
tensor_parallel_plan:
  _component_: torchtune.models.llama3.base_llama_tp_plan
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /m/original/tokenizer.model
  prompt_template: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /m
  model_type: LLAMA3
log_level: INFO
prompt:
  system: null
  user:
    text: Tell a joke.  # or not
top_k: 300
enable_kv_cache: True
quantizer: null
"""


def test_a_generation(tmp_path: Path) -> None:
    migrated = made(tmp_path, GENERATE)
    found = values(migrated)
    assert found["recipe"] == "generate" and "output_dir" not in found
    assert found["prompt"] == {"system": None, "user": "Tell a joke."}
    assert found["parallelism"] == {"tp": -1, "dp_shard": 1, "dp_replicate": 1}
    assert {"log_level", "enable_kv_cache", "quantizer", "tensor_parallel_plan", "tokenizer.prompt_template"} <= notes(
        migrated, "dropped"
    ).keys()


def test_an_evaluation(tmp_path: Path) -> None:
    text = GENERATE.partition("prompt:")[0] + "tasks: [hellaswag]\nlimit: null\nmax_seq_length: 4096\nbatch_size: 8\n"
    found = values(made(tmp_path, text, "~tensor_parallel_plan"))
    assert (found["recipe"], found["output_dir"], found["tasks"]) == ("evaluate", "evaluation", ["hellaswag"])


def test_a_quantization(tmp_path: Path) -> None:
    text = (
        GENERATE.partition("tensor_parallel_plan:")[0]
        + "checkpointer"
        + GENERATE.partition("\ncheckpointer")[2].partition("log_level")[0]
    )
    text += (
        "quantizer:\n  _component_: torchtune.training.quantization.Int8DynActInt4WeightQuantizer\n  groupsize: 64\n"
    )
    migrated = made(tmp_path, text, "output_dir=/m/int4")
    found = values(migrated)
    assert (found["recipe"], found["scheme"], found["group_size"]) == ("quantize", "int4_weight_only", 64)
    assert found["tokenizer"] == {"_component_": "kdtune.tokenizers.load", "path": "/m"}
    assert "inputs stay as they are" in next(iter(notes(migrated, "lost").values()))


# The command


def test_the_config_goes_to_stdout_and_the_notes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FINETUNE)
    assert run_command(["migrate", str(path), "optimizer.lr=1e-4"]) == 0
    captured = capsys.readouterr()
    assert parse_yaml(captured.out)["optimizer"]["lr"] == 1e-4
    assert "dropped:\n  loss: CEWithChunked" in captured.err and "next: kdtune validate NEW.yaml" in captured.err


def test_the_new_file_is_valid_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kd.yaml").write_text(KD)
    assert run_command(["migrate", "kd.yaml", "-o", "new.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote new.yaml\nchanged:\n") and "does not carry over:\n  clip_grad_norm=1.0: " in out
    assert run_command(["validate", "new.yaml"]) == 0
    assert run_command(["migrate", "kd.yaml", "-o", "new.yaml"]) == 2
    assert "new.yaml: exists; give --force" in capsys.readouterr().err
    assert run_command(["migrate", "kd.yaml", "-o", "new.yaml", "--force"]) == 0


def test_nothing_is_written_where_the_result_is_not_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(FINETUNE)
    for source, words in (("x.yaml", "gradient_accumulation_steps=8"), ("gone.yaml", "no such file")):
        code = run_command(
            ["migrate", source, "-o", "new.yaml", "optimizer_in_bwd=True", "gradient_accumulation_steps=8"]
        )
        assert code == 2 and words in capsys.readouterr().err and not Path("new.yaml").exists()


@pytest.mark.parametrize(
    "command",
    [["run", "finetune", "--config", "x.yaml"], ["run", "knowledge_distillation", "--config", "x.yaml"], ["validate", "x.yaml"],
     ["plan", "x.yaml"], ["data", "x.yaml"], ["cat", "--resolved", "x.yaml"]],
)  # fmt: skip
def test_other_commands_say_what_to_type(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(FINETUNE)
    overrides = ["batch_size=2"] if command[0] == "run" else []
    assert run_command([*command, *overrides]) == 2
    err = capsys.readouterr().err
    assert f"kdtune migrate x.yaml -o x_kdtune.yaml{' batch_size=2' if overrides else ''}\n" in err


# Text


@pytest.mark.parametrize(
    "value",
    ["plain", "a: b", "a #b", "", "yes", "1e-4", "null", "[x", "a, b", "line\nline", "ünï", "${output_dir}/x", "- a", "'q'", " x"],
)  # fmt: skip
def test_texts_read_back_as_they_were(value: str) -> None:
    written = {"a": value, "b": [value, 1], "c": [{"d": value}], "e": {"f": [value] * 40}}
    assert parse_yaml(to_text(written, [], lambda key: Comment())) == written


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -0.5, 3e-4, 2e-5, 1e-8, 1.25e-4, 1e6, 123456789.0, float("inf"), 0.1 + 0.2]
)
def test_numbers_read_back_as_they_were(value: float) -> None:
    assert parse_yaml(to_text({"a": value}, [], lambda key: Comment())) == {"a": value}
    assert yaml.safe_load(to_text({"a": value}, [], lambda key: Comment())) == {"a": value}


def test_comments_belong_to_the_key_below_them_or_before_them() -> None:
    header, found = read_comments(
        "# top\n\na: 1  # one\n\n# of b\nb:  # beside b\n  # of c\n  c: [x, # in it\n    y] # after c\n"
        "d:\n  # first\n  - e: 2 # two\n  - f\n"
    )
    assert header == ["# top", ""]
    assert found["a"] == Comment((), "one")
    assert found["b"] == Comment(("", "# of b"), "beside b")
    assert found["b.c"] == Comment(("# of c",), "after c")
    assert found["d.0"].above == ("# first",)
    assert found["d.0.e"].beside == "two"
