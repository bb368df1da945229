"""The loss through the recipes: heads of different height, and the user's own divergences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CLI
from transformers import AutoModelForCausalLM

from kdtune.data import Loader, quickstart_dataset
from kdtune.tokenizers import byte_tokenizer

SHORT = ("sample_prompts=[]", "max_steps_per_epoch=2", "save_every_n_steps=null", "run_val_every_n_steps=null")
DIVERGENCES = """
class ReverseKL:
    @staticmethod
    def divergence(student, teacher):
        return (student.exp() * (student - teacher)).sum(-1)


class MeanKL:
    @staticmethod
    def divergence(student, teacher):
        return (teacher.exp() * (teacher - student)).sum(-1).mean()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's module."""
    (tmp_path / "own_divergences.py").write_text(DIVERGENCES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kd_loss", "said"),
    [
        ((), "cross entropy and divergence are over all of the student's"),
        (("kd_loss=own_divergences.ReverseKL",), "the divergence over the first 300 ids, renormalized"),
    ],
)
def test_a_student_with_more_rows_than_its_teacher(
    kd_loss: tuple[str, ...], said: str, cli: CLI, good: Path, here: Path
) -> None:
    student = (
        "~model",
        f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good / 'model'}}}",
    )
    done = cli(
        "run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={here / 'kd'}", *SHORT,
        *student, "teacher_model.vocab_size=300", *kd_loss,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "student 320 rows, teacher 300" in done.err and said in done.err
    before, *steps = rows(here / "kd")
    assert all(0 < row["student_mass_outside"] < 1 for row in steps)
    assert steps[-1]["val_student_mass_outside"] < before["val_student_mass_outside"]

    adapter = "~adapter"
    done = cli(
        "run", "finetune", "--config", "tiny/finetune", f"output_dir={here / 'alone'}", *SHORT, *student, adapter
    )
    assert done.code == 0, done.err
    assert rows(here / "alone")[0]["val_class_loss"] == before["val_class_loss"]


@pytest.mark.parametrize(
    "command",
    [
        ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation"),
        ("validate", "tiny/knowledge_distillation"),
        ("run", "evaluate", "--config", "tiny/evaluate"),
    ],
    ids=["run", "validate", "evaluate"],
)
def test_a_divergence_of_the_wrong_shape_is_a_finding(command: tuple[str, ...], cli: CLI, here: Path) -> None:
    done = cli(*command, "kd_loss=own_divergences.MeanKL", f"output_dir={here / 'out'}")
    assert done.code == 2
    assert "kd_loss: the divergence own_divergences.MeanKL.divergence gives a tensor of shape []" in done.err
    assert "allowed is one value a token" in done.err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("dtype=fp32",), "loss_logits_dtype=bf16: dtype is fp32; it is for models computed in bf16, use null"),
        (("dtype=bf16", "parallelism=kdtune.distributed.Parallelism", "parallelism.param_dtype=fp32"),
         "loss_logits_dtype=bf16: parallelism.param_dtype is fp32; it is for models computed in bf16, use null"),
    ],
)  # fmt: skip
def test_bf16_logits_of_a_model_computed_in_fp32_are_refused(settings: tuple[str, ...], said: str, cli: CLI) -> None:
    done = cli("validate", "tiny/knowledge_distillation", "loss_logits_dtype=bf16", *settings)
    assert done.code == 2 and said in done.err


def test_a_steps_gradient_is_that_of_transformers_mean_over_the_labels(cli: CLI, good: Path, here: Path) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good / 'model'}}}"
    done = cli(
        "run", "finetune", "--config", "tiny/finetune", f"output_dir={here / 'one'}", *SHORT, "~model", "~adapter", base,
        "shuffle=false", "batch_size=4", "gradient_accumulation_steps=2", "dtype=fp32", "tokenizer.max_seq_len=256",
    )  # fmt: skip
    assert done.code == 0, done.err
    loader = Loader(quickstart_dataset(byte_tokenizer(max_seq_len=256)), batch_size=8, pad_id=0, shuffle=False)
    batch, model = next(loader), AutoModelForCausalLM.from_pretrained(good / "model", dtype=torch.float32)
    # transformers leaves the gradient of the pad id's embedding out, also where the id (here eos) is a token of the text.
    model.model.embed_tokens.padding_idx = None
    loss = torch.nn.functional.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    first = next(row for row in rows(here / "one") if row["step"] == 1)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
