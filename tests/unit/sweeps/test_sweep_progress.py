"""What a sweep prints as it runs: in a log file no long silence, and each message once."""

from pathlib import Path

import pytest

from kdtune.log import get_logger, told_once
from kdtune.sweeps import Cell, Step, SweepProgress
from kdtune.sweeps.progress import last_line


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step("train", "train-1", "finetune", "mine.yaml", (), tmp_path / "train-1")


def test_in_a_log_the_last_line_of_the_running_step_is_repeated(
    step: Step, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("kdtune.sweeps.progress.time.monotonic", lambda: now[0])
    printed = []
    with SweepProgress(3) as progress:
        progress.begin(2, Cell({"lr": 0.1}, (step,)), step)
        for second in range(50):
            now[0] = float(second)
            if second == 20:
                step.log.write_text("$ kdtune run finetune\nstep 1/9\rstep 2/9  loss 3.1\n")
            progress.running()
            if out := capsys.readouterr().err:
                printed.append((second, out))
        progress.cell_done()
    assert printed == [
        (0, f"cell 2/3 lr=0.1: train-1 ({step.log})\n"),
        (15, "  train, 00:15 so far: starting\n"),
        (30, "  train, 00:30 so far: step 2/9 loss 3.1\n"),
        (45, "  train, 00:45 so far: step 2/9 loss 3.1\n"),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, ""), ("", ""), ("$ kdtune run x\n", ""), ("$ kdtune run x\na\n\nb \x1b[1m\n", "b \\x1b[1m"),
        ("1\r2\r\n", "2"), ("x" * 5000 + "\nend", "end"), ("ä" * 4096, "ä" * 2048),
    ],
)  # fmt: skip
def test_the_last_line_of_a_log(step: Step, text: str | None, line: str) -> None:
    if text is not None:
        step.log.write_text(text, newline="")
    assert last_line(step.log) == line


def test_a_message_of_many_configs_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("kdtune.test")
    with told_once():
        for number in (1, 1, 2, 1):
            log.warning("key %d has no effect", number)
    log.warning("key 1 has no effect")
    assert capsys.readouterr().err.split("\n")[:-1] == [f"key {number} has no effect" for number in (1, 2, 1)]
