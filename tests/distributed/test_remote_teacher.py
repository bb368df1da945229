"""The teacher on processes of its own: the numbers of one process, nothing of it on the student's, and how both end."""

import gc
import json
import os
import re
import signal
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from distributed_runs import ADAPTERS, COPY, KD, PLAIN, check_same_change, check_same_rows, rows
from torch import Tensor
from torch import distributed as dist

from kdtune import distributed, losses, parallel, runs, teachers
from kdtune._cli.main import main
from kdtune.data import Batch
from kdtune.models import Transformer, llama

# Processes of the student, of the teacher, micro-batches of a step, and what else.
LAYOUTS = {
    "1 of both": (1, 0, 4, []),
    "2 + 1": (2, 1, 2, []),
    "1 + 2, sharded": (1, 2, 4, []),
    "2 + 2, sharded": (2, 2, 2, ["parallelism.dp_replicate=2", "teacher_parallelism=kdtune.distributed.Parallelism"]),
    "4 + 3, copies": (4, 3, 1, COPY),
}


def layout_arguments(name: str, out: Path) -> tuple[list[str], int]:
    students, teacher, accumulation, more = LAYOUTS[name]
    return [f"gradient_accumulation_steps={accumulation}", f"teacher_processes={teacher}", *more,
            f"output_dir={out}"], students + teacher  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param("full", ["1 of both", "2 + 1"], id="full, 2 + 1"),
        *(
            pytest.param(
                kind, list(LAYOUTS), id=kind, marks=pytest.mark.slow("18 processes, seven at once on two cores")
            )
            for kind in ("full", "lora")
        ),
    ],
)
def test_the_numbers_of_one_process(kind: str, names: list[str], launch, small_model: Path, tmp_path: Path) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    for name in names:
        arguments, ranks = layout_arguments(name, tmp_path / name)
        ended = launch.kdtune(*KD, *PLAIN, *ADAPTERS[kind], base, *arguments, ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, "\n".join(rank.text for rank in ended)
        said = [number for number, rank in enumerate(ended) if rank.text]
        assert said == [0]  # the main process alone
        check_same_rows(rows(tmp_path / name), rows(tmp_path / "1 of both"))
        check_same_change(tmp_path / name / "final", tmp_path / "1 of both" / "final", small_model)
    on = {"2 + 1": "1 of the run's 3", "4 + 3, copies": "3 of the run's 7"}
    assert f"the teacher is on {on[names[-1]]} processes" in ended[0].text
    trained = [row for row in rows(tmp_path / "1 of both") if "loss" in row]
    assert len(trained) == 5 and trained[-1]["loss"] < trained[0]["loss"] - 0.01


@pytest.mark.parametrize(
    "names",
    [
        ["1 of both", "2 + 1"],
        pytest.param(
            ["1 of both", "1 + 2, sharded", "4 + 3, copies"], marks=pytest.mark.slow("seven processes on two cores")
        ),
    ],
    ids=["2 + 1", "others"],
)
def test_random_weights_answers_and_steps_without_a_batch_for_all(names: list[str], launch, tmp_path: Path) -> None:
    """21 examples are 11 batches: the last of 3 steps has 3, and validation 5. Both models draw what they draw together."""
    short = [
        "dataset.split=train[:21]",
        "max_steps_per_epoch=null",
        "epochs=2",
        "sample_prompts=[What is a prime number?]",
    ]
    answers = {}
    for name in names:
        arguments, ranks = layout_arguments(name, tmp_path / name)
        ended = launch.kdtune(*KD, *PLAIN, *short, *arguments, ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, "\n".join(rank.text for rank in ended)
        check_same_rows(rows(tmp_path / name), rows(tmp_path / "1 of both"))
        answers[name] = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
    assert [row["model"] for row in answers[names[-1]]] == ["student", "teacher", "student"]
    assert all(one == answers["1 of both"] for one in answers.values()) and answers[names[-1]][1]["answer"]


def float64_model(*, width: int, seed: int) -> Transformer:
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    model = llama(vocab_size=64, embed_dim=width, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64,
                  max_seq_len=64, tie_embeddings=True)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


def teacher_model() -> Transformer:
    model = float64_model(width=48, seed=1).requires_grad_(False)
    model.output.softcap = 3.0  # sent beside the head; the runs of this file have none
    return model


def compare_gradients(num_teachers: int, ahead: bool) -> None:
    """Gradients of two micro-batches a student's process, against all of them at once beside a teacher in one piece."""
    student, whole, teacher = float64_model(width=32, seed=0), float64_model(width=32, seed=0), teacher_model()
    kd_loss = losses.KDLoss(losses.ForwardKLLoss(), kd_ratio=0.5)
    torch.manual_seed(2)
    tokens, labels = torch.randint(64, (12, 9)), torch.randint(64, (12, 9))
    labels[0], labels[5:8] = -100, -100
    num_valid_tokens = (labels != -100).sum()

    def backward(model: Transformer, teacher: teachers.Teacher, batch: Batch) -> None:
        total, _ = kd_loss(model(**batch.inputs, return_hidden=True), model.output, teacher(batch), batch.targets)
        (total / num_valid_tokens).backward()

    backward(whole, teachers.OnlineTeacher(teacher), Batch.from_labels(tokens, labels))
    with distributed.start_world(torch.device("cpu"), teacher_processes=num_teachers) as world:
        if world.is_teacher:
            sharded = parallel.shard_model(teacher, distributed.Parallelism(), world)
            teachers.serve(lambda: sharded, world, runs.InterruptFlag())
            return
        assert (world.size, dist.get_world_size()) == (int(os.environ["WORLD_SIZE"]) - num_teachers,) * 2
        parallel.shard_model(student, distributed.Parallelism(), world)
        remote = teachers.RemoteTeacher(world.channel, world.device)
        share = 12 // world.size
        start = world.rank * share
        # Of unequal size: with one process of the student, 3 of the teacher share 10 rows, and then 2.
        cuts = [start, start + share - 2, start + share]
        rows = [Batch.from_labels(tokens[a:b], labels[a:b]) for a, b in pairwise(cuts)]
        batches = [rows[0].without_padding(), *rows[1:]]  # end to end, and as rows
        if ahead:
            remote.prefetch(batches)
        for batch in batches:
            backward(student, remote, batch)
        for name, expected in whole.named_parameters():
            found = student.get_parameter(name).grad
            torch.testing.assert_close(found.full_tensor(), expected.grad, rtol=1e-9,
                                       atol=1e-9 * expected.grad.abs().max().item())  # fmt: skip
        # Hidden states and head are those of the teacher's processes.
        logp = remote(Batch.from_labels(tokens, labels)).log_probs(torch.arange(tokens.numel()))
        torch.testing.assert_close(logp.view(12, 9, -1), teacher(tokens).log_softmax(-1), rtol=1e-12, atol=1e-12)
        dist.barrier()


@pytest.mark.parametrize(("students", "num_teachers"), [(2, 1), (1, 3), (2, 2), (3, 2)])
@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "asked ahead"])
def test_gradients_in_float64(students: int, num_teachers: int, ahead: bool, launch) -> None:
    launch.call(compare_gradients, num_teachers, ahead, ranks=students + num_teachers)


def matrices() -> dict[int, Tensor]:
    """The tensors of two axes and more that this process holds in its memory, by their `id`."""
    gc.collect()
    held = (one for one in gc.get_objects() if isinstance(one, Tensor) and one.device.type == "cpu")
    return {id(one): one for one in held if one.ndim > 1}


def holds_the_head_alone() -> None:
    with distributed.start_world(torch.device("cpu"), teacher_processes=1) as world:
        if world.is_teacher:
            teachers.serve(teacher_model, world, runs.InterruptFlag())
            return
        before = matrices()  # what tests before this one have left to the forked process
        teacher = teachers.RemoteTeacher(world.channel, world.device)
        tokens = torch.randint(64, (2, 8))
        signal = teacher(Batch.from_labels(tokens, tokens))
        assert signal.hidden_BSD.shape == (2, 8, 48) and signal.output.weight.shape == (64, 48)
        assert teacher.vocab_size == 64 and not signal.output.weight.requires_grad
        del signal
        new = [one for name, one in matrices().items() if name not in before]
        assert sum(one.untyped_storage().nbytes() for one in new) == 64 * 48 * 8 + tokens.nbytes


def test_a_process_of_the_student_holds_the_head_alone(launch) -> None:
    launch.call(holds_the_head_alone, ranks=3)


RUN = [
    *KD,
    "optimizer.lr=1e-2",
    "batch_size=2",
    "sample_prompts=[]",
    "save_every_n_steps=2",
    "run_val_every_n_steps=null",
]


def test_the_students_processes_do_not_read_the_teachers_weights(launch, tmp_path: Path, small_model: Path) -> None:
    ended = launch.kdtune(
        *RUN, "teacher_processes=1", "teacher_model=null", "max_steps_per_epoch=2", f"output_dir={tmp_path / 'out'}",
        f"teacher_checkpointer={{_component_: run_parts.OnRank2, checkpoint_dir: {small_model}}}", ranks=3,
    )  # fmt: skip
    assert [rank.code for rank in ended] == [0] * 3, "\n".join(rank.text for rank in ended)


@pytest.mark.parametrize(
    ("how", "first"),
    [
        ("raise", "ValueError: it went wrong"),
        ("SIGKILL", ""),
        pytest.param(
            "hang", "parallelism.timeout_minutes", marks=pytest.mark.slow("waits for a timeout of 12 seconds")
        ),
    ],
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_process_that_fails(whose: str, how: str, first: str, launch, tmp_path: Path) -> None:
    """All others end with an error that names the process they have lost; with one that hangs, when the timeout is over."""
    parts = {
        "student": ["optimizer=run_parts.Failing", f"optimizer.how={how}", "~lr_scheduler"],
        "teacher": ["teacher_model=run_parts.failing_teacher", f"teacher_model.how={how}"],
    }
    failing = {"student": 1, "teacher": 2}[whose]
    run = [*RUN, *parts[whose], "teacher_processes=1", f"output_dir={tmp_path / 'out'}"]
    started = launch.start(main, [*run, *(["parallelism.timeout_minutes=0.2"] if how == "hang" else [])], ranks=3)
    others = [rank for number, rank in enumerate(started) if number != failing]
    for rank in others:
        rank.process.join(60)
    if how == "hang":
        assert started[failing].process.is_alive()
        started[failing].process.kill()
    launch.wait(started, timeout=60)
    assert [rank.code for rank in others] == [1, 1], "\n".join(rank.text for rank in others)
    assert started[failing].code == {"raise": 1}.get(how, -signal.SIGKILL)
    said = "\n".join(rank.text for rank in started)
    assert first in said, said
    speaker, other = {"student": ("[rank 2]", "student"), "teacher": ("[rank", "teacher")}[whose]
    assert re.search(
        rf"{re.escape(speaker)}.* error: on {socket.gethostname()}: rank \d, a process of the {other}, is gone", said
    ), said
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.slow("11 seconds; a process of either side that fails while it trains is in the quick tests")
@pytest.mark.parametrize(
    ("mistake", "first_says", "last_says"),
    [
        (["dataset.split=train[:0]"], "the dataset is empty", "rank 0, a process of the student, has ended"),
        (["teacher_model=run_parts.adapted_teacher"],
         "rank 2, a process of the teacher, has ended with an error of its own", "the teacher's output head has an adapter"),
    ],
    ids=["of the student", "of the teacher"],
)  # fmt: skip
def test_a_users_mistake_that_one_side_finds(
    mistake: list[str], first_says: str, last_says: str, launch, tmp_path: Path
) -> None:
    """All end with its exit code, whichever torchrun looks at; what the first process says the second need not."""
    ended = launch.kdtune(*RUN, *mistake, "teacher_processes=1", f"output_dir={tmp_path / 'out'}", ranks=3)
    assert [rank.code for rank in ended] == [2, 2, 2], "\n".join(rank.text for rank in ended)
    assert first_says in ended[0].text and not ended[1].text and last_says in ended[2].text
    assert not any("Traceback" in rank.text for rank in ended)
    assert not (tmp_path / "out").exists()


def check_stopped(ended: list, out: Path) -> None:
    assert [rank.code for rank in ended] == [0] * len(ended), "\n".join(rank.text for rank in ended)
    assert "stopped by SIGTERM after step" in ended[0].text and not (out / "final").exists()


@pytest.mark.parametrize("to", [slice(0, 3), slice(2, 3)], ids=["to all", "to the teacher"])
def test_a_signal_stops_the_run_after_a_step(to: slice, launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = [*RUN, "gradient_accumulation_steps=1", "teacher_processes=1", f"output_dir={out}"]
    started = launch.start(main, run, ranks=3)
    while not (out / "step_2").exists():
        assert all(rank.process.is_alive() for rank in started), started[0].text
        started[0].process.join(0.01)
    for rank in started[to]:
        os.kill(rank.process.pid, signal.SIGTERM)
    check_stopped(launch.wait(started, timeout=60), out)
    assert "Traceback" not in started[2].text


@pytest.mark.slow("five starts of up to three processes, as in test_resume.py")
def test_resumed_with_the_teacher_beside_and_apart_again(
    launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after steps 3 and 6, each time it goes on in other numbers of processes as if it had never been stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = [*RUN, "optimizer=run_parts.Stopping", "optimizer.lr=1e-2"]
    ended = launch.kdtune(*run, "gradient_accumulation_steps=2", f"output_dir={whole}", ranks=1)
    assert ended[0].code == 0, ended[0].text
    resume = [*run, "resume_from_checkpoint=true", f"output_dir={cut}"]
    monkeypatch.setenv("STOP_AT", "3")
    check_stopped(launch.kdtune(*resume, "gradient_accumulation_steps=1", "teacher_processes=1", ranks=3), cut)
    monkeypatch.setenv("STOP_AT", "6")
    check_stopped(launch.kdtune(*resume, "gradient_accumulation_steps=1", ranks=2), cut)
    for said in ("resuming from step_6", "all 10 steps are done"):  # the second time no teacher is built
        ended = launch.kdtune(*resume, "gradient_accumulation_steps=2", "teacher_processes=2", ranks=3)
        assert [rank.code for rank in ended] == [0] * 3, "\n".join(rank.text for rank in ended)
        assert said in ended[0].text
    trained, expected = ([row for row in rows(out) if "loss" in row] for out in (cut, whole))
    # AdamW enlarges the rounding differences of other numbers of processes; a lost state would show in percents.
    check_same_rows(trained, expected, tolerance=1e-3)


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["teacher_processes=2"], 2, "teacher_processes=2: needs more processes than that, for the student, found 2"),
        (["teacher_processes=-1"], 2, "teacher_processes=-1: must be at least 0"),
        (["teacher_processes=1", "kd_ratio=0"], 2, "teacher_processes=1: with kd_ratio=0 no step asks the teacher; set 0"),
        (["teacher_processes=1", "parallelism.dp_replicate=2"], 4,
         "parallelism: dp_replicate=2 dp_shard=-1 tp=1: needs a multiple of 2 processes, found 3"),
        (["teacher_processes=1", "parallelism.dp_replicate=2"], 3,
         "teacher_parallelism: dp_replicate=2 dp_shard=-1 tp=1: needs a multiple of 2 processes, found 1"),
    ],
)  # fmt: skip
def test_processes_that_do_not_fit(overrides: list[str], ranks: int, message: str, launch, tmp_path: Path) -> None:
    ended = launch.kdtune(*KD, f"output_dir={tmp_path / 'out'}", *overrides, ranks=ranks)
    assert [rank.code for rank in ended] == [2] * ranks
    assert message in ended[0].text
    assert not any(rank.text for rank in ended[1:]) and not (tmp_path / "out").exists()


def test_without_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*KD, "teacher_processes=1", f"output_dir={tmp_path / 'out'}"])
    assert ended.value.code == 2
    assert "teacher_processes=1: needs more processes than that" in capsys.readouterr().err
