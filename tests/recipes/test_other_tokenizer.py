"""A teacher with a tokenizer of its own, through the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI
from tokenizers import AddedToken

from kdtune.tokenizers import GGUFTokenizer
from kdtune.tokenizers.bpe import tokenizer_from_ranks
from kdtune.tokenizers.chat_format import LLAMA3

RUN = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation")
SHORT = ("max_steps_per_epoch=4", "save_every_n_steps=2", "run_val_every_n_steps=2", "dataset.split=train[:40]",
         "dataset_val.split=test[:4]", "lr_scheduler.num_warmup_steps=0")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a teacher: other ids, words of several bytes, another chat template."""
    ranks = {bytes([i]): 255 - i for i in range(256)} | {word: 256 + i for i, word in enumerate((b"th", b"the", b" a"))}
    backend = tokenizer_from_ranks(ranks, r" ?\p{L}+|[^\p{L}]")
    names = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    named = {"bos_token": names[0], "eos_token": names[1]}
    made = GGUFTokenizer(backend, named=named, model_max_length=None, chat_template=LLAMA3, origin="test")
    path = tmp_path_factory.mktemp("teacher")
    made.save(path, is_chat=True)
    return path


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: one[key] for key in one if "loss" in key or key in ("step", "grad_norm")} for one in lines]


@pytest.mark.parametrize("name", ["ULD", "HybridULD", "ALM"])
def test_a_run_falls_and_resumes_to_the_bit(name: str, cli: CLI, folder: Path, tmp_path: Path) -> None:
    arguments = (*RUN, *SHORT, f"kd_loss=kdtune.losses.{name}", "teacher_tokenizer=kdtune.tokenizers.load",
                 f"teacher_tokenizer.path={folder}")  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = cli(*arguments, f"output_dir={whole}", "kd_ratio=0.5")
    assert done.code == 0, done.err
    said = done.out + done.err
    assert (
        "100.0 % of the trained bytes (100.0 % of the tokens) are aligned" in said or "% of the trained bytes" in said
    )
    found = metrics(whole)
    assert found[-1]["val_class_loss"] < found[0]["val_class_loss"] and found[-1]["val_kd_loss"] >= 0
    assert "val_forward_kl" not in found[-1]
    assert {json.loads(line)["model"] for line in (whole / "samples.jsonl").read_text().splitlines()} == {
        "student",
        "teacher",
    }
    first = cli(*arguments, f"output_dir={cut}", "kd_ratio=0.5", "epochs=1")
    assert first.code == 0
    for late in ("final", "step_4"):  # as if it had been killed after step 2
        for file in sorted((cut / late).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (cut / late).rmdir()
    again = cli(*arguments, f"output_dir={cut}", "kd_ratio=0.5", "resume_from_checkpoint=true")
    assert again.code == 0, again.err
    assert metrics(cut) == found


def test_a_teacher_tokenizer_needs_a_loss_that_compares_two(cli: CLI, folder: Path, tmp_path: Path) -> None:
    done = cli(
        *RUN, f"output_dir={tmp_path}", "teacher_tokenizer=kdtune.tokenizers.load", f"teacher_tokenizer.path={folder}"
    )
    assert (
        done.code == 2 and "teacher_tokenizer: has no effect with this kd_loss" in done.err and "HybridULD" in done.err
    )


def test_what_a_cross_tokenizer_loss_cannot_do_is_refused_by_name(cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, f"output_dir={tmp_path}", "kd_loss=kdtune.losses.ULD", "parallelism.tp=2",
               "teacher_targets=kdtune.losses.TopKTargets", "teacher_targets.k=4", "dtype=bf16", "loss_logits_dtype=bf16")  # fmt: skip
    assert done.code == 2 and "parallelism.tp: a cross-tokenizer kd_loss needs whole output heads" in done.err
    assert "teacher_targets: has no effect with a cross-tokenizer kd_loss" in done.err
    assert "loss_logits_dtype=bf16: a cross-tokenizer kd_loss has its logits in fp32" in done.err


def test_the_hybrid_with_the_same_tokenizer_is_its_divergence_to_the_bit(cli: CLI, tmp_path: Path) -> None:
    found = []
    for name in ("ForwardKL", "HybridULD"):
        out = tmp_path / name
        assert cli(*RUN, *SHORT, f"output_dir={out}", f"kd_loss=kdtune.losses.{name}", "sample_prompts=[]").code == 0
        found.append(metrics(out))
    assert found[0] == found[1]


def test_a_plan_does_not_guess_the_cost_of_such_a_loss(cli: CLI) -> None:
    done = cli("plan", "tiny/knowledge_distillation", "kd_loss=kdtune.losses.ULD")
    assert done.code == 2 and "cross-tokenizer kd_loss (ULD) is not estimated" in done.err


def test_hidden_states_are_refused_beside_it(cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, f"output_dir={tmp_path}", "kd_loss=kdtune.losses.ULD", "hidden_loss=kdtune.losses.HiddenStateLoss")
    assert done.code == 2 and "hidden_loss: compares the two models position by position" in done.err
