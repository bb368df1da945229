"""The recipe through its CLI on the tiny config: what it writes, how it resumes, what it refuses."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import Fork, run_here
from transformers import AutoModelForCausalLM

from kdtune.checkpoint import load_model, step_folders

NUM_STEPS = 10


def arguments(output_dir: Path, *overrides: str) -> list[str]:
    return ["run", "knowledge_distillation_single_device", "--config", "tiny/knowledge_distillation",
            f"output_dir={output_dir}", "sample_prompts=[]", *overrides]  # fmt: skip


def run(output_dir: Path, *overrides: str, code: int = 0) -> str:
    """What a run in this process prints."""
    done = run_here(*arguments(output_dir, *overrides))
    assert done.code == code, done.err[-2000:]
    return done.out + done.err


def losses(output_dir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("run") / "out"
    text = run(output_dir, "save_every_n_steps=2")
    assert "teacher" in text and str(output_dir / "final") in text
    return output_dir


def test_writes_what_it_says(finished: Path) -> None:
    assert [step for step, _ in losses(finished)] == list(range(1, NUM_STEPS + 1))
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "run.json").read_text())["starts"][0]["versions"]["torch"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_class_loss"] < rows[0]["val_class_loss"]


def test_final_loads_in_transformers_bit_for_bit(finished: Path) -> None:
    theirs, info = AutoModelForCausalLM.from_pretrained(finished / "final", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(finished / "final").eval()
    tokens = torch.randint(0, 258, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.eval()(tokens).logits, atol=1e-5, rtol=0)
    assert torch.equal(ours.tok_embeddings.weight, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("num_kills", "how"),
    [
        pytest.param(1, (), id="once"),
        pytest.param(6, (), id="sync", marks=pytest.mark.slow("six starts of a process, killed at other moments")),
        pytest.param(3, ("enable_async_checkpointing=true",), id="async",
                     marks=pytest.mark.slow("three starts of a process; test_async_save.py fails at every file")),
    ],
)  # fmt: skip
def test_killed_and_resumed_is_bit_identical(num_kills: int, how: tuple[str, ...], tmp_path: Path) -> None:
    """SIGKILL at random moments; a step is short beside its save, so many of them fall inside one."""
    epochs = 2 if num_kills == 1 else 4  # so that a run outlasts its kills
    settings = ("save_every_n_steps=1", f"epochs={epochs}", "run_val_every_n_steps=null", "resume_from_checkpoint=true")
    run(tmp_path / "whole", *settings)
    settings += how
    expected = losses(tmp_path / "whole")
    assert len(expected) == epochs * NUM_STEPS
    draw, output_dir, resumed_from = random.Random(0), tmp_path / "killed", []
    for _ in range(num_kills):
        made = len(step_folders(output_dir))
        process = Fork(*arguments(output_dir, *settings))
        # Past the start-up, which writes nothing: until this run has written its first step.
        while process.is_running and len(step_folders(output_dir)) <= made:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.3))
        process.send(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL, "the run ended before it was killed"
        resumed_from.append(len(step_folders(output_dir)))
        for folder in step_folders(output_dir):
            load_model(folder)
        names = [path.name for path in output_dir.glob("step_*")]
        assert sorted(names) == sorted(folder.name for folder in step_folders(output_dir)), "half a step folder"
    run(output_dir, *settings)
    assert all(resumed_from), "every resume must have been from a checkpoint"
    assert losses(output_dir) == expected
    ours, whole = (load_model(tmp_path / name / "final").state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow("three runs; SIGTERM is handled alike"))],
)
def test_a_signal_saves_and_exits_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    output_dir = tmp_path / "stopped"
    settings = (
        "save_every_n_steps=null",
        "gradient_accumulation_steps=1",
        "max_steps_per_epoch=14",
        "run_val_every_n_steps=2",
    )
    process, metrics = Fork(*arguments(output_dir, *settings)), output_dir / "metrics.jsonl"
    while process.is_running and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.005)
    process.send(number)
    ended = process.end()
    assert ended.code == 0, ended.err[-2000:]
    assert f"{number.name}: the run will save after this step and end" in ended.err
    assert "resume_from_checkpoint=true" in ended.out
    before = losses(output_dir)
    assert [folder.name for folder in step_folders(output_dir)] == [f"step_{len(before)}"]
    run(output_dir, *settings, "resume_from_checkpoint=true")
    run(tmp_path / "whole", *settings)
    assert before and losses(output_dir) == losses(tmp_path / "whole")


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    text = run(
        tmp_path / "kept", "save_every_n_steps=1", "run_val_every_n_steps=1", "keep_last_n_checkpoints=2",
        "best_metric=val_class_loss", "max_steps_per_epoch=5",
    )  # fmt: skip
    assert "best step" in text
    assert {folder.name for folder in step_folders(tmp_path / "kept")} >= {"step_4", "step_5"}
    assert len(step_folders(tmp_path / "kept")) <= 3


def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    settings = (
        "optimizer={_component_: torch.optim.SGD, lr: 0.5}",
        "max_steps_per_epoch=4",
        "shuffle=false",
        "~dataset_val",
    )
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        run(tmp_path / f"{size}", f"batch_size={size}", f"gradient_accumulation_steps={accumulation}", *settings)
    one, two, eight = (losses(tmp_path / name) for name in ("8", "4", "1"))
    assert one[0][1] - one[-1][1] > 0.01
    for (_, a), (_, b), (_, c) in zip(one, two, eight, strict=True):
        assert b == pytest.approx(a, rel=1e-5) and c == pytest.approx(a, rel=1e-5)


def test_refuses_a_folder_that_holds_a_run(finished: Path) -> None:
    assert "resume_from_checkpoint=true" in run(finished, code=2)


def test_refuses_another_config_on_resume(finished: Path) -> None:
    text = run(finished, "resume_from_checkpoint=true", "batch_size=2", code=2)
    assert "batch_size: was 4, is 2" in text


def test_a_non_finite_loss_stops_before_the_step(tmp_path: Path) -> None:
    text = run(tmp_path / "diverged", "optimizer.lr=1e30", "clip_grad_norm=null", "lr_scheduler=null", code=1)
    assert "step 2" in text or "step 3" in text
    assert "batch" in text and "Traceback" not in text
