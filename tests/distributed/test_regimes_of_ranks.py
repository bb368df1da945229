"""Text that a model writes in training, on several processes: the same texts, sources and steps as on one."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from distributed_runs import HELD_OUT, check_same_change, check_same_rows, rows

PLAIN = ["optimizer=torch.optim.SGD", "optimizer.lr=3.0", "~lr_scheduler", "sample_prompts=[]", "save_every_n_steps=null",
         "max_steps_per_epoch=4", "run_val_every_n_steps=2", "rollouts.max_new_tokens=8", "batch_size=2"]  # fmt: skip
MORE = {"distillm": ["rollouts.policy.start=0.8", "rollouts.policy.replay=increasing", "rollouts.buffer_size=12"]}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        pytest.param("gkd", [], id="gkd"),
        pytest.param("distillm", [], id="distillm", marks=pytest.mark.slow("another regime through the same code")),
        pytest.param("on_policy", [], id="on_policy", marks=pytest.mark.slow("another regime through the same code")),
        pytest.param("distillm2", [], id="distillm2", marks=pytest.mark.slow("another regime through the same code")),
        pytest.param("distillm2", ["rollouts.policy.beside=dataset", "tokens_per_micro_batch=200"], id="beside the data",
                     marks=pytest.mark.slow("another regime through the same code")),
        pytest.param("seqkd", [], id="seqkd", marks=pytest.mark.slow("another regime through the same code")),
        pytest.param("gkd", ["tokens_per_micro_batch=200"], id="by tokens", marks=pytest.mark.slow("another layout of the same texts")),
        pytest.param("distillm", ["parallelism.dp_shard=1", "parallelism.dp_replicate=-1"], id="copies",
                     marks=pytest.mark.slow("copies in place of shards, which differ less")),
    ],
)  # fmt: skip
def test_one_process_and_two_make_the_same_steps(
    name: str, own: list[str], launch, small_model: Path, tmp_path: Path
) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    start = ["run", "knowledge_distillation", "--config", f"tiny/{name}", HELD_OUT, *PLAIN, *MORE.get(name, []), base]
    check_one_and_two(start, launch, small_model, tmp_path, own)


def check_one_and_two(start: list[str], launch, small_model: Path, tmp_path: Path, own: Sequence[str] = ()) -> None:
    for folder, ranks, accumulation in (("1", 1, 4), ("2", 2, 2)):
        more = own if ranks == 2 or "parallelism" not in "".join(own) else []
        ended = launch.kdtune(*start, *more, f"output_dir={tmp_path / folder}", f"gradient_accumulation_steps={accumulation}",
                              ranks=ranks)  # fmt: skip
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    ours, theirs = (
        [{key: value for key, value in row.items() if key != "generation_seconds"} for row in rows(tmp_path / folder)]
        for folder in ("2", "1")
    )
    check_same_rows(ours, theirs, tolerance=2e-5)
    assert any(row.get("rollout_share", 0.0) >= 0.5 for row in theirs)
    check_same_change(tmp_path / "2" / "final", tmp_path / "1" / "final", small_model)


@pytest.mark.slow("two processes for the gathering of shards alone; the quick tests write with vLLM in one")
def test_vllm_is_given_the_weights_of_all_processes(
    launch, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "unit" / "rollouts" / "fake_vllm"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    start = [
        "run",
        "knowledge_distillation",
        "--config",
        "tiny/on_policy",
        HELD_OUT,
        *PLAIN,
        base,
        "rollouts.temperature=0",
    ]
    writer = "rollouts.writer={_component_: kdtune.rollouts.VLLMWriter, sleeps: false}"
    for folder, ranks, own in (("1", 1, []), ("2", 2, [writer])):
        ended = launch.kdtune(
            *start, *own, f"output_dir={tmp_path / folder}", f"gradient_accumulation_steps={4 // ranks}", ranks=ranks
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    ours, theirs = (
        [{key: value for key, value in row.items() if key != "generation_seconds"} for row in rows(tmp_path / folder)]
        for folder in ("2", "1")
    )
    check_same_rows(ours, theirs, tolerance=2e-5)
    check_same_change(tmp_path / "2" / "final", tmp_path / "1" / "final", small_model)


@pytest.mark.slow("another data set in the loop of the tests above")
def test_prompts_alone_on_two_processes(launch, small_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} times {i * i}?"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    start = ["run", "knowledge_distillation", "--config", "tiny/on_policy", HELD_OUT, *PLAIN, base, "epochs=2",
             "dataset=kdtune.data.prompts_dataset", f"dataset.source={tmp_path / 'rows.jsonl'}"]  # fmt: skip
    check_one_and_two(start, launch, small_model, tmp_path)


@pytest.mark.slow("two processes, of which one has no text of a step that is learned from again")
def test_a_process_without_a_replayed_text(launch, small_model: Path, tmp_path: Path) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    start = ["run", "knowledge_distillation", "--config", "tiny/gkd", HELD_OUT, *PLAIN, base, "batch_size=2",
             "rollouts.policy.student=0.5", "rollouts.policy.replay=0.5", "rollouts.buffer_size=2"]  # fmt: skip
    check_one_and_two(start, launch, small_model, tmp_path)


@pytest.mark.slow("four processes for what the test above shows of one model")
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("minillm", []),
        ("minillm", ["rollouts.policy.mixed=0.5", "rollouts.policy.replay=0.5", "rollouts.buffer_size=12"]),
        ("speculative", []),
    ],
    ids=["minillm", "several passes", "speculative"],
)
def test_two_models_that_write_together(name: str, own: list[str], launch, small_model: Path, tmp_path: Path) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    start = ["run", "knowledge_distillation", "--config", f"tiny/{name}", HELD_OUT, *PLAIN, base, *own]
    copies = ["parallelism.dp_shard=1", "parallelism.dp_replicate=-1"]
    refused = launch.kdtune(*start, f"output_dir={tmp_path / 'none'}", ranks=2)
    assert {rank.code for rank in refused} == {2}
    assert "every process needs whole ones; parallelism.dp_shard=1" in refused[0].text
    for folder, ranks, accumulation in (("1", 1, 4), ("2", 2, 2)):
        ended = launch.kdtune(*start, *copies, f"output_dir={tmp_path / folder}", f"gradient_accumulation_steps={accumulation}",
                              ranks=ranks)  # fmt: skip
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    ours, theirs = (
        # A policy gradient's whitened advantages add up to about 0: the sum has the rounding of its terms.
        [
            {
                key: value
                for key, value in row.items()
                if key not in ("generation_seconds", "loss", "policy_gradient_loss")
            }
            for row in rows(tmp_path / folder)
        ]
        for folder in ("2", "1")
    )
    check_same_rows(ours, theirs, tolerance=2e-5)
    check_same_change(tmp_path / "2" / "final", tmp_path / "1" / "final", small_model)


@pytest.mark.slow("answers of two processes; one of a model in shards")
@pytest.mark.parametrize(
    "layout", [[], ["parallelism.dp_shard=-1", "parallelism.dp_replicate=1"]], ids=["copies", "shards"]
)
def test_two_processes_write_the_answers_of_one(layout: list[str], launch, tmp_path: Path) -> None:
    run = ["run", "write_answers", "--config", "tiny/write_answers", "prompts_per_file=5"]
    for name, ranks, own in (("one", 1, []), ("two", 2, layout)):
        ended = launch.kdtune(*run, *own, f"output_dir={tmp_path / name}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    for file in (tmp_path / "one").glob("answers*"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
