"""Restarts by torchrun go on with the run, and torchrun's own errors are told in a line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_runs import KD, check_same_change, check_same_rows, rows
from exit_codes import run_command

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
SHORT = [*KD[1:], "~lr_scheduler", "sample_prompts=[]", "run_val_every_n_steps=null", "save_every_n_steps=2",
         "gradient_accumulation_steps=1"]  # fmt: skip


def kdtune(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`kdtune run ARGUMENTS...`, once it has ended."""
    command = [sys.executable, "-m", "kdtune", "run", *arguments]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow("torchrun starts four processes one after another for each case")
@pytest.mark.parametrize(("at", "saved"), [(3, "step 0 (no checkpoint yet)"), (6, "step_4")])
def test_a_killed_process_is_restarted_and_the_run_goes_on(
    at: int, saved: str, launch, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    run = [
        *SHORT,
        "optimizer=run_parts.Failing",
        "optimizer.how=SIGKILL",
        "optimizer.once=true",
        f"optimizer.at={at}",
        "save_every_n_steps=4",
        base,
    ]
    ended = launch.kdtune("run", *run, "output_dir=whole", ranks=2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].text

    done = kdtune("--max-restarts", "1", "--nproc_per_node", "2", *run, "output_dir=cut", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--max-restarts 1: resume_from_checkpoint=true is set" in done.stderr
    assert f"cut: resuming from {saved}" in done.stderr
    check_same_rows(rows(tmp_path / "cut"), rows(tmp_path / "whole"))
    check_same_change(tmp_path / "cut" / "final", tmp_path / "whole" / "final", small_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2", "--node_rank", "0", "--master_addr", "h"], "of a static rendezvous (--node_rank,"),
        (["--master_port", "29500"], "use, the same on every host, --rdzv_backend c10d"),
        (["--nproc_per_node", "2"], "--max-restarts 2 with resume_from_checkpoint=false: a restart would find"),
    ],
)
def test_restarts_that_could_not_work(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", *options, "--max_restarts=2", *SHORT, "resume_from_checkpoint=false"]
    assert run_command(command) == 2
    assert message in capsys.readouterr().err


ONE_MORE = pytest.mark.slow("imports torch anew; the quick tests have a wrong option")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        pytest.param(
            ["--nproc_per_node", "many"], 2, "torchrun refuses its options (--nproc_per_node many): Unsupported",
            id="wrong option",
        ),
        pytest.param(
            ["--nproc_per_node", "0"], 2, "(--nproc_per_node 0): --nproc_per_node and --nnodes must be above 0",
            id="no process", marks=ONE_MORE,
        ),
        pytest.param(
            ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--rdzv_conf=join_timeout=1", "--rdzv_id=x"],
            1, "not all of 2 hosts came to the rendezvous 'x' at localhost:0 in time", id="a host is missing", marks=ONE_MORE,
        ),
        pytest.param(
            ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:1", "--rdzv_conf=read_timeout=1,is_host=0"],
            1, "no answer from the rendezvous at 127.0.0.1:1: its host has ended, or the network is cut",
            id="no c10d rendezvous", marks=ONE_MORE,
        ),
        pytest.param(
            ["--nnodes=2", "--node_rank=1", "--master_addr=127.0.0.1", "--master_port=1", "--rdzv_conf=timeout=1"],
            1, "no answer from the rendezvous at 127.0.0.1:1: its host has ended, or the network is cut",
            id="no static rendezvous", marks=ONE_MORE,
        ),
    ],
)  # fmt: skip
def test_torchruns_own_errors(options: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = kdtune(*options, *SHORT, f"output_dir={tmp_path / 'out'}", folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow("two starts of torchrun by a script, and 100 steps")
def test_the_slurm_script(tmp_path: Path) -> None:
    """Slurm played by scripts of a line: SIGTERM before the limit saves and requeues, and the next start resumes."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "kdtune", f'exec {sys.executable} -m kdtune "$@"')
    executable(tools / "srun", 'exec "$@"')
    executable(tools / "scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt; echo localhost')
    environment = ENVIRONMENT | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost",
                                 "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid())}  # fmt: skip
    out = tmp_path / "out"
    command = [bash, str(ROOT / "docs" / "slurm.sbatch"), *SHORT, "epochs=10", f"output_dir={out}"]
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        try:
            give_up = time.monotonic() + 120
            while not (out / "step_2").exists():
                assert script.poll() is None and time.monotonic() < give_up, (tmp_path / "log").read_text()
                time.sleep(0.05)
            script.send_signal(signal.SIGTERM)
            assert script.wait(120) == 1
        finally:
            if script.poll() is None:
                # Torchrun passes it on to its processes, as it would not a SIGKILL.
                os.killpg(script.pid, signal.SIGTERM)
    text = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM" in text and not (out / "final").exists()
    asked = (tmp_path / "scontrol.txt").read_text().splitlines()
    assert asked == ["show hostnames localhost", f"requeue {os.getpid()}"]

    again = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert again.returncode == 0 and "resuming from step_" in again.stderr, again.stderr
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 101))
