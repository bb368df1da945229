"""`kdtune download` in its own process: interrupted, killed, refused, and what it prints."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from exit_codes import run_command
from hub_server import Hub

ROOT = Path(__file__).parents[3]
SECRET = "hf_verysecrettoken123"
WEIGHTS = "model.safetensors"


def start(hub: Hub, *arguments: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(ROOT / "no-such-folder")}
    command = [sys.executable, "-m", "kdtune", "download", *arguments]
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert SECRET not in out + err
    assert "Traceback" not in err
    return process.returncode, out, err


def test_the_study_command(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.needs_token = True, SECRET
    folder = tmp_path / "m"
    code, out, err = finish(
        start(
            hub,
            *("meta-llama/Meta-Llama-3.1-8B-Instruct", "--output-dir", str(folder)),
            *("--ignore-patterns", "original/consolidated.00.pth", "--hf_token", SECRET),
        )
    )
    assert code == 0, err
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert not (folder / "original/consolidated.00.pth").exists()
    assert f"6 files, 405.1 kB in {folder}" in out
    assert "left out: original/consolidated.00.pth" in out
    assert out.splitlines()[-1].startswith("next: kdtune run ")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_is_resumed_by_the_next(hub: Hub, tmp_path: Path, how: signal.Signals) -> None:
    hub.seconds_per_page = 0.05
    process = start(hub, "o/m", "--output-dir", str(tmp_path))
    while hub.sent(WEIGHTS) < 150_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    code, _, _ = finish(process)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 1)
    kept = (tmp_path / ".kdtune-download" / f"{hub.digest(WEIGHTS)}.part").stat().st_size
    assert 0 < kept < len(hub.files[WEIGHTS])
    before = len(hub.bodies(WEIGHTS))
    hub.seconds_per_page = 0.0

    code, out, err = finish(start(hub, "o/m", "--output-dir", str(tmp_path)))
    assert code == 0, err
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    again = hub.bodies(WEIGHTS)[before:]
    assert [request.headers["range"] for request in again] == [f"bytes={kept}-"]
    assert again[0].sent == len(hub.files[WEIGHTS]) - kept
    assert "config.json" in out and "already there" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("o/missing",), "error: o/missing: no such repository"),
        (("o/m", "--hf_token", SECRET), "does not accept the token"),
        (("o/m", "--hf-token", f"{SECRET}\n1"), "no token has"),
        (("o/m", "--sha256", "00"), "--sha256 is for packages"),
        (("pypi:a==1", "--revision", "main"), "--revision means nothing for a package"),
        (("pypi:a==1", "--ignore_patterns", "x"), "--ignore-patterns means nothing for a package"),
        (("pypi:a==1", "--hf_token", SECRET), "--hf-token means nothing for a package"),
        (("pypi:a",), "want pypi:NAME==VERSION"),
    ],
)
def test_errors_take_one_line_and_exit_2(
    hub: Hub,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.needs_token = "hf_right"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert run_command(["download", *arguments, "--output_dir", str(tmp_path / "m")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and message in err and SECRET not in err


def test_a_traceback_asked_for_does_not_show_the_token(hub: Hub, tmp_path: Path) -> None:
    hub.needs_token = "hf_right"
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": SECRET}
    command = [sys.executable, "-m", "kdtune", "--traceback", "download", "o/m", "--output-dir", str(tmp_path / "m")]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr and "does not accept the token" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_help_needs_no_hub_client() -> None:
    code = (
        "import sys; from kdtune._cli import download; sys.exit(bool({'huggingface_hub', 'tqdm'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
