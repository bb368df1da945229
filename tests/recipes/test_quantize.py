"""The quantize recipe through its CLI: its table, its folder in the other recipes, and what it refuses."""

import json
import re

import pytest
import torch

from kdtune.checkpoint import load_model
from kdtune.models.quantization import is_quantized

CONFIG = "tiny/quantize"


def quantize(cli, folder, *overrides):
    return cli("run", "quantize", "--config", CONFIG, f"output_dir={folder}", *overrides)


@pytest.mark.parametrize("scheme", ["int8_weight_only", "nf4"])
def test_folder_and_table(cli, tmp_path, scheme):
    done = quantize(cli, tmp_path / "q", f"scheme={scheme}")
    assert done.code == 0, done.err
    model = load_model(tmp_path / "q")
    assert is_quantized(model.layers[0].attn.q_proj.weight)
    rows = [line.split() for line in done.out.splitlines()]
    before, after = (next(row for row in rows if row[:1] == [name]) for name in ("fp32", scheme))
    assert float(after[1]) < 0.6 * float(before[1])  # MB
    assert 0 < float(after[2]) <= float(after[3]) < 0.15  # mean and largest error
    assert float(after[4]) == pytest.approx(float(before[4]), abs=0.05)  # a random model's loss
    assert {file.name for file in (tmp_path / "q").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "run.json",
        "config.yaml",
    }


def test_generate_reads_it(cli, tmp_path):
    assert quantize(cli, tmp_path / "q").code == 0
    checkpointer = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path / 'q'}}}"
    command = ["run", "generate", "--config", "tiny/generate", "~model", checkpointer, "temperature=0"]
    done = cli(*command, "dtype=null")
    assert done.code == 0, done.err
    assert cli(*command, "dtype=fp32").out.rsplit("\n", 2)[0] == done.out.rsplit("\n", 2)[0]
    refused = cli(*command, "dtype=bf16")
    assert refused.code == 2 and "made from float32, which cannot be turned into bfloat16" in refused.err


def test_training_on_it_is_refused(cli, tmp_path):
    assert quantize(cli, tmp_path / "q", "model.embed_dim=32", "model.intermediate_dim=64").code == 0
    done = cli(
        "run", "knowledge_distillation_single_device", "--config", "tiny/knowledge_distillation",
        f"output_dir={tmp_path / 'run'}", "sample_prompts=[]",
        f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path / 'q'}}}",
    )  # fmt: skip
    assert done.code == 2
    assert "0 trainable parameters" in done.err


def test_the_untied_head(cli, tmp_path):
    done = quantize(cli, tmp_path / "q", "model.tie_embeddings=false", "quantize_output=true", "~dataset_val")
    assert done.code == 0, done.err
    model = load_model(tmp_path / "q")
    assert is_quantized(model.output.weight) and model.tok_embeddings.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheme=int3"], "scheme=int3: unknown; one of int8_weight_only"),
        (["scheme=int4_weight_only", "dtype=bf16"], "int4_weight_only: needs a CUDA device.*here int8_weight_only"),
        (["scheme=float8_dynamic"], "float8_dynamic: needs a CUDA device.*nf4 work"),
        (["group_size=32"], "group_size=32: with int8_weight_only null"),
        (["scheme=intx_4bit", "group_size=128"], "layers.0.attn.q_proj has 64 input features"),
        (["quantize_output=true"], "the held-out loss needs a plain head"),
        (["quantize_output=true", "~dataset_val"], "quantize_output=true: the head is the embedding"),
        (["batch_size_val=0"], "batch_size_val=0"),
        (["~model"], "checkpointer: missing"),
        (["model.vocab_size=257"], "the model's vocabulary is 257"),
        (["model={_component_: kdtune.models.lora_llama3_2_1b}"], "merge the adapters: use checkpointer.adapter_dir"),
        (["model={_component_: kdtune.models.qlora_llama3_2_1b}"], "merge the adapters: use checkpointer.adapter_dir"),
    ],
)
def test_bad_input(cli, tmp_path, overrides, message):
    done = quantize(cli, tmp_path / "q", *overrides)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert not (tmp_path / "q").exists()


def test_nothing_is_overwritten(cli, tmp_path):
    assert quantize(cli, tmp_path / "q").code == 0
    done = quantize(cli, tmp_path / "q")
    assert done.code == 2 and "choose another output_dir" in done.err


def test_a_folder_that_is_not_empty_is_refused_at_the_start(cli, tmp_path, monkeypatch):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    done = quantize(cli, tmp_path / "q")
    assert done.code == 2 and "is not empty (holds 'notes.txt'); choose another output_dir" in done.err


def test_a_teacher_is_quantized_as_it_is_read(cli, tmp_path):
    """The numbers of a teacher from the folder that `quantize` writes, without that folder."""
    sizes = ["embed_dim=64", "num_layers=2", "intermediate_dim=128", "tie_embeddings=true"]
    assert cli("run", "quantize", "--config", "tiny/quantize", "scheme=nf4", f"output_dir={tmp_path / 'q'}").code == 0
    run = [
        "run",
        "knowledge_distillation",
        "--config",
        "tiny/knowledge_distillation",
        "sample_prompts=[]",
        "max_steps_per_epoch=2",
    ]
    folder = f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path / 'q'}}}"
    names = {
        "stored": ["~teacher_model", folder, "checkpointer=null"],
        "quantized": [*(f"teacher_model.{size}" for size in sizes), "teacher_quantization=nf4"],
    }
    found = {}
    for name, settings in names.items():
        done = cli(*run, *settings, f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
        found[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert found["stored"][0]["val_kd_loss"] == pytest.approx(
        found["quantized"][0]["val_kd_loss"], rel=0.05
    )  # other students
    refused = cli(*run, *names["stored"], "teacher_quantization=int8", f"output_dir={tmp_path / 'refused'}")
    assert refused.code == 2 and "quantized already" in refused.err and not (tmp_path / "refused").exists()
