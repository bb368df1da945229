"""Two runs never write into one folder."""

import multiprocessing
import os
from pathlib import Path

import pytest

from kdtune.distributed import SINGLE_PROCESS
from kdtune.errors import ConfigError
from kdtune.runs import output_dir_problems, start_run

IN_USE = "another run is writing there; wait for it, stop it, or choose another output_dir"


def begin(folder: Path) -> None:
    start_run(folder, SINGLE_PROCESS, step=0, resolved_config="seed: 0\n", record={})


def hold(folder: Path, connection: "multiprocessing.connection.Connection") -> None:
    begin(folder)
    connection.send("held")
    connection.recv()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path, theirs))
    other.start()
    assert ours.recv() == "held"
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (problem,) = output_dir_problems(str(tmp_path), resume=True)
    assert problem == f"output_dir={tmp_path}: {IN_USE}"
    with pytest.raises(ConfigError, match="another run is writing there"):
        begin(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    # However it ends, the folder is free.
    other.kill()
    other.join()
    assert output_dir_problems(str(tmp_path), resume=True) == []
    begin(tmp_path)
    begin(tmp_path)


def sleep(connection: "multiprocessing.connection.Connection") -> None:
    connection.recv()


def hold_with_a_worker(
    folder: Path,
    connection: "multiprocessing.connection.Connection",
    worker_pipe: "multiprocessing.connection.Connection",
) -> None:
    begin(folder)
    worker = multiprocessing.get_context("fork").Process(target=sleep, args=(worker_pipe,))
    worker.start()
    connection.send(worker.pid)
    connection.recv()


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    our_end, worker_end = context.Pipe()
    run = context.Process(target=hold_with_a_worker, args=(tmp_path, theirs, worker_end))
    run.start()
    worker = ours.recv()
    run.kill()
    run.join()
    os.kill(worker, 0)
    assert output_dir_problems(str(tmp_path), resume=True) == []
    our_end.send("end")
