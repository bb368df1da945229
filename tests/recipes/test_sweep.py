"""The sweep recipe through its CLI: what it runs once, what it goes on with, and what it says of failures."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Fork, run_here

# A recipe that takes no time: it "trains" by writing numbers, `slow` seconds apart.
TOY = '''"""A toy."""
import json, time
from dataclasses import dataclass
from pathlib import Path
from kdtune import config

@dataclass(kw_only=True)
class Config:
    output_dir: str
    resume_from_checkpoint: bool = False
    value: float = 1.0
    seed: int = 0
    slow: float = 0.0
    source: str | None = None
    fail: bool = False

    def machine_problems(self):
        return [f"source={self.source}: no such folder"] if self.source and not Path(self.source).is_dir() else []

@config.entry_point(Config)
def main(cfg):
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.jsonl"
    start = len(file.read_text().splitlines()) if file.exists() else 0
    print("starting at", start)
    if cfg.fail:
        raise RuntimeError("the toy broke")
    for step in range(start, 6):
        time.sleep(cfg.slow)
        row = {"step": step + 1, "loss": cfg.value / (step + 1), "val_kd_loss": cfg.value + 0.1 * cfg.seed}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\\n")
    (folder / "final").mkdir(exist_ok=True)

if __name__ == "__main__":
    main()
'''
SWEEP = """recipe: sweep
output_dir: {folder}/sweep
steps:
  teacher: {{recipe: {folder}/toy.py, config: {folder}/toy.yaml, overrides: [value=7]}}
  train:
    recipe: {folder}/toy.py
    config: {folder}/toy.yaml
    overrides: ["value={{lr}}", "seed={{seed}}", "source={{teacher.dir}}"]
axes:
  lr: [1.0, 2.0]
  seed: [0, 1]
report: false
"""
QUICK_TEACHER = "steps.teacher.overrides=[value=7, slow=0]"


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps find the package here, wherever the tests were started."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder with toy.py, toy.yaml and sweep.yaml (four cells that share a teacher)."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text("value: 1.0\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path))
    return tmp_path


def command(config: Path | str, *overrides: str) -> list[str]:
    return ["run", "sweep", "--config", str(config), *overrides]


def run(config: Path | str, *overrides: str, code: int = 0) -> str:
    """What a sweep prints; it runs in this process, and only its steps are processes of their own."""
    done = run_here(*command(config, *overrides))
    assert done.code == code, done.out[-2000:] + done.err[-2000:]
    return done.out + done.err


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def num_starts(folder: Path) -> dict[str, int]:
    """How often each step was started, by the lines of its log that name the command."""
    return {
        log.stem: sum(line.startswith("$ kdtune run") for line in log.read_text().splitlines())
        for log in (folder / "steps").glob("*.log")
    }


def times(folder: Path) -> dict[Path, int]:
    """When each file below a folder was written; the lock is written at every start."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock" and path.is_file()}


def wait_until(condition: Callable[[], bool], process: Fork) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_running, "the sweep ended first"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_every_distinct_step_is_run_once_and_never_again(sweep: Path) -> None:
    assert "4 cells, 0 done; 5 steps, 5 to run (teacher: 1 for 4 cells; train: 4 for 4 cells)" in run(
        sweep / "sweep.yaml", "dry_run=true"
    )
    assert not (sweep / "sweep").exists()
    run(sweep / "sweep.yaml")
    rows = results(sweep / "sweep")
    assert [row["axes"] for row in rows] == [{"lr": lr, "seed": seed} for lr in (1.0, 2.0) for seed in (0, 1)]
    assert [row["metrics"]["train.val_kd_loss"] for row in rows] == pytest.approx([1.0, 1.1, 2.0, 2.1])
    assert all(row["metrics"]["teacher.loss"] == pytest.approx(7 / 6) for row in rows)
    assert len({row["folders"]["teacher"] for row in rows}) == 1
    before = times(sweep / "sweep/steps")
    assert list(num_starts(sweep / "sweep").values()) == [1] * 5
    run(sweep / "sweep.yaml")
    assert results(sweep / "sweep") == rows
    assert times(sweep / "sweep/steps") == before
    assert "4 cells, 4 done; 5 steps, 0 to run" in run(sweep / "sweep.yaml", "dry_run=true")


def test_a_failed_cell_does_not_stop_the_rest(sweep: Path) -> None:
    text = (sweep / "sweep.yaml").read_text()
    (sweep / "sweep.yaml").write_text(text.replace("axes:", "axes:\n  kind: {good: {}, bad: {train: [fail=true]}}"))
    output = run(
        sweep / "sweep.yaml", "only.seed=[0]", "only.lr=[1.0]", "axes.kind.good.train=[]", "report=true", code=1
    )
    assert "1 of 2 cells failed" in output and "RuntimeError: the toy broke" in output
    good, bad = results(sweep / "sweep")
    assert good["status"] == "done" and bad["status"] == "failed"
    assert bad["failed_step"] == "train" and "RuntimeError: the toy broke" in bad["error"]
    assert "the toy broke" in (sweep / "sweep" / bad["log"]).read_text()
    assert "the toy broke" in (sweep / "sweep/report/report.md").read_text()
    # The same command tries the failed one again, and only that.
    run(sweep / "sweep.yaml", "only.seed=[0]", "only.lr=[1.0]", "axes.kind.good.train=[]", "report=false", code=1)
    assert sorted(num_starts(sweep / "sweep").values()) == [1, 1, 2]


def test_a_shared_step_that_fails_is_tried_once(sweep: Path) -> None:
    run(sweep / "sweep.yaml", "set.teacher.fail=true", code=1)
    assert [row["failed_step"] for row in results(sweep / "sweep")] == ["teacher"] * 4
    assert list(num_starts(sweep / "sweep").values()) == [1]


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(True, id="with its step"),
        pytest.param(False, id="alone", marks=pytest.mark.slow("a step that goes on by itself, seven seconds")),
    ],
)
def test_killed_half_way_and_started_again(sweep: Path, group: bool) -> None:
    (sweep / "toy.yaml").write_text("slow: 0.2\n")
    settings = ("only.lr=[1.0]", QUICK_TEACHER)
    run(sweep / "sweep.yaml", *settings, f"output_dir={sweep}/whole")
    folder = sweep / "sweep"
    process = Fork(*command(sweep / "sweep.yaml", *settings))
    # In the middle of the first cell's training: the teacher is done, the second cell not begun.
    wait_until(
        lambda: any(len(p.read_text().splitlines()) >= 2 for p in folder.glob("steps/train-*/metrics.jsonl")), process
    )
    process.send(signal.SIGKILL)
    process.end()
    if group:
        step = next(iter(folder.glob("steps/train-*"))).name.removesuffix(".log")
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = entry.read_bytes().decode().split("\0")
            except OSError:
                continue
            if f"output_dir={folder}/steps/{step}" in arguments:
                os.kill(int(entry.parent.name), signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("steps/*.json")}
    assert len(finished) == 1
    run(sweep / "sweep.yaml", *settings)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    starts = num_starts(folder)
    assert starts == {name: 2 if name.startswith("train-") and count == 2 else 1 for name, count in starts.items()}
    assert sorted(starts.values()) == [1, 1, 2]
    resumed = next(name for name, count in starts.items() if count == 2)
    assert "resume_from_checkpoint=true" in (folder / "steps" / f"{resumed}.log").read_text()
    assert without_times(results(folder)) == without_times(results(sweep / "whole"))


def test_an_interrupt_reaches_the_step_and_stops_cleanly(sweep: Path) -> None:
    (sweep / "toy.yaml").write_text("slow: 3.0\n")
    process = Fork(*command(sweep / "sweep.yaml", QUICK_TEACHER))
    folder = sweep / "sweep"
    wait_until(lambda: any(folder.glob("steps/train-*/metrics.jsonl")), process)
    busy = run(sweep / "sweep.yaml", QUICK_TEACHER, code=2)
    assert f"the sweep of process {process.pid} is running there" in busy
    process.send(signal.SIGTERM)
    assert process.end(timeout=60).code == 0
    assert len(list(folder.glob("steps/*.json"))) == 1 and results(folder) == []
    # The lock is free: the step ended with the sweep.
    assert "0 done; 3 steps, 2 to run" in run(sweep / "sweep.yaml", QUICK_TEACHER, "dry_run=true", "only.lr=[1.0]")


def test_max_minutes_starts_no_step_after_it(sweep: Path) -> None:
    output = run(sweep / "sweep.yaml", "max_minutes=0.00001")
    assert "stopped after max_minutes=1e-05; the same command continues from here" in output
    assert results(sweep / "sweep") == []
    assert "max_minutes=-1.0: must be above 0" in run(sweep / "sweep.yaml", "max_minutes=-1", code=2)


def test_discard_keeps_what_a_cell_still_needs(sweep: Path) -> None:
    """The cells that `only` leaves out for now are still to use the teacher."""
    discard = ("steps.teacher.discard=[final]", "steps.train.discard=[final]")
    folder = sweep / "sweep"
    run(sweep / "sweep.yaml", *discard, "only.lr=[1.0]")
    assert [path.parent.name.partition("-")[0] for path in folder.glob("steps/*/final")] == ["teacher"]
    assert len(list(folder.glob("steps/*/metrics.jsonl"))) == 3
    assert "0 to run" in run(sweep / "sweep.yaml", "only.lr=[1.0]", "dry_run=true")
    run(sweep / "sweep.yaml", *discard)
    assert not list(folder.glob("steps/*/final")) and len(results(folder)) == 4
    assert list(num_starts(folder).values()) == [1] * 5


def test_what_was_discarded_is_made_again_for_a_new_cell(sweep: Path) -> None:
    discard = ("steps.teacher.discard=[final]", "steps.train.overrides.2='source={teacher.dir}/final'", "axes.seed=[0]")
    folder = sweep / "sweep"
    run(sweep / "sweep.yaml", *discard, "axes.lr=[1.0]")
    assert not list(folder.glob("steps/teacher-*/final"))
    more = (*discard, "axes.lr=[1.0, 3.0]")
    assert "3 steps, 2 to run" in run(sweep / "sweep.yaml", *more, "dry_run=true")
    # A failure of the second making leaves the first cell's numbers alone.
    (sweep / "toy.py").write_text(TOY.replace("if cfg.fail:", "if cfg.value == 7.0:"))
    assert "1 of 2 cells failed" in run(sweep / "sweep.yaml", *more, code=1)
    assert [row["status"] for row in results(folder)] == ["done", "failed"]
    (sweep / "toy.py").write_text(TOY)
    run(sweep / "sweep.yaml", *more)
    assert [row["metrics"]["train.val_kd_loss"] for row in results(folder)] == pytest.approx([1.0, 3.0])
    assert sorted(num_starts(folder).values()) == [1, 1, 3]
    assert not list(folder.glob("steps/teacher-*/final")), "and discarded again"
    assert "3 steps, 0 to run" in run(sweep / "sweep.yaml", *more, "dry_run=true")


def test_only_keeps_the_rows_of_the_other_cells(sweep: Path) -> None:
    run(sweep / "sweep.yaml")
    rows = results(sweep / "sweep")
    assert "results.jsonl: 4 of 4 cells" in run(sweep / "sweep.yaml", "only.lr=[2.0]")
    assert results(sweep / "sweep") == rows


def test_a_failed_baseline_hides_neither_failures_nor_report(sweep: Path) -> None:
    text = (sweep / "sweep.yaml").read_text()
    (sweep / "sweep.yaml").write_text(text.replace("axes:", "axes:\n  kind: {good: {}, bad: {train: [fail=true]}}"))
    output = run(sweep / "sweep.yaml", "axes.seed=[0]", "axes.lr=[1.0]", "report=true", "baseline.kind=bad", code=1)
    assert "1 of 2 cells failed" in output and "RuntimeError: the toy broke" in output
    assert "report: baseline: no row has kind=bad" in output
    report = (sweep / "sweep/report/report.md").read_text()
    assert "Left out: baseline: no row has kind=bad" in report and "Difference to the baseline" not in report


def test_a_baseline_and_metrics_that_are_not_there_yet_are_said(sweep: Path) -> None:
    settings = (
        "report=true",
        "baseline.lr=1.0",
        "metrics=[evaluate.hellaswag/acc, train.val_kd_loss]",
        "axes.seed=[0]",
    )
    output = run(sweep / "sweep.yaml", *settings, "only.lr=[2.0]")
    report = (sweep / "sweep/report/report.md").read_text()
    for word in ("no row has lr=1.0", "metrics: 'evaluate.hellaswag/acc' fits none of the results"):
        assert word in output and word in report
    assert "| lr | n | val_kd_loss |" in report
    run(sweep / "sweep.yaml", *settings)
    assert "## Difference to the baseline" in (sweep / "sweep/report/report.md").read_text()


def test_seconds_count_every_start_of_a_resumed_step(sweep: Path) -> None:
    (sweep / "toy.yaml").write_text("slow: 0.8\n")
    settings = ("axes.seed=[0]", "axes.lr=[1.0]", QUICK_TEACHER)
    process = Fork(*command(sweep / "sweep.yaml", *settings))
    folder = sweep / "sweep"
    wait_until(
        lambda: any(len(p.read_text().splitlines()) >= 5 for p in folder.glob("steps/train-*/metrics.jsonl")), process
    )
    process.send(signal.SIGTERM)
    assert process.end(timeout=60).code == 0
    assert len(list(folder.glob("steps/train-*.seconds"))) == 1
    run(sweep / "sweep.yaml", *settings)
    assert results(folder)[0]["seconds"]["train"] > 6 * 0.8
    assert not list(folder.glob("steps/*.seconds"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["axes.lr=[]"], "axes.lr: is empty"),
        (["axes.lr=[1.0, x]"], "train: value: 'x' (str) is not allowed; must be float"),
        (["set.train.valeu=1"], "train: valeu: unknown key; did you mean 'value'"),
        (["set.train.source=/nowhere"], "train: source=/nowhere: no such folder"),
        (["steps.train.config=nothing"], "unknown config 'nothing'"),
        (["set.train.value={teecher.dir}"], "set.train.value"),
        (["only.lr=[3]"], "only.lr: 3 is not a value of axes.lr"),
        (["steps.teacher.recipe=nothing"], "unknown recipe 'nothing'"),
        (["baseline.method=x"], "baseline.method: no such axis"),
        (["baseline.seed=0"], "baseline: no row has seed=0; name one row by its axes: lr=1.0; lr=2.0"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(sweep: Path, overrides: list[str], words: str) -> None:
    if overrides[0].startswith("set.train.value={"):
        overrides, words = ["set.train.value='{teecher.dir}'"], "{teecher.dir}: is no axis and no step's folder"
    assert words in run(sweep / "sweep.yaml", *overrides, code=2)
    assert not (sweep / "sweep").exists()


@pytest.mark.slow("three sweeps of real trainings; the quick tests kill one of toys")
def test_a_real_training_killed_half_way_ends_with_the_same_table(tmp_path: Path) -> None:
    """tiny/knowledge_distillation from a shared tiny/prune, SIGKILL to the sweep while a student trains."""
    text = """recipe: sweep
output_dir: unset
steps:
  student: {config: tiny/prune, overrides: [num_layers=2]}
  train:
    config: tiny/knowledge_distillation
    overrides: [model=null, checkpointer=kdtune.checkpoint.Checkpointer, "checkpointer.checkpoint_dir={student.dir}",
                "kd_ratio={kd_ratio}", "sample_prompts=[]", save_every_n_steps=1, max_steps_per_epoch=12]
axes: {kd_ratio: [0.25, 0.75]}
"""
    (tmp_path / "sweep.yaml").write_text(text)
    run(tmp_path / "sweep.yaml", f"output_dir={tmp_path}/whole")
    killed = tmp_path / "killed"
    process = Fork(*command(tmp_path / "sweep.yaml", f"output_dir={killed}"))
    wait_until(lambda: any(killed.glob("steps/train-*/step_2")), process)
    process.send(signal.SIGKILL)
    process.end()
    run(tmp_path / "sweep.yaml", f"output_dir={killed}")
    assert without_times(results(killed)) == without_times(results(tmp_path / "whole"))
    assert (killed / "report/report.csv").read_text() == (tmp_path / "whole/report/report.csv").read_text()
    assert sum(name.startswith("student-") for name in num_starts(killed)) == 1
    assert sorted(num_starts(killed).values()) == [1, 1, 2]
