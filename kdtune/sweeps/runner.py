"""Run the steps of a sweep as separate processes, one after the other, under a lock on the sweep's folder."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kdtune.checkpoint import atomic_write_text, partial_of, remove_folder
from kdtune.checkpoint.atomic import is_running, try_lock
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.sweeps.check import can_resume, step_overrides
from kdtune.sweeps.plan import Step
from kdtune.sweeps.results import read_record, step_metrics
from kdtune.tokenizers.chat_format import DATE_VARIABLE, today

log = get_logger(__name__)

STOPPED = "stopped"
_POLL_SECONDS = 0.1
_CLOCK_SECONDS = 5.0
_NUM_TAIL_LINES = 12
# Of a training, and of a teacher cache: a stopped one ends without it.
_LAST_WRITTEN = ("final", "quality.json")


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock on the folder of a sweep's steps; yield the lock's descriptor, which every step inherits.

    A step outlives a killed sweep. It then still holds the lock, and the next sweep waits for it.

    Raises:
        ConfigError: another sweep is running in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+") as file:
        waiting = False
        while try_lock(file.fileno()) is False:
            owner = int(path.read_text() or 0)
            if owner and is_running(owner):
                raise ConfigError(
                    f"{folder}: the sweep of process {owner} is running there; wait for it, stop it, "
                    "or choose another output_dir"
                )
            if not waiting:
                log.info("%s: waiting for the step that a killed sweep (process %s) left running", folder, owner)
            waiting = True
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def run_step(step: Step, *, lock: int, stop: Callable[[], bool]) -> str | None:
    """Run a step to its end and write its record; return None if it is finished, else the last lines it printed.

    A step that a stopped sweep left unfinished is resumed if its recipe can, else removed and restarted. When `stop` returns
    true, the step is sent one Ctrl-C and waited for. It may or may not have finished, so it is then not recorded, and the
    next sweep finds out. `lock` is the descriptor of `locked`, which the step inherits.
    """
    if step.record.exists():
        _begin_again(step)
    if not can_resume(step):
        for left in (step.folder, partial_of(step.folder)):
            if left.exists():
                remove_folder(left)
    if not step.folder.exists():
        step.clock.unlink(missing_ok=True)
    step.log.parent.mkdir(parents=True, exist_ok=True)
    command = ["run", step.recipe, "--config", step.config, *step_overrides(step)]
    clock = _Clock(step.clock)

    def poll() -> bool:
        clock.tick()
        return stop()

    environment = {**os.environ, DATE_VARIABLE: _first_day(step.folder.parent)}
    code, told = _execute(command, step.log, lock, poll, environment)
    clock.write()
    if told:
        return STOPPED
    if code != 0:
        return f"exit code {code}\n{tail(step.log)}"
    if can_resume(step) and not any((step.folder / name).exists() for name in _LAST_WRITTEN):
        return f"ended without writing {' or '.join(_LAST_WRITTEN)} in {step.folder}\n{tail(step.log)}"
    record = {
        "step": step.name,
        "recipe": step.recipe,
        "config": step.config,
        "overrides": list(step.overrides),
        "command": ["kdtune", *command],
        "seconds": clock.seconds(),
        "metrics": step_metrics(step.folder),
    }
    atomic_write_text(step.record, json.dumps(record, indent=1) + "\n")
    step.clock.unlink()
    return None


def _first_day(steps_folder: Path) -> str:
    """Return the day on which the first step was run: a chat template that prints the date prints this one in all of them."""
    path = steps_folder / "date"
    if not path.exists():
        atomic_write_text(path, today() + "\n")
    return path.read_text(encoding="utf-8").strip()


class _Clock:
    """The time a step has run, over all its starts, kept in a file that survives a killed sweep."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = float(path.read_text()) if path.exists() else 0.0
        self._started = self._written = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds of this start and the earlier ones."""
        return self._before + time.monotonic() - self._started

    def tick(self) -> None:
        """Write the file every few seconds."""
        if time.monotonic() - self._written > _CLOCK_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file."""
        self._written = time.monotonic()
        atomic_write_text(self._path, f"{self.seconds()!r}\n")


def _begin_again(step: Step) -> None:
    """Clear the folder of a finished step that lacks what `discard` deleted.

    Its record stays until it is finished again, so no cell loses its numbers meanwhile; `again` in it marks that the
    folder belongs to the new run.
    """
    record = read_record(step.record)
    if not record.get("again"):
        if step.folder.exists():
            remove_folder(step.folder)
        atomic_write_text(step.record, json.dumps(record | {"again": True}, indent=1) + "\n")


def _execute(
    command: list[str], log_file: Path, lock: int, stop: Callable[[], bool], environment: Mapping[str, str]
) -> tuple[int, bool]:
    """Run `kdtune COMMAND`, append its output to a file, and return its exit code and whether it was told to stop.

    The process has its own session, so that a Ctrl-C in the terminal reaches it once, through this function.
    """
    with log_file.open("ab", buffering=0) as output:
        output.write(f"$ {shlex.join(['kdtune', *command])}\n".encode(errors="backslashreplace"))
        process = subprocess.Popen(
            [sys.executable, "-m", "kdtune", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            pass_fds=(lock,),
        )
    told = False
    try:
        while True:
            try:
                return process.wait(_POLL_SECONDS), told
            except subprocess.TimeoutExpired:
                if stop() and not told:
                    process.send_signal(signal.SIGINT)
                    told = True
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def tail(log_file: Path) -> str:
    """Return the last lines of a log, with progress bars cut to their last state."""
    text = log_file.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in lines if line][-_NUM_TAIL_LINES:])


def discard(step: Step) -> None:
    """Delete the parts of a finished step's folder that its `discard` names (patterns such as `step_*`).

    They are first listed in the step's record as `discarded`, so that a later user knows that they must be made again.
    """
    paths = sorted({path for pattern in step.discard for path in step.folder.glob(pattern)})
    if not paths:
        return
    record = read_record(step.record)
    names = {path.relative_to(step.folder).as_posix() for path in paths}
    record["discarded"] = sorted(names | set(record.get("discarded", [])))
    atomic_write_text(step.record, json.dumps(record, indent=1) + "\n")
    for path in paths:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
