"""Two hosts: one run over both, and a link that is cut, for a while and for good."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed_runs import KD, check_same_change, check_same_rows, rows
from two_hosts import TwoHosts, two_hosts, wait_until, why_not

pytestmark = pytest.mark.slow("waits until a link that is cut has timed out; two whole runs")
TORCHRUN = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "host-a:29400",
            "--rdzv_id", "two"]  # fmt: skip
PLAIN = ["optimizer=torch.optim.SGD", "optimizer.lr=0.1", "~lr_scheduler", "batch_size=2", "sample_prompts=[]",
         "save_every_n_steps=2", "run_val_every_n_steps=null"]  # fmt: skip


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    """Skips where there can be none, fails where KDTUNE_REQUIRE_HOSTS is set (CI)."""
    if reason := why_not():
        if os.environ.get("KDTUNE_REQUIRE_HOSTS"):
            pytest.fail(reason)
        pytest.skip(reason)
    with two_hosts(tmp_path) as made:
        yield made


def newest(output_dir: Path) -> int:
    return max((int(folder.name.removeprefix("step_")) for folder in output_dir.glob("step_*")), default=0)


def on_one_process(launch, run: list[str], output_dir: Path) -> None:
    ended = launch.kdtune("run", *run, "gradient_accumulation_steps=2", f"output_dir={output_dir}", ranks=1)
    assert ended[0].code == 0, ended[0].text


def test_one_run_over_both(hosts: TwoHosts, launch, small_model: Path, tmp_path: Path) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    run = [*KD[1:], *PLAIN, base, "max_steps_per_epoch=6"]
    jobs = hosts.start("run", *TORCHRUN, *run, "gradient_accumulation_steps=1", f"output_dir={tmp_path / 'both'}")
    assert [job.wait() for job in jobs] == [0, 0], "\n\n".join(job.text for job in jobs)
    on_one_process(launch, run, tmp_path / "one")
    check_same_rows(rows(tmp_path / "both"), rows(tmp_path / "one"))
    check_same_change(tmp_path / "both" / "final", tmp_path / "one" / "final", small_model)


def test_a_link_that_is_cut(hosts: TwoHosts, launch, small_model: Path, tmp_path: Path) -> None:
    """For a while: the run restarts by itself. For good: all end. Joined again: the same command finishes the run."""
    cut = tmp_path / "cut"
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    run = [*KD[1:], *PLAIN, base, "max_steps_per_epoch=20", "epochs=3"]
    command = ["run", *TORCHRUN, "--max-restarts", "1", "--rdzv_conf", "read_timeout=20", *run,
               "gradient_accumulation_steps=1", "parallelism.timeout_minutes=0.1", f"output_dir={cut}"]  # fmt: skip
    jobs = hosts.start(*command)
    wait_until(lambda: newest(cut) >= 4, jobs)
    hosts.link("down")
    wait_until(lambda: all(f"[rank {rank} on host-{host}]" in jobs[rank].text for rank, host in enumerate("ab")), jobs)
    # One times out; the other does too, or sees the first one's end.
    assert any("Timed out waiting 6000ms" in job.text for job in jobs)
    before = newest(cut)
    hosts.link("up")
    wait_until(lambda: newest(cut) >= before + 4, jobs)
    assert f"{cut}: resuming from step_{before}" in jobs[0].text

    hosts.link("down")
    assert [job.wait() for job in jobs] == [1, 1]
    assert "error: on host-a rank 0 failed first: exit code 1, its error is above" in jobs[0].text.splitlines()[-1]
    assert "error: on host-b: no answer from the rendezvous at host-a:29400" in jobs[1].text.splitlines()[-1]
    assert not any("torch/distributed/run.py" in job.text for job in jobs) and not (cut / "final").exists()

    before = newest(cut)
    hosts.link("up")
    jobs = hosts.start(*command)
    assert [job.wait() for job in jobs] == [0, 0], "\n\n".join(job.text for job in jobs)
    assert f"{cut}: resuming from step_{before}" in jobs[0].text
    on_one_process(launch, run, tmp_path / "one")
    check_same_rows(rows(cut), rows(tmp_path / "one"))
    check_same_change(cut / "final", tmp_path / "one" / "final", small_model)
