"""A process that fails takes the others down, in bounded time and with its rank in the output."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_runs import KD
from run_parts import SIZES

from kdtune import distributed, parallel
from kdtune._cli.main import main
from kdtune.models import llama

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def arguments(folder: Path, how: str, *overrides: str) -> list[str]:
    return [*KD, "optimizer=run_parts.Failing", f"optimizer.how={how}", "~lr_scheduler", "sample_prompts=[]",
            f"output_dir={folder / 'out'}", *overrides]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "messages"),
    [
        ("raise", (f"[rank 1 on {socket.gethostname()}]", "ValueError: it went wrong", "Traceback")),
        pytest.param(
            "memory",
            ("[rank 1] error: cpu is out of memory: CUDA out of memory.", "`kdtune plan CONFIG --world-size N`"),
            marks=pytest.mark.slow(
                "8 seconds; the other error is in the quick tests, and this message in those of one process"
            ),
        ),
    ],
)
def test_a_rank_that_raises(
    how: str, messages: tuple[str, ...], launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = launch.wait(launch.start(main, arguments(tmp_path, how), ranks=3), timeout=60)
    assert [rank.code for rank in ended] == [1, 1, 1]
    assert all(message in ended[1].text for message in messages)
    assert not (tmp_path / "out" / "final").exists()


def test_a_rank_that_hangs(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end when the timeout is over; torchrun then ends the one that hangs."""
    monkeypatch.chdir(tmp_path)
    started = launch.start(main, arguments(tmp_path, "hang", "parallelism.timeout_minutes=0.1"), ranks=3)
    for rank in (started[0], started[2]):
        rank.process.join(60)
        assert rank.code == 1, rank.text
    assert "Timed out waiting 6000ms" in started[0].text + started[2].text
    assert started[1].process.is_alive()
    started[1].process.kill()
    started[1].process.join()


def wait_in_a_group_of_the_mesh(layout: dict[str, int], given_up: Path) -> None:
    """Rank 1 stays away from a forward: rank 0, which shares a group with it that is not all processes, gives up in time."""
    parallelism = distributed.Parallelism(**layout, timeout_minutes=0.05)
    with parallelism.start_world(torch.device("cpu")) as world:
        model = parallel.shard_model(llama(**SIZES, tie_embeddings=True), parallelism, world)
        if world.rank == 0:
            with pytest.raises(RuntimeError, match="Timed out waiting 3000ms"):
                model(torch.zeros(1, 4, dtype=torch.int64), return_hidden=True)
            given_up.touch()
        while not given_up.exists():
            time.sleep(0.05)
        os._exit(0)  # nothing can be shut down in order


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp_replicate": 2}, id="HSDP 2x2"),
        pytest.param(
            {"tp": 2}, id="FSDP 2 x TP 2", marks=pytest.mark.slow("waits for a timeout as for the other layout")
        ),
    ],
)
def test_the_groups_of_a_mesh_wait_as_long_as_the_run(layout: dict[str, int], launch, tmp_path: Path) -> None:
    launch.call(wait_in_a_group_of_the_mesh, layout, tmp_path / "given_up", ranks=4)


@pytest.mark.parametrize("damage", ["logger", "file"])
def test_what_the_main_process_alone_finds_ends_all_alike(damage: str, launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = [*KD, f"output_dir={out}", "sample_prompts=[]", "max_steps_per_epoch=2", "save_every_n_steps=1"]
    if damage == "logger":
        run += ["metric_logger=run_parts.RefusingLogger"]
        message = "it wants a login"
    else:
        ended = launch.kdtune(*run, ranks=2)
        assert [rank.code for rank in ended] == [0, 0], ended[0].text
        (out / "samples.jsonl").write_text("not JSON\n{}\n")
        run += ["resume_from_checkpoint=true", "epochs=2"]
        message = f"{out / 'samples.jsonl'}: line 1"
    ended = launch.kdtune(*run, ranks=2)
    assert [rank.code for rank in ended] == [2, 2], ended[1].text
    assert message in ended[0].text and "Traceback" not in ended[0].text
    assert not ended[1].text  # what one has said


@pytest.mark.slow("torchrun imports torch three times; without it the quick tests see each error")
def test_a_rank_that_is_killed_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdtune", "run", "--nproc_per_node", "2", *arguments(tmp_path, "SIGKILL")[1:]]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert time.monotonic() - begun < 150
    assert "error: rank 1 failed first: killed by SIGKILL (the system was out of memory, perhaps)" in done.stderr
    assert "[rank 0 on" in done.stderr


def test_processes_that_do_not_fit(launch, tmp_path: Path) -> None:
    ended = launch.kdtune(*KD, f"output_dir={tmp_path / 'out'}", "parallelism.dp_replicate=2", ranks=3)
    assert [rank.code for rank in ended] == [2, 2, 2]
    assert "parallelism: dp_replicate=2 dp_shard=-1 tp=1: needs a multiple of 2 processes, found 3" in ended[0].text
    assert not ended[1].text and not (tmp_path / "out").exists()


def test_a_model_that_tensor_parallelism_does_not_divide(launch, tmp_path: Path) -> None:
    ended = launch.kdtune(*KD, f"output_dir={tmp_path / 'out'}", "parallelism.tp=-1", "parallelism.dp_shard=1", ranks=3)
    assert [rank.code for rank in ended] == [2, 2, 2]
    assert "parallelism: tp=3 does not divide num_kv_heads=2" in ended[0].text
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_not_divided_is_found_before_the_teacher_is_read(
    launch, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("kdtune.checkpoint.Checkpointer.load", load)
    node = f"teacher_checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    run = [*KD, node, "teacher_model=null", "parallelism.tp=2", f"output_dir={tmp_path / 'out'}"]
    ended = launch.kdtune(*run, "model.num_kv_heads=1", ranks=2)
    assert [rank.code for rank in ended] == [2, 2]
    assert "parallelism: tp=2 does not divide num_kv_heads=1" in ended[0].text
    ended = launch.kdtune(*run, ranks=2)
    assert [rank.code for rank in ended] == [1, 1] and "weights are read" in ended[0].text


@pytest.mark.parametrize("setting", ["parallelism.tp=2", "parallelism.cpu_offload=true"])
def test_an_nf4_base_that_cannot_be_cut_or_offloaded(setting: str, launch, tmp_path: Path) -> None:
    adapter = ["adapter=kdtune.models.apply_lora", "adapter.quantize_base=true"]
    ended = launch.kdtune(*KD, *adapter, setting, f"output_dir={tmp_path / 'out'}", ranks=2)
    assert [rank.code for rank in ended] == [2, 2]
    assert "an NF4 base is cut by rows for FSDP alone" in ended[0].text and not ended[1].text
    assert not (tmp_path / "out").exists()
