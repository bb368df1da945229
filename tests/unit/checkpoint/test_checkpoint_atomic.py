"""Folders are whole or not there: after errors, full disks and SIGKILL at random moments."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtune.checkpoint import atomic_folder, atomic_write_text, clean_leftovers, remove_folder
from kdtune.errors import CheckpointError


def test_block_becomes_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "step_1"
    with atomic_folder(target) as hidden:
        assert hidden.name.startswith(".step_1.partial-") and str(os.getpid()) in hidden.name
        (hidden / "state").mkdir()
        (hidden / "state" / "a").write_text("1")
        assert not target.exists()
    assert (target / "state" / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["step_1"]
    assert not hidden.exists()


def test_permissions_are_those_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "x") as hidden:
        (hidden / "big").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_a_full_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    with atomic_folder(target) as hidden:
        (hidden / "a").write_text("1")
    refusal = pytest.raises(CheckpointError, match=r"x: exists and is not empty \(holds 'a'\); nothing is overwritten")
    with refusal, atomic_folder(target):
        raise AssertionError("the block must not run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: exists and is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_target_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="x: cannot be written: .*not empty"),
        atomic_folder(tmp_path / "x") as hidden,
    ):
        (hidden / "mine").write_text("1")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").write_text("2")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_system_errors_name_the_path_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal = pytest.raises(
        CheckpointError, match="below: cannot be written: .*has that name: choose another output_dir"
    )
    with refusal, atomic_folder(tmp_path / "file" / "below"):
        pass
    with pytest.raises(CheckpointError, match="No space left on device.*free space"), atomic_folder(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="may write to"), atomic_folder(tmp_path / "x"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(CheckpointError, match="below.txt: cannot be written"):
        atomic_write_text(tmp_path / "file" / "below.txt", "text")


def test_errors_from_inside_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, atomic_folder(tmp_path / "final") as hidden:
        raise CheckpointError(f"{hidden / 'config.json'}: is wrong")
    assert str(caught.value) == f"{tmp_path / 'final' / 'config.json'}: is wrong"


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: the write fails in the kernel, midway."""
    script = """
import resource, sys
from kdtune.checkpoint import atomic_folder
from kdtune.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_folder(sys.argv[1]) as hidden:
        (hidden / "a").write_bytes(b"1" * 10_000)
except CheckpointError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert f"{tmp_path / 'x'}: cannot be written: File too large" in out.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    atomic_write_text(file, "first")
    atomic_write_text(file, "zwei ü\n")
    assert file.read_bytes() == "zwei ü\n".encode()
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]


def test_leftovers_of_dead_processes_go_those_of_living_stay(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, host = os.getppid(), socket.gethostname()
    old = tmp_path / f".step_9.partial-another-host-{alive}-0123abcd"
    dead = [
        tmp_path / f".step_2.partial-{host}-{gone.pid}-0123abcd",
        tmp_path / f".step_1.deleted-{host}-{gone.pid}-0123abcd",
        # Our own process id, from an earlier life: containers start counting anew.
        tmp_path / f".step_3.partial-{host}-{os.getpid()}-0123abcd",
        old,
    ]
    kept = [
        tmp_path / f".step_2.partial-{host}-{alive}-0123abcd",
        # Of another host, which alone knows its processes.
        tmp_path / f".step_2.partial-another-host-{gone.pid}-0123abcd",
        tmp_path / "step_2",
        tmp_path / ".cache",
        tmp_path / ".x.partial-a",
    ]
    for path in (*dead, *kept):
        (path / "inside").mkdir(parents=True)
    for path in (old / "inside", old):
        os.utime(path, (0, 0))
    text = tmp_path / f".a.json.partial-{host}-{gone.pid}-0123abcd"
    text.write_text("")
    with atomic_folder(tmp_path / "now") as hidden:
        assert sorted(clean_leftovers(tmp_path)) == sorted([*dead, text])
        assert hidden.is_dir()
    assert all(path.exists() for path in kept)
    assert clean_leftovers(tmp_path / "missing") == []


def test_removed_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "step_1" / "state").mkdir(parents=True)
    remove_folder(tmp_path / "step_1")
    assert list(tmp_path.iterdir()) == []


WRITER = """
import itertools, sys
from pathlib import Path
from kdtune.checkpoint.atomic import atomic_folder, atomic_write_text, remove_folder
root = Path(sys.argv[1])
print("ready", flush=True)
for n in itertools.count():
    with atomic_folder(root / f"step_{n}") as hidden:
        (hidden / "state").mkdir()
        for i in range(20):
            (hidden / f"part{i}").write_bytes(bytes([i]) * 5000)
        (hidden / "state" / "last").write_text(str(n))
    atomic_write_text(root / "latest", f"{n} " * 2000)
    if n >= 3:
        remove_folder(root / f"step_{n - 3}")
"""


@pytest.mark.slow("twelve processes killed at random moments; the others fail at chosen ones")
def test_sigkill_at_random_moments_leaves_only_whole_folders(tmp_path: Path) -> None:
    moments = random.Random(0)
    found = cut_short = 0
    for attempt in range(12):
        root = tmp_path / str(attempt)
        root.mkdir()
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for folder in root.glob("step_*"):
            found += 1
            assert (folder / "state" / "last").read_text() == folder.name.removeprefix("step_")
            for i in range(20):
                assert (folder / f"part{i}").read_bytes() == bytes([i]) * 5000
        if (root / "latest").exists():
            words = (root / "latest").read_text().split()
            assert len(words) == 2000 and len(set(words)) == 1
        cut_short += len(clean_leftovers(root))
        assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    print(f"{found} whole folders, {cut_short} cut short")
    assert found > 0 and cut_short > 0
