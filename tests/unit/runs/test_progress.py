"""What a run tells: phases, steps, validations; in a log file, in terminals of any size, and when a phase lasts."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from terminal import output_in_terminal

from kdtune.log import get_logger
from kdtune.runs import Progress, validation_text
from kdtune.runs.summary import step_numbers
from kdtune.training import StepLog

ROOT = Path(__file__).parents[3]
ROW = {"loss": 1.5, "kd_loss": 4.0, "class_loss": 3.25, "lr": 3e-4, "step_seconds": 0.5, "tokens_per_second": 12345.6,
       "grad_norm": 1.0}  # fmt: skip


class TimedLog(io.StringIO):
    """A log file that knows when it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.times = [time.monotonic()]

    def write(self, text: str) -> int:
        self.times.append(time.monotonic())
        return super().write(text)


def test_a_log_has_a_line_for_each_phase_and_every_few_steps() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, every=2) as progress:
        progress.phase("reading the data")
        progress.phase("loading the models")
        assert list(progress.validating([1, 2])) == list(progress.validating([1, 2])) == [1, 2]
        progress.start(7, 2)
        for step in range(3, 8):
            assert list(progress.micro_batches("ab")) == ["a", "b"]
            progress.step(step, [f"loss {step}"])
            if step == 4:
                progress.write("a note")
        progress.end_steps()
        progress.phase("saving final/")
    lines = stream.getvalue().splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "reading the data", "loading the models", "validating before the first step", "training: steps 3 to 7", "step 3/7",
        "step 4/7", "a note", "step 6/7", "step 7/7", "saving final/",
    ]  # fmt: skip
    assert lines[-2] == "step 7/7  loss 7  00:00 left"


def test_what_lasts_is_told_again_with_how_far_it_is() -> None:
    stream = TimedLog()
    with Progress(stream=stream, every=1000, patience=0.1) as progress:
        progress.phase("reading the data")
        time.sleep(0.35)
        progress.start(5)
        progress.step(1, [])
        written = progress.counting(6, "texts written")
        for number in (1, 2):
            written(number)
            time.sleep(0.12)
        for _ in progress.micro_batches(range(4)):
            time.sleep(0.15)
        for _ in progress.validating(range(4)):
            time.sleep(0.15)
        for step in range(2, 6):
            time.sleep(0.12)
            progress.step(step, [])
        last = time.monotonic()
    text = stream.getvalue()
    assert "\nreading the data, 00:00 so far\n" in text
    assert "\nstep 2/5, 3 of 6 texts written, 00:00 so far\n" in text
    assert "\nstep 2/5, 3 of 4 micro-batches, 00:00 so far\n" in text
    assert "\nvalidating after step 2, 3 of 4 batches, 00:00 so far\n" in text
    assert all(f"\nstep {step}/5" in text for step in (2, 3, 4, 5)), "slow steps have a line each"
    assert max(later - earlier for earlier, later in pairwise([*stream.times, last])) < 0.3


def test_steps_of_another_kind_and_how_far_one_is() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, every=1, patience=0.1) as progress:
        progress.start(5, 3, doing="dropping layers", unit="removal")
        progress.share(0.257)
        time.sleep(0.2)
        progress.step(4, ["layer 3"])
        progress.share(0.5)
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "dropping layers: removals 4 to 5"
    assert lines[1] == "dropping layers: removals 4 to 5, 26%, 00:00 so far"
    assert "removal 4/5  layer 3  00:00 left" in lines and "removal 5/5, 50%, 00:00 so far" in lines


def test_nothing_is_told_by_the_other_processes_nor_after_the_end() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, silent=True, patience=0.02) as progress:
        progress.phase("reading the data")
        progress.start(2)
        progress.step(1, ["loss 1"])
        time.sleep(0.06)
    progress.phase("late")
    assert stream.getvalue() == ""


def test_a_reader_that_has_gone_does_not_stop_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream, Progress(stream=stream) as progress:
        progress.phase("reading the data")
        progress.start(2)
        progress.step(2, ["loss 1"])
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what is left in the buffer goes there


TERMINAL = """
import time
from kdtune.log import get_logger
from kdtune.runs import Progress
from kdtune.runs.summary import step_numbers
from kdtune.training import StepLog
with Progress() as progress:
    progress.phase("reading the data")
    progress.start(3)
    for step in (1, 2, 3):
        progress.step(step, ["loss 2.310", "KL 0.520", "0.41 s/step", "ce 3.210", "lr 1.00e-03", "12,345 tok/s"])
        time.sleep(0.15)
        if step == 2:
            get_logger().warning("a warning")
            progress.write("validation, step 2: cross entropy 3.2")
    progress.end_steps()
    progress.phase("saving final/")
"""


def in_terminal(columns: int, lines: int) -> list[str]:
    """What is seen on a terminal of this size: each line as it was last drawn."""
    return [line.rpartition("\r")[2] for line in output_in_terminal(TERMINAL, columns=columns, lines=lines)]


@pytest.mark.parametrize(
    "columns", [60, pytest.param(160, marks=pytest.mark.slow("imports torch anew for a terminal of another width"))]
)
def test_a_terminal_has_a_bar_that_lines_do_not_break(columns: int) -> None:
    seen = in_terminal(columns, 24)
    assert [line for line in seen if line and "/3 " not in line] == [
        "reading the data", "training: steps 1 to 3", "a warning", "validation, step 2: cross entropy 3.2", "saving final/",
    ]  # fmt: skip
    bars = [line for line in seen if "/3 " in line]
    assert len(bars) == 1 and bars[0].startswith("3/3 ") and len(bars[0]) <= columns
    assert "loss 2.310, KL 0.520, 0.41 s/step" in bars[0]
    assert ("12,345 tok/s" in bars[0]) == (columns == 160)


def test_a_terminal_without_a_size_has_lines() -> None:
    seen = in_terminal(0, 0)
    assert seen[2].startswith("step 1/3  loss 2.310  KL 0.520  0.41 s/step  ce 3.210  lr 1.00e-03  12,345 tok/s  00:0")
    assert [line.split("  ")[0] for line in seen[2:] if line] == [
        "step 1/3", "a warning", "validation, step 2: cross entropy 3.2", "step 3/3", "saving final/",
    ]  # fmt: skip


def test_a_log_line_in_between_goes_where_it_did_before() -> None:
    handlers = list(get_logger().handlers)
    with Progress(stream=io.StringIO()) as progress:
        progress.start(1)
        progress.step(1, [])
    assert get_logger().handlers == handlers and isinstance(handlers[0], logging.StreamHandler)


def test_a_validation_is_told_with_its_change_and_the_best_so_far() -> None:
    rows = [
        {"val_class_loss": 3.5, "val_kd_loss": 1.0, "val_agreement": 0.5},
        {"val_class_loss": 3.0, "val_kd_loss": 0.75, "val_agreement": 0.625},
    ]
    first = {"step": 0, **rows[0], "val_teacher_class_loss": 2.5}
    assert validation_text(first, []) == (
        "validation, step 0: cross entropy 3.500, KL 1.000, agreement 50.0 %, teacher's cross entropy 2.500"
    )
    now = {"step": 20, "val_class_loss": 3.25, "val_kd_loss": 0.5, "val_agreement": 0.62499}
    assert validation_text(now, rows, divergence="JensenShannon") == (
        "validation, step 20: cross entropy 3.250 (+0.250), JensenShannon 0.500 (-0.250, best), agreement 62.5 % (+0.0)"
    )
    assert validation_text({"step": 4, "val_class_loss": 2.0}, rows) == (
        "validation, step 4: cross entropy 2.000 (-1.000, best)"
    )


class Held:
    """A second logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.is_closed = False

    def log(self, values: dict, step: int) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


def test_a_row_goes_to_the_file_the_second_logger_and_the_terminal(tmp_path: Path) -> None:
    path, stream, second = tmp_path / "metrics.jsonl", io.StringIO(), Held()
    with (
        Progress(stream=stream) as progress,
        StepLog(path, second, progress, every=2, divergence="ReverseKL") as log,
    ):
        log.log({"val_class_loss": 4.0}, 0)
        progress.start(3)
        log.log(ROW, 1)
        log.log(ROW, 2)
        log.log({**ROW, "val_class_loss": 3.0}, 3)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("step") for row in written] == [0, 1, 2, 3]
    assert all(abs(row.pop("time") - time.time()) < 60 for row in written)
    assert written == [{"val_class_loss": 4.0}, ROW, ROW, {**ROW, "val_class_loss": 3.0}]
    assert second.rows == [(0, written[0]), (2, ROW), (3, written[3])] and second.is_closed
    shown = "loss 1.500  ReverseKL 4.000  0.50 s/step  ce 3.250  lr 3.00e-04  12,346 tok/s"
    lines = stream.getvalue().splitlines()
    assert lines[0] == "validation, step 0: cross entropy 4.000"
    assert lines[2].startswith(f"step 1/3  {shown}  ")
    assert lines[-1] == "validation, step 3: cross entropy 3.000 (-1.000, best)"


def test_a_resumed_run_remembers_its_best_validation_and_an_error_closes_all(tmp_path: Path) -> None:
    path, stream, second = tmp_path / "metrics.jsonl", io.StringIO(), Held()
    path.write_text('{"step": 1, "val_class_loss": 1.0}\n{"step": 2, "val_class_loss": 2.0}\n')
    with pytest.raises(ZeroDivisionError), Progress(stream=stream) as progress, StepLog(path, second, progress) as log:
        log.log({"val_class_loss": 1.5}, 3)
        raise ZeroDivisionError
    assert second.is_closed
    assert stream.getvalue().endswith("validation, step 3: cross entropy 1.500 (-0.500)\n")
    assert len(path.read_text().splitlines()) == 3


def test_a_child_forked_while_a_thread_writes_can_write(tmp_path: Path) -> None:
    """As a data worker that logs; in a process of its own, as the one that forks here has threads."""
    code = """
import io, os, signal, sys, threading, time
from tqdm import tqdm
from kdtune.runs.progress import Progress

writing = threading.Event()

class Slow(io.StringIO):
    def write(self, text):
        writing.set()
        time.sleep(0.2)

progress = Progress(stream=Slow())
threading.Thread(target=progress.write, args=("told",)).start()
writing.wait()
child = os.fork()
if child == 0:
    signal.alarm(3)
    tqdm.write("from the worker")
    sys.stdout.flush()
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["from the worker", "0"]


@pytest.mark.parametrize(("waited", "is_shown"), [(0.0, False), (0.025, False), (0.026, True)])
def test_a_wait_for_data_is_shown_where_it_is_over_a_twentieth_of_the_step(waited: float, is_shown: bool) -> None:
    numbers = step_numbers({**ROW, "data_seconds": waited})
    assert ("waited 0.03 s for data" in numbers) == is_shown
    assert len(numbers) == len(step_numbers(ROW)) + is_shown
