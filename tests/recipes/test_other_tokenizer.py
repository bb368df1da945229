"""A teacher with a tokenizer of its own, through the recipe."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

RUN = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation")
SHORT = ("max_steps_per_epoch=4", "save_every_n_steps=2", "run_val_every_n_steps=2", "dataset.split=train[:40]",
         "dataset_val.split=test[:4]", "lr_scheduler.num_warmup_steps=0", "teacher_model.max_seq_len=512")  # fmt: skip


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: one[key] for key in one if "loss" in key or key in ("step", "grad_norm")} for one in lines]


@pytest.mark.parametrize("name", ["ULD", "HybridULD", "presets.alm"])
def test_a_run_falls_and_resumes_to_the_bit(name: str, cli: CLI, other_tokenizer: Path, tmp_path: Path) -> None:
    arguments = (*RUN, *SHORT, f"kd_loss=kdtune.losses.{name}", "teacher_tokenizer=kdtune.tokenizers.load",
                 f"teacher_tokenizer.path={other_tokenizer}")  # fmt: skip
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


def test_a_teacher_tokenizer_needs_a_loss_that_compares_two(cli: CLI, other_tokenizer: Path, tmp_path: Path) -> None:
    done = cli(
        *RUN,
        f"output_dir={tmp_path}",
        "teacher_tokenizer=kdtune.tokenizers.load",
        f"teacher_tokenizer.path={other_tokenizer}",
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


def other(folder: Path, **settings: object) -> str:
    """The override that gives the teacher its tokenizer."""
    more = "".join(f", {key}: {value}" for key, value in settings.items())
    return f"teacher_tokenizer={{_component_: kdtune.tokenizers.load, path: {folder}{more}}}"


ALPACA = "dataset.prompt=alpaca"  # a long prompt, which is long in the teacher's tokens too


def test_an_example_beyond_the_teachers_context_alone_is_refused(
    cli: CLI, other_tokenizer: Path, tmp_path: Path
) -> None:
    """And is cut where the teacher's tokenizer says so; the student's context is compared with the student's tokens alone."""
    run = (*RUN, *SHORT, "kd_loss=kdtune.losses.ULD", f"output_dir={tmp_path / 'out'}", "teacher_model.max_seq_len=200",
           "sample_prompts=[]", "max_steps_per_epoch=1")  # fmt: skip
    done = cli(*run, other(other_tokenizer))
    assert done.code == 2 and not (tmp_path / "out").exists()
    said = "examples are longer in the teacher's own tokens than the 200 tokens that teacher_model has for its context"
    assert said in done.err and "set teacher_tokenizer.max_seq_len=200" in done.err, done.err
    done = cli(*run, other(other_tokenizer, max_seq_len=200))
    assert done.code == 0, done.err


def test_an_example_beyond_the_students_context_alone_is_refused(
    cli: CLI, other_tokenizer: Path, tmp_path: Path
) -> None:
    done = cli(*RUN, *SHORT, "kd_loss=kdtune.losses.ULD", f"output_dir={tmp_path / 'out'}", "model.max_seq_len=200",
               "teacher_model.max_seq_len=2000", other(other_tokenizer))  # fmt: skip
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert (
        "examples are longer than the 200 tokens that model has" in done.err and "tokenizer.max_seq_len=200" in done.err
    )


def test_a_stream_needs_the_teachers_limit(cli: CLI, other_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat and the hat"}\n' * 8)
    stream = (
        "dataset={_component_: kdtune.data.text_completion_dataset, source: json, data_files: %s, streaming: true}"
        % (tmp_path / "rows.jsonl")
    )
    run = (*RUN, "kd_loss=kdtune.losses.ULD", f"output_dir={tmp_path / 'out'}", stream, "~dataset_val", "sample_prompts=[]",
           "max_steps_per_epoch=1", "lr_scheduler.num_warmup_steps=0", "~run_val_every_n_steps")  # fmt: skip
    done = cli(*run, other(other_tokenizer))
    assert done.code == 2 and "teacher_tokenizer.max_seq_len is not set; teacher_model has a context of 256" in done.err
    done = cli(*run, other(other_tokenizer, max_seq_len=256))
    assert done.code == 0, done.err


def test_kdtune_data_shows_the_chunks_in_the_tokens_of_both(cli: CLI, other_tokenizer: Path) -> None:
    show = ("data", "tiny/knowledge_distillation", "--rows", "1", "kd_loss=kdtune.losses.ULD", other(other_tokenizer))
    done = cli(*show)
    assert done.code == 0, done.err
    assert "chunks are compared, tokens of the student and of the teacher:" in done.out and "more ..." in done.out
    assert re.search(r"^  t\|h\|e +the$", cli(*show, "--full").out, re.MULTILINE)
