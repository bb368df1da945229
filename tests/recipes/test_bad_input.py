"""What a user can get wrong: one table, and for each row an exit code, one readable message, and nothing half written.

Every row goes through the command line's own entry. What is refused before the loop leaves no output folder, and an
output folder that was there stays as it was, to the byte.
"""

import errno
import gzip
import hashlib
import json
import os
import pickle
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdtune.checkpoint import load_model
from kdtune.checkpoint.state import is_whole_state

RECIPE = "knowledge_distillation_single_device"
CONFIG = "tiny/knowledge_distillation"


@dataclass(frozen=True)
class Given:
    """What a row can use: an empty folder of its own, and the fixture `good` to copy from."""

    tmp: Path
    good: Path

    def copy(self, name: str, to: str | None = None) -> Path:
        """A copy of one of the good folders."""
        return Path(copytree(self.good / name, self.tmp / (to or name)))

    @property
    def out(self) -> Path:
        """The run's output folder, which the row does not make unless that is what is wrong."""
        return self.tmp / "out"


Make = Callable[[Given], list[str]]
ROWS: dict[str, tuple[Make, tuple[str, ...]]] = {}


def row(name: str, make: Make, *words: str) -> None:
    """A row: what is wrong, the command line for it, and words that the message must have."""
    assert name not in ROWS and words
    ROWS[name] = (make, words)


# How a row's command line is made. In overrides, {tmp} is the row's own folder.


def kd(*overrides: str, config: str = CONFIG, recipe: str = RECIPE) -> Make:
    def make(given: Given) -> list[str]:
        filled = [text.replace("{tmp}", str(given.tmp)) for text in (config, *overrides)]
        return ["run", recipe, "--config", filled[0], f"output_dir={given.out}", *filled[1:]]

    return make


def file(name: str, content: str | bytes, then: Make) -> Make:
    def make(given: Given) -> list[str]:
        data = content.encode() if isinstance(content, str) else content
        (given.tmp / name).write_bytes(data)
        return then(given)

    return make


def data(name: str, content: str | bytes, *overrides: str, builder: str = "alpaca_dataset") -> Make:
    node = f"dataset={{_component_: kdtune.data.{builder}, source: '{{tmp}}/{name}'}}"
    return file(name, content, kd(node, *overrides))


def checkpoint(folder: str, key: str = "checkpointer", files: str = "null") -> str:
    place = f"checkpoint_dir: '{{tmp}}/{folder}', checkpoint_files: {files}"
    return f"{key}={{_component_: kdtune.checkpoint.Checkpointer, {place}}}"


def student(
    damage: Callable[[Path], object], *more: str, start: str = "model", files: str = "null", model: str = "model=null"
) -> Make:
    def make(given: Given) -> list[str]:
        damage(given.copy(start, "student"))
        return kd(checkpoint("student", files=files), model, *more)(given)

    return make


def tokenizer(damage: Callable[[Path], object]) -> Make:
    def make(given: Given) -> list[str]:
        damage(given.copy("model", "student"))
        return kd("tokenizer={_component_: kdtune.tokenizers.load, path: '{tmp}/student', max_seq_len: 256}")(given)

    return make


def resumed(damage: Callable[[Path], object], *overrides: str, resume: str = "true") -> Make:
    def make(given: Given) -> list[str]:
        damage(given.copy("run", "out"))
        settings = ("sample_prompts=[]", "max_steps_per_epoch=4", "save_every_n_steps=1", "run_val_every_n_steps=null")
        return kd(*settings, f"resume_from_checkpoint={resume}", *overrides)(given)

    return make


# How a good folder is damaged.


def cut(name: str, keep: float = 0.6) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def rename(name: str, to: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / to)


def setting(key: str, value: object, name: str = "config.json") -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, key: value}))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def both(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in damages]


PICKLE_RAN = Path(tempfile.gettempdir()) / "kdtune-pickle-ran"


class RunsCode:
    """A pickle that would leave a file behind if it were loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path(" + repr(str(PICKLE_RAN)) + ").touch()",)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GOOD_LINE = '{"instruction": "Say hi.", "output": "Hi."}\n'

# The config's keys and values

for override, words in {
    "optimzer.lr=1": ("optimzer", "did you mean 'optimizer'"),
    "kd_ratio=2": ("kd_ratio",),
    "kd_ratio=high": ("kd_ratio", "float"),
    "kd_ratio=.nan": ("kd_ratio",),
    "batch_size=0": ("batch_size",),
    "batch_size=1.5": ("batch_size", "int"),
    "epochs=-1": ("epochs",),
    "device=tpu": ("device=tpu",),
    "device=cuda:77": ("device=cuda:77",),
    "dtype=fp16": ("dtype", "bf16"),
    "optimizer=torch.optim.AdamX": ("optimizer", "AdamX", "did you mean"),
    "optimizer=nowhere.AdamW": ("optimizer", "nowhere"),
    "optimizer=kdtune.constants.IGNORE_INDEX": ("optimizer", "not a class or function"),
    "optimizer.learning_rate=1": ("optimizer.learning_rate",),
    "optimizer.lr=fast": ("optimizer.lr",),
    "optimizer.lr=-1": ("torch.optim.AdamW", "lr=-1"),
    "optimizer.lr=.nan": ("optimizer.lr", "nan"),
    "optimizer.betas=[2, 3]": ("torch.optim.AdamW", "betas=[2, 3]"),
    "lr_scheduler.num_warmup_steps=many": ("lr_scheduler.num_warmup_steps",),
    "lr_scheduler.num_warmup_steps=1000": ("num_warmup_steps=1000",),
    "lr_scheduler=torch.optim.lr_scheduler.StepLR": ("lr_scheduler.step_size",),
    "~tokenizer": ("tokenizer", "is missing"),
    "~modle": ("modle", "did you mean 'model'"),
    "~output_dir": ("output_dir", "is missing"),
    "tokenizer=kdtune.tokenizers.load": ("tokenizer.path",),
    "tokenizer={_component_: kdtune.tokenizers.load, path: nowhere}": ("nowhere",),
    "tokenizer.max_seq_len=0": ("max_seq_len=0",),
    "model=null": ("checkpointer",),
    "model.num_heads=5": ("num_heads=5",),
    "model.embed_dim=0": ("embed_dim=0",),
    "model.num_layers=-1": ("num_layers=-1",),
    "model.vocab_size=100": ("student's vocabulary is 100",),
    "teacher_model.vocab_size=100": ("teacher's vocabulary is 100",),
    "checkpointer={_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: nowhere}": ("nowhere",),
    "enable_activation_offloading=true": ("enable_activation_offloading",),
    "fsdp_cpu_offload=true": ("fsdp_cpu_offload",),
    "clip_grad_norm=0": ("clip_grad_norm=0",),
    "clip_grad_norm=.nan": ("clip_grad_norm", "nan"),
    "keep_last_n_checkpoints=0": ("keep_last_n_checkpoints=0",),
    "best_metric=val_loss": ("best_metric", "val_class_loss"),
    "seed=-1": ("seed=-1",),
    "num_workers=-1": ("num_workers=-1",),
    "run_val_every_n_steps=0": ("run_val_every_n_steps=0",),
    "max_steps_per_epoch=0": ("max_steps_per_epoch=0",),
    "loss_chunk_size=0": ("loss_chunk_size=0",),
    "shuffle=maybe": ("shuffle", "true or false"),
    "sample_prompts=What is 2 + 2?": ("sample_prompts", "a list"),
    "sample_prompts=[1]": ("sample_prompts", "item 0"),
    "sample_every_n_steps=0": ("sample_every_n_steps=0",),
    "metric_logger=kdtune.training.TensorboardLogger": ("metric_logger", "did you mean 'TensorBoardLogger'"),
    "metric_logger=kdtune.training.WandBLogger": ("metric_logger.project", "is missing"),
    "metric_logger={_component_: kdtune.training.WandBLogger, project: x}": ("metric_logger", "kdtune[wandb]"),
    "profiler={_component_: kdtune.training.Profiler, wait: 1}": ("profiler.wait", "wait_steps"),
    "profiler={_component_: kdtune.training.Profiler, active_steps: 0}": ("profiler", "active_steps=0"),
    "kd_loss=kdtune.losses.ForwardKl": ("kd_loss", "did you mean 'ForwardKL'"),
    "output_dir=${nowhere}/x": ("output_dir", "nowhere"),
    "output_dir=" + "x" * 300: ("output_dir", "too long"),
    "batch_size": ("batch_size", "key=value"),
    "--batch_size=4": ("batch_size=4", "dashes"),
    "log_level=LOUD": ("log_level", "WARNING"),
}.items():
    row(override, kd(override), *words)

row("saving in the background without saving", kd("enable_async_checkpointing=true", "save_every_n_steps=null"),
    "enable_async_checkpointing=true: has no effect without save_every_n_steps")  # fmt: skip
row("several mistakes in one message", kd("batch_size=0.5", "kd_ratoi=1", "optimizer.lrr=1"),
    "3 problems", "batch_size", "kd_ratoi", "optimizer.lrr")  # fmt: skip

# The config file, the recipe, the command line

row("unknown config", kd(config="tiny/knowledge_destillation"), "did you mean 'tiny/knowledge_distillation'")
row("missing config file", kd(config="{tmp}/mine.yaml"), "mine.yaml", "no such file")
row("config is not YAML", file("mine.yaml", "batch_size: [1\nepochs: 2\n", kd(config="{tmp}/mine.yaml")),
    "mine.yaml:2", "not valid YAML")  # fmt: skip
row("config with a key twice", file("mine.yaml", "epochs: 1\nbatch_size: 1\nepochs: 2\n", kd(config="{tmp}/mine.yaml")),
    "mine.yaml:3", "epochs")  # fmt: skip
row("config is a list", file("mine.yaml", "- epochs\n", kd(config="{tmp}/mine.yaml")), "mine.yaml", "list")
row("config is not text", file("mine.yaml", b"\xff\xfe\x00\x81", kd(config="{tmp}/mine.yaml")), "mine.yaml")
row("empty config", file("mine.yaml", "", kd(config="{tmp}/mine.yaml")), "tokenizer", "is missing")
row("config for another recipe", kd(config="tiny/prune"), "recipe", "'prune'", "knowledge_distillation")
row("unknown recipe", kd(recipe="knowledge_distilation"), "knowledge_distilation", "did you mean")
row(
    "a config where the recipe belongs",
    kd(recipe="quickstart"),
    "quickstart: is a config, not a recipe; run it by: kdtune run knowledge_distillation --config quickstart",
)
row("missing recipe file", kd(recipe="mine.py"), "mine.py")
row("recipe without Config", lambda g: file("mine.py", '"""Mine."""\n', kd(recipe=str(g.tmp / "mine.py")))(g),
    "mine.py", "entry_point")  # fmt: skip
row(
    "recipe is not Python", lambda g: file("mine.py", "def main(:\n", kd(recipe=str(g.tmp / "mine.py")))(g), "mine.py:1"
)
row("no recipe", lambda g: ["run", "--config", CONFIG], "no recipe is named")
row("no config", lambda g: ["run", RECIPE], "--config")
row("unknown command", lambda g: ["rnu", RECIPE], "rnu")
row("ls of an unknown recipe", lambda g: ["ls", "prun"], "'prun'", "did you mean 'prune'")
row("validate with a bad value", lambda g: ["validate", CONFIG, "batch_size=x"], "batch_size")
row("cp onto a file", lambda g: file("mine.yaml", "", lambda g: ["cp", CONFIG, str(g.tmp / "mine.yaml")])(g),
    "mine.yaml", "--force")  # fmt: skip
row("prune to too many layers", kd("num_layers=9", recipe="prune", config="tiny/prune"), "num_layers")
row("prune with a layer that is not there", kd("layers=[0,7]", "num_layers=null", recipe="prune", config="tiny/prune"),
    "layers", "7")  # fmt: skip
row("prune with a list and a number", kd("layers=[0,1]", recipe="prune", config="tiny/prune"), "layers, num_layers")

# Data

row(
    "missing dataset file",
    kd("dataset={_component_: kdtune.data.alpaca_dataset, source: nowhere.jsonl}"),
    "nowhere.jsonl",
)
row("dataset without a source", kd("dataset=kdtune.data.chat_dataset"), "dataset.source", "is missing")
row("unknown dataset", kd("dataset=kdtune.data.alpaca_datasett"), "dataset", "did you mean 'alpaca_dataset'")
row("module as dataset", kd("dataset=kdtune.data.alpaca"), "dataset", "kdtune.data.alpaca is not a class or function")
row("unknown split of the quickstart data", kd("dataset.split=validation"), "validation", "train, test")
row("empty dataset", data("d.jsonl", ""), "d.jsonl", "0 rows")
row("dataset of blank lines", data("d.jsonl", "\n\n"), "d.jsonl", "0 rows")
row("broken line", data("d.jsonl", GOOD_LINE + '{"instruction": "x"\n'), "d.jsonl", "line 2")
row("line that is no object", data("d.jsonl", GOOD_LINE + "7\n"), "d.jsonl", "line 2", "object")
row("array with a number", data("d.json", "[" + GOOD_LINE + ", 7]"), "d.json", "element 2")
row("array cut off", data("d.json", "[" + GOOD_LINE), "d.json", "line 2")
row("not UTF-8", data("d.jsonl", b'{"instruction": "\xff\xfe", "output": "x"}\n'), "d.jsonl", "UTF-8")
row(
    "wrong columns",
    data("d.jsonl", '{"question": "x", "answer": "y"}\n'),
    "d.jsonl",
    "'instruction'",
    "question, answer",
)
row("column of the wrong type", data("d.jsonl", '{"instruction": "x", "output": 4}\n'), "row 1", "'output'", "int")
row(
    "column with null",
    data("d.jsonl", GOOD_LINE + '{"instruction": "x", "output": null}\n'),
    "row 2",
    "'output'",
    "null",
)
row("unknown role", data("d.jsonl", '{"messages": [{"role": "boss", "content": "x"}]}\n', builder="chat_dataset"),
    "row 1", "'boss'")  # fmt: skip
row("conversation that is text", data("d.jsonl", '{"messages": "x"}\n', builder="chat_dataset"), "row 1", "list")
row("unknown suffix", data("d.xyz", GOOD_LINE), "d.xyz")
row("gzip cut off", data("d.jsonl.gz", gzip.compress(GOOD_LINE.encode() * 50)[:40]), "d.jsonl.gz")
row("gzip that is none", data("d.jsonl.gz", GOOD_LINE), "d.jsonl.gz")
row("parquet that is none", data("d.parquet", GOOD_LINE), "d.parquet")
row("empty CSV", data("d.csv", ""), "d.csv", "empty")
row("CSV of the header alone", data("d.csv", "instruction,output\n"), "d.csv", "0 rows")
row("unknown split of a file", data("d.jsonl", GOOD_LINE, "dataset.split=validation"), "d.jsonl", "validation", "train")
row("split expression that is none", data("d.jsonl", GOOD_LINE, "dataset.split='train[:x%]'"), "d.jsonl", "train[:x%]")
row("empty part of a split", data("d.jsonl", GOOD_LINE, "dataset.split='train[:0%]'"), "d.jsonl", "0 rows")
row(
    "column map with unknown columns",
    data("d.jsonl", GOOD_LINE, "dataset.column_map={question: x}"),
    "column_map",
    "question",
)
row("files without their kind", kd("dataset={_component_: kdtune.data.alpaca_dataset, source: json, data_files: '{tmp}/*.jsonl'}"),
    "data_files", "*.jsonl")  # fmt: skip
row("filter that is none", data("d.jsonl", GOOD_LINE, "dataset.filter_fn=builtins.len"), "filter_fn", "int")
row("filter that raises", data("d.jsonl", GOOD_LINE, "dataset.filter_fn=builtins.int"), "d.jsonl", "filter_fn")
row("every row filtered out", data("d.jsonl", GOOD_LINE, "dataset.filter_fn=builtins.callable"), "1 filtered out")
row("every label cut off",
    data("d.jsonl", GOOD_LINE, "tokenizer.max_seq_len=4", "dataset.train_on_input=false", "dataset.truncation=right"),
    "d.jsonl", "no label to train on", "max_seq_len")  # fmt: skip
row("every row too long", data("d.jsonl", GOOD_LINE, "tokenizer.max_seq_len=4", "dataset.train_on=last"),
    "d.jsonl", "1 left out: longer than max_seq_len")  # fmt: skip
row("train_on two ways", data("d.jsonl", GOOD_LINE, "dataset.train_on=answers", "dataset.train_on_input=true"),
    "train_on=answers, train_on_input=true: contradict")  # fmt: skip
row("every held-out row too long",
    kd("tokenizer.max_seq_len=4", "dataset_val.train_on_input=false"), "quickstart (test)", "27 left out")  # fmt: skip
row("stream without a number of steps",
    data("d.jsonl", GOOD_LINE, "dataset.streaming=true", "max_steps_per_epoch=null"), "max_steps_per_epoch")  # fmt: skip
row("dataset of the hub without a hub",
    kd("dataset={_component_: kdtune.data.alpaca_dataset, source: nobody/nothing}"), "nobody/nothing")  # fmt: skip
row("mixture with a weight too many",
    kd("dataset={_component_: kdtune.data.mixed_dataset, weights: [1, 2], "
       "datasets: [{_component_: kdtune.data.quickstart_dataset}]}"), "weights")  # fmt: skip

# The student's files

row("truncated safetensors", student(cut("model.safetensors")), "model.safetensors", "cut off")
row("empty safetensors", student(write("model.safetensors", "")), "model.safetensors", "0 bytes")
row("corrupt header", student(write("model.safetensors", b"\x10\0\0\0\0\0\0\0{not json at all")), "model.safetensors")
row("header longer than the file", student(write("model.safetensors", b"\xff" * 64)), "model.safetensors")
row("tensor of the wrong shape", student(tensors(lambda t: t.update({Q_PROJ: torch.zeros(3, 32)}))),
    "model.safetensors", Q_PROJ, "[3, 32]", "[32, 32]")  # fmt: skip
row("missing tensor", student(tensors(lambda t: t.pop(Q_PROJ))), Q_PROJ, "missing")
row("tensor too many", student(tensors(lambda t: t.update(extra=torch.zeros(2)))), "model.safetensors", "extra")
row("tensor of a layer too many",
    student(tensors(lambda t: t.update({Q_PROJ.replace(".0.", ".9."): t[Q_PROJ].clone()}))), "layers.9")  # fmt: skip
row("tensor of integers", student(tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)}))), Q_PROJ, "int8")
row("head that is not the embedding",
    student(tensors(lambda t: t.update({"lm_head.weight": torch.zeros(320, 32)}))), "lm_head.weight", "tie")  # fmt: skip
row(
    "missing shard",
    student(remove("model-00002-of-00003.safetensors"), start="sharded"),
    "model-00002-of-00003",
    "missing",
)
row(
    "truncated shard",
    student(cut("model-00002-of-00003.safetensors"), start="sharded"),
    "model-00002-of-00003",
    "cut off",
)
row("truncated index", student(cut("model.safetensors.index.json"), start="sharded"), "model.safetensors.index.json")
row("index that names a file elsewhere",
    student(setting("weight_map", {Q_PROJ: "../x.safetensors"}, "model.safetensors.index.json"), start="sharded"),
    "model.safetensors.index.json", "../x.safetensors")  # fmt: skip
row("index that is wrong",
    student(lambda folder: write("model.safetensors.index.json", (folder / "model.safetensors.index.json").read_text()
        .replace("00003-of", "00001-of", 1))(folder), start="sharded"), "model-00001-of-00003.safetensors", "index")  # fmt: skip
row("shards without an index", student(remove("model.safetensors.index.json"), start="sharded"), "index")
row("config.json cut off", student(cut("config.json")), "config.json", "cut off")
row("config.json missing", student(remove("config.json")), "config.json", "missing")
row("config.json is a list", student(write("config.json", "[]")), "config.json", "list")
row(
    "other architecture", student(setting("architectures", ["MixtralForCausalLM"])), "config.json", "MixtralForCausalLM"
)
row("other rope", student(both(setting("rope_scaling", {"rope_type": "dynamic", "factor": 4.0}),
    setting("rope_parameters", None))), "config.json", "dynamic")  # fmt: skip
row("rope settings that are text", student(both(setting("rope_scaling", "llama3"), setting("rope_parameters", None))),
    "config.json", "rope_scaling")  # fmt: skip
row("attention bias", student(setting("attention_bias", True)), "config.json", "attention_bias")
row("other activation", student(setting("hidden_act", "gelu")), "config.json", "hidden_act")
row("quantized by others", student(setting("quantization_config", {"quant_method": "gptq"})), "quantization_config")
row("size that is text", student(setting("hidden_size", "big")), "config.json", "hidden_size", "big")
row("size that is null", student(setting("hidden_size", None)), "config.json", "hidden_size")
row("no heads", student(setting("num_attention_heads", 0)), "config.json", "num_attention_heads")
row("other size than the weights'", student(setting("intermediate_size", 96)), "mlp", "[64, 32]", "[96, 32]")
row("other builder than the weights'", student(lambda _: None, model="model.num_layers=3"), "num_layers=3", "stored 2")
row("pickled weights", student(rename("model.safetensors", "pytorch_model.bin")), "pytorch_model.bin", "run code")
row("named pickle", student(write("evil.bin", pickle.dumps(RunsCode())), files="[evil.bin]"), "evil.bin", "run code")
row("Meta's file with code in it",
    student(both(remove("model.safetensors"), write("params.json", '{"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}'),
                 lambda folder: torch.save({"x": RunsCode()}, folder / "consolidated.00.pth"))),
    "consolidated.00.pth")  # fmt: skip
row("Meta's file cut off",
    student(both(remove("model.safetensors"), write("params.json", "{}"), write("consolidated.00.pth", b"PK\x03\x04"))),
    "consolidated.00.pth")  # fmt: skip
row(
    "GGUF that is none",
    student(
        both(remove("model.safetensors"), write("m.gguf", "no")),
    ),
    "m.gguf",
)
row(
    "GGUF cut off in its header",
    student(both(remove("model.safetensors"), write("m.gguf", b"GGUF\x03\0\0\0\x09"))),
    "m.gguf",
)
row("two GGUF files", student(both(remove("model.safetensors"), write("a.gguf", "x"), write("b.gguf", "x"))),
    "a.gguf, b.gguf", "checkpoint_files")  # fmt: skip
row("folder without weights", student(remove("model.safetensors")), "no weights found")
row("named file that is missing", student(lambda _: None, files="[x.safetensors]"), "x.safetensors", "missing")

# Tokenizers, and two models that do not speak of the same tokens


def other_teacher(given: Given) -> list[str]:
    teacher = given.copy("model", "teacher")
    document = json.loads((teacher / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(document))
    return kd(checkpoint("teacher", "teacher_checkpointer"), "teacher_model=null")(given)


row("teacher with another tokenizer", other_teacher, "teacher_checkpointer", "different tokenizers")
row("tokenizer larger than the embedding",
    student(tensors(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(200, 32)}))), "embed_tokens")  # fmt: skip
row("folder without a tokenizer", tokenizer(remove("tokenizer.json")), "student", "no tokenizer found")
row("tokenizer.json cut off", tokenizer(cut("tokenizer.json")), "tokenizer.json", "truncated")
row("tokenizer_config.json cut off", tokenizer(cut("tokenizer_config.json")), "tokenizer_config.json")
row(
    "chat template that is no Jinja",
    tokenizer(write("chat_template.jinja", "{% for x in %}")),
    "chat template",
    "Jinja",
)
row("chat template that refuses", tokenizer(write("chat_template.jinja", "{{ raise_exception('no') }}")), "row 1", "no")
row("sentencepiece cut off", tokenizer(both(remove("tokenizer.json"), write("tokenizer.model", b"\x0a\x0e\x0a"))),
    "tokenizer.model", "truncated")  # fmt: skip
row("tiktoken with a broken line",
    tokenizer(both(remove("tokenizer.json"), write("tokenizer.model", "IQ== 0\nIg== 1\nIw=\n"))), "tokenizer.model", "line 3")  # fmt: skip
row("tiktoken of another size", tokenizer(both(remove("tokenizer.json"), write("tokenizer.model", "IQ== 0\nIg== 1\n"))),
    "tokenizer.model", "128000")  # fmt: skip

# The output folder, and resuming


def occupied(given: Given) -> list[str]:
    given.out.write_text("a file")
    return kd()(given)


row("output_dir is a file", occupied, "output_dir", "is a file")
row("output_dir below a file", file("notes.txt", "x", kd("output_dir={tmp}/notes.txt/out")), "output_dir", "notes.txt")
row("output_dir that nobody may make", kd("output_dir=/proc/kdtune/out"), "/proc", "output_dir")
row("output_dir on a read-only system", kd("output_dir=/sys/kernel/kdtune"), "/sys/kernel", "output_dir")
row("output_dir holds a run", resumed(lambda _: None, resume="false"), "output_dir", "resume_from_checkpoint=true")
row("prune into a folder that is not empty",
    file("out", "x", kd(recipe="prune", config="tiny/prune")), "output_dir", "is a file")  # fmt: skip
row("resume with another config", resumed(lambda _: None, "batch_size=2"), "batch_size: was 4, is 2")
row("resume with another optimizer", resumed(lambda _: None, "optimizer={_component_: torch.optim.SGD, lr: 1.0e-2}"),
    "optimizer", "AdamW", "SGD")  # fmt: skip
row("state cut off", resumed(cut("step_2/state/state.json")), "step_2/state/state.json", "cut off")
row("state's tensors cut off", resumed(lambda run: cut(str(next((run / "step_2/state").glob("*.distcp")).relative_to(run)))(run)),
    "step_2/state")  # fmt: skip
row(
    "state's tensors missing",
    resumed(lambda run: next((run / "step_2/state").glob("*.distcp")).unlink()),
    "step_2/state",
)
row(
    "state's list of tensors is another pickle",
    resumed(write("step_2/state/.metadata", pickle.dumps(RunsCode()))),
    "step_2/state",
)
row("state of another version", resumed(setting("version", 99, "step_2/state/state.json")), "state.json", "99")
row("checkpoint cut off", resumed(cut("step_2/model.safetensors")), "step_2/model.safetensors", "cut off")
row(
    "metrics with a broken line",
    resumed(write("metrics.jsonl", '{"step": 1}\nbroken\n{"step": 2}\n')),
    "metrics.jsonl",
    "line 2",
)
row("config of the run is not YAML", resumed(write("config.yaml", "a: [1\n")), "config.yaml")
row("run.json cut off", resumed(cut("run.json")), "run.json")


def content(path: Path) -> dict[str, str] | None:
    """Digests of everything at a path; None where nothing is."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(one): hashlib.sha256(one.read_bytes()).hexdigest() if one.is_file() else "" for one in files}


def check_message(text: str, words: tuple[str, ...]) -> None:
    """One message, for people, that says which key or file is meant."""
    assert "Traceback" not in text and 'File "' not in text
    assert sum("error: " in line for line in text.splitlines()) == 1, text
    message = text[text.index("error: ") :]
    assert all(word in message for word in words), message
    assert len(message) < 1500, message


def check_nothing_half_written(out: Path) -> None:
    """Whatever is there under its final name is whole, and nothing else of it is left."""
    assert not [path.name for path in out.glob(".*.partial-*")], "leftovers"
    for folder in [*out.glob("step_*"), *out.glob("final")]:
        load_model(folder)
        assert folder.name == "final" or is_whole_state(folder / "state")


def test_there_are_at_least_fifty() -> None:
    assert len(ROWS) >= 50


@pytest.mark.parametrize("name", ROWS)
def test_refused_before_anything_is_written(
    name: str, cli: Callable[..., Any], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = ROWS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed, wherever the tests run
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a recipe of the user's own is imported
    given = Given(tmp_path, good)
    argv = make(given)
    before, listed = content(given.out), sorted(tmp_path.iterdir())
    ended = cli(*argv)
    assert ended.code == 2, ended.err
    check_message(ended.err, words)
    assert content(given.out) == before and sorted(tmp_path.iterdir()) == listed
    assert not PICKLE_RAN.exists()


@pytest.mark.parametrize(
    "name",
    [
        "truncated safetensors",
        *(
            pytest.param(name, marks=pytest.mark.slow("imports torch anew; the row itself is tried in this process"))
            for name in ("optimzer.lr=1", "unknown config", "output_dir that nobody may make", "state cut off")
        ),
    ],
)
def test_a_process_ends_the_same_way(name: str, process: Callable[..., Any], good: Path, tmp_path: Path) -> None:
    make, words = ROWS[name]
    given = Given(tmp_path, good)
    argv = make(given)
    before = content(given.out)
    ended = process(*argv)
    assert ended.code == 2, ended.err
    check_message(ended.err, words)
    assert content(given.out) == before


# Runs that fail after their start: what they had saved until then is whole.

SHORT = ("sample_prompts=[]", "max_steps_per_epoch=3", "save_every_n_steps=1", "run_val_every_n_steps=null")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            kd(*SHORT, "optimizer.lr=.inf", "clip_grad_norm=null", "lr_scheduler=null"),
            ("step 2", "batch", "optimizer.lr"),
        ),
        (
            kd(*SHORT, "optimizer.lr=1e30", "clip_grad_norm=null", "lr_scheduler=null"),
            ("step 2", "batch", "optimizer.lr"),
        ),
        (
            student(tensors(lambda t: t[Q_PROJ].fill_(float("nan"))), "sample_prompts=[]"),
            ("step 1", "loss is nan"),
        ),
    ],
    ids=["infinite learning rate", "huge learning rate", "NaN in the weights"],
)
def test_a_diverged_run_fails_with_what_it_had_saved(
    make: Make, words: tuple[str, ...], cli: Callable[..., Any], good: Path, tmp_path: Path
) -> None:
    given = Given(tmp_path, good)
    ended = cli(*make(given))
    assert ended.code == 1
    check_message(ended.err, words)
    assert not (given.out / "final").exists()
    check_nothing_half_written(given.out)


def test_a_model_that_cannot_answer_is_named(cli: Callable[..., Any], good: Path, tmp_path: Path) -> None:
    ended = cli(*student(tensors(lambda t: t[Q_PROJ].fill_(float("nan"))))(Given(tmp_path, good)))
    assert ended.code == 2
    check_message(ended.err, ("student: ", "logits are not numbers"))


@pytest.mark.parametrize("flushes", [1, 5, 11, 20, 31])
def test_a_disk_that_is_full_at_any_moment(
    flushes: int, cli: Callable[..., Any], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is flushed before it gets its name, which is where a file system that allocates late says so."""
    given, calls = Given(tmp_path, good), []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= flushes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        ended = cli(*kd(*SHORT)(given))
    assert ended.code == 2 and len(calls) >= flushes
    check_message(ended.err, ("No space left on device", str(given.out)))
    check_nothing_half_written(given.out)
    # With space again the run goes on, or starts anew where nothing had been saved.
    assert cli(*kd(*SHORT, "resume_from_checkpoint=true")(given)).code == 0
    check_nothing_half_written(given.out)


@pytest.mark.parametrize(
    ("kilobytes", "file"),
    [
        pytest.param(
            60, "step_1", id="weights", marks=pytest.mark.slow("a process of its own; others fail in this process")
        ),
        pytest.param(
            150, "step_1", id="state", marks=pytest.mark.slow("a process of its own; others fail in this process")
        ),
    ],
)
def test_files_that_may_not_grow(
    kilobytes: int, file: str, process: Callable[..., Any], good: Path, tmp_path: Path
) -> None:
    """A real error of the system in the middle of a write, in the weights (114 kB) or in the state (230 kB)."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, kilobytes * 1000))

    given = Given(tmp_path, good)
    ended = process(*kd(*SHORT)(given), prepare=limit)
    assert ended.code == 2, ended.err
    check_message(ended.err, (file, "File too large"))
    assert not list(given.out.glob("step_*"))
    check_nothing_half_written(given.out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_disk_that_is_full_at_the_very_end(cli: Callable[..., Any], good: Path, tmp_path: Path, drawn: None) -> None:
    given = Given(tmp_path, good)
    given.out.mkdir()
    (given.out / "loss.png").symlink_to("/dev/full")
    ended = cli(*kd(*SHORT)(given))
    assert ended.code == 1
    check_message(ended.err, ("No space left on device",))
    check_nothing_half_written(given.out)
    assert (given.out / "final").is_dir()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=kdtune.tokenizers.byte_tokenizer"], "model: kdtune.tokenizers.byte_tokenizer gives"),
        (["tokenizer=kdtune.data.quickstart_dataset"], "tokenizer: kdtune.data.quickstart_dataset gives"),
        (
            ["dataset=kdtune.models.llama"],
            "dataset: kdtune.models.llama gives Transformer; the recipe needs Dataset here",
        ),
        (["checkpointer=kdtune.models.llama"], "checkpointer: kdtune.models.llama gives Transformer"),
        (["optimizer=torch.optim.LBFGS"], "optimizer: the step of torch.optim.LBFGS needs closure"),
        (["lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"], "lr_scheduler: the step of"),
        (["lr_scheduler.num_warmup_steps=11"], "lr_scheduler.num_warmup_steps=11: longer than the 10 training steps"),
        (["model.num_layers=2147483648"], "model: num_layers=2147483648: must be above 0 and at most 10000"),
        (["model.embed_dim=2147483648"], "model: embed_dim=2147483648: must be above 0 and at most 268435456"),
        (
            ["model.embed_dim=262144", "model.intermediate_dim=268435456", "model.num_layers=10000"],
            "parameters; must be at most 1e+16; check the sizes",
        ),
        (["model.num_kv_heads=3"], "model: num_kv_heads=3: must divide num_heads=4"),
        (["optimizer.lr=-1"], "optimizer: torch.optim.AdamW: cannot be made with lr=-1"),
        (["batch_size=9223372036854775808"], "batch_size=9223372036854775808: must be at most 2,147,483,647"),
        (["num_workers=100000"], "num_workers=100000: must be at most 512"),
        (["num_workers=-1"], "num_workers=-1: must be 0"),
        (["seed=18446744073709551616"], "seed=18446744073709551616: must be at most"),
    ],
)
@pytest.mark.parametrize("config", ["finetune", "knowledge_distillation"])
def test_components_of_another_kind_and_absurd_numbers(
    config: str, overrides: list[str], words: str, cli: Callable[..., Any]
) -> None:
    done = cli("validate", f"tiny/{config}", *overrides)
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        ("~dataset_val", "run_val_every_n_steps=5: has no effect without dataset_val; to remove it too: ~run_val_every_n_steps"),
        ("~save_every_n_steps", "keep_last_n_checkpoints=2: has no effect without save_every_n_steps; to remove it too: ~keep"),
        ("sample_prompts=[]", "sample_every_n_steps=5: has no effect without sample_prompts; to remove it too: ~sample_every_n_steps"),
        ("sample_prompts=[]", "sample_max_new_tokens=8: has no effect without sample_prompts; to remove it too: ~sample_max_new"),
    ],
)  # fmt: skip
def test_a_setting_that_loses_its_effect_is_told_and_does_not_stop_the_run(
    removed: str, told: str, cli: Callable[..., Any]
) -> None:
    settings = [
        "run_val_every_n_steps=5",
        "save_every_n_steps=5",
        "keep_last_n_checkpoints=2",
        "sample_every_n_steps=5",
    ]
    done = cli("validate", "tiny/knowledge_distillation", *settings, "sample_prompts=[Hi]", removed)
    assert done.code == 0, done.err
    assert told in done.err
    assert "has no effect" not in cli("validate", "tiny/knowledge_distillation", *settings, "sample_prompts=[Hi]").err


@pytest.mark.parametrize("config", ["finetune", "knowledge_distillation"])
def test_a_warmup_longer_than_the_training_is_told_before_a_model_is_built(
    config: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr("kdtune.parallel.build_model", build)
    monkeypatch.setattr("kdtune.teachers.build_teacher", build)
    settings = ["max_steps_per_epoch=null", "lr_scheduler.num_warmup_steps=100000", f"output_dir={tmp_path / 'out'}"]
    assert cli("validate", f"tiny/{config}", *settings).code == 0  # the data are not counted
    done = cli("run", config, "--config", f"tiny/{config}", *settings)
    assert done.code == 2
    assert "lr_scheduler.num_warmup_steps=100000: longer than the" in done.err
    assert not (tmp_path / "out").exists()


NOTE = "dataset was replaced on the command line; dataset_val is still kdtune.data.quickstart_dataset"
OTHER = ["dataset=kdtune.data.alpaca_dataset", "dataset.source={rows}"]


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (OTHER, True),
        (["dataset.source={rows}"], False),  # quickstart_dataset takes none: an error, and nothing else
        ([*OTHER, "~dataset_val"], False),
        ([*OTHER, "dataset_val=null"], False),
        ([*OTHER, "dataset_val=kdtune.data.alpaca_dataset", "dataset_val.source={rows}"], False),
        ([*OTHER, "dataset_val.split=test[:2]"], False),
        (["dataset.train_on=all"], False),
        (["dataset.split=train[:8]"], False),
        (["dataset=kdtune.data.quickstart_dataset"], False),
    ],
)
def test_held_out_examples_of_the_data_that_were_replaced_are_told(
    overrides: list[str], is_told: bool, cli: Callable[..., Any], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "i", "input": "", "output": "o"}) + "\n")
    settings = [override.format(rows=rows) for override in overrides]
    done = cli("validate", "tiny/finetune", *settings)
    assert (NOTE in done.out) is is_told
    if is_told:
        assert done.out.count("; give dataset_val=..., or leave it out: ~dataset_val") == 1
        missing = ["tokenizer=kdtune.tokenizers.load", "tokenizer.path=/nowhere"]
        done = cli("run", "finetune", "--config", "tiny/finetune", *settings, *missing)
        assert done.code == 2 and done.err.count(NOTE) == 1


@pytest.mark.parametrize("config", ["finetune", "evaluate", "generate", "prune", "quantize"])
def test_sizes_that_no_model_has_are_told_by_validate(config: str, cli: Callable[..., Any]) -> None:
    done = cli("validate", f"tiny/{config}", "model.intermediate_dim=99999999999")
    assert done.code == 2
    assert "model: intermediate_dim=99999999999: must be above 0 and at most" in done.err


def test_a_model_larger_than_the_memory_is_told_before_it_is_built(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli(
        "run",
        "finetune",
        "--config",
        "tiny/finetune",
        "model.embed_dim=262144",
        "model.num_layers=40",
        f"output_dir={tmp_path / 'out'}",
    )
    assert done.code == 2
    assert (
        "starts from random weights of" in done.err
        and "GB of memory; give smaller sizes, or a checkpointer" in done.err
    )
    assert not (tmp_path / "out").exists()
