"""Settings that must not change the numbers, or must add something to the folder: each through the tiny config."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = "knowledge_distillation_single_device"
CONFIG = "tiny/knowledge_distillation"
SHORT = ("sample_prompts=[]", "max_steps_per_epoch=4", "save_every_n_steps=null", "run_val_every_n_steps=null")


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


@pytest.fixture(scope="module")
def run(cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A short run of the tiny config with some settings; gives its output folder."""

    def run(*settings: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / "out"
        ended = cli("run", RECIPE, "--config", CONFIG, f"output_dir={out}", *SHORT, *settings)
        assert ended.code == 0, ended.err
        return out

    return run


@pytest.fixture(scope="module")
def plain(run: Callable[..., Path]) -> list[dict[str, Any]]:
    """The rows of the run that the others are compared with."""
    found = rows(run())
    assert len(found) == 4
    return found


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in found]


@pytest.mark.slow("a C++ compiler works for a minute before the first step")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compile_gives_the_same_losses(run: Callable[..., Path], plain: list[dict[str, Any]]) -> None:
    # Without validation there are fewer kinds of forward to compile.
    compiled = rows(run("compile=true", "dataset_val=null"))
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert [row["grad_norm"] for row in compiled] == pytest.approx([row["grad_norm"] for row in plain], rel=1e-4)


def test_activation_checkpointing_gives_the_same_losses(run: Callable[..., Path], plain: list[dict[str, Any]]) -> None:
    found = rows(run("enable_activation_checkpointing=true"))
    assert losses(found) == losses(plain)
    assert [row["grad_norm"] for row in found] == [row["grad_norm"] for row in plain]


def test_workers_give_the_same_losses(run: Callable[..., Path], plain: list[dict[str, Any]]) -> None:
    assert losses(rows(run("num_workers=2"))) == losses(plain)


def test_chunks_of_the_loss_give_the_same_losses(run: Callable[..., Path], plain: list[dict[str, Any]]) -> None:
    assert losses(rows(run("loss_chunk_size=7"))) == pytest.approx(losses(plain), rel=1e-5)


def test_bf16_stays_close(run: Callable[..., Path], plain: list[dict[str, Any]]) -> None:
    found = losses(rows(run("dtype=bf16")))
    assert found != losses(plain)
    assert found == pytest.approx(losses(plain), rel=0.02)


def test_muon_learns(run: Callable[..., Path]) -> None:
    found = losses(rows(run("optimizer={_component_: kdtune.training.Muon, lr: 1.0e-2}", "max_steps_per_epoch=12")))
    assert all(map(math.isfinite, found)) and sum(found[-3:]) / 3 < found[0] - 0.3


def test_profiler_writes_a_trace(run: Callable[..., Path], plain: list[dict[str, Any]]) -> None:
    profiler = "{_component_: kdtune.training.Profiler, wait_steps: 1, warmup_steps: 1, active_steps: 1}"
    out = run(f"profiler={profiler}")
    (trace,) = (out / "profile").glob("trace_step_*.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("aten::mm" in str(name) or "aten::addmm" in str(name) for name in names)
    (table,) = (out / "profile").glob("operators_step_*.txt")
    assert "aten::" in table.read_text()
    assert losses(rows(out)) == losses(plain)


def test_tensorboard_has_the_values(run: Callable[..., Path]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = run("metric_logger=kdtune.training.TensorBoardLogger", "log_every_n_steps=2")
    events = accumulator.EventAccumulator(str(out))
    events.Reload()
    found = rows(out)
    for name in ("loss", "class_loss", "kd_loss", "lr"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [2, 4]
        assert [scalar.value for scalar in scalars] == pytest.approx(
            [row[name] for row in found if row["step"] % 2 == 0]
        )


def test_a_copied_recipe_and_config_run(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: list[dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("cp", RECIPE, "mine.py").code == 0
    assert cli("cp", CONFIG, "mine.yaml").code == 0
    text = Path("mine.py").read_text()
    line = '    """Run the recipe."""\n'
    assert text.count(line) == 1
    Path("mine.py").write_text(text.replace(line, f'{line}    print("this is mine")\n'))
    ended = cli("run", "mine.py", "--config", "mine.yaml", "output_dir=out", *SHORT)
    assert ended.code == 0, ended.err
    assert "this is mine" in ended.out
    assert losses(rows(Path("out"))) == losses(plain)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_are_valid(shell: str, cli: Callable[..., Any]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = cli("completion", shell).out
    checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
