"""What is measured on several processes is what one measures, whether each holds the model or a part of it."""

import json
import os
from pathlib import Path

import lm_eval.evaluator  # noqa: F401  here, so that not every forked process imports it
import pytest
import torch
from distributed_runs import EVALUATE, GENERATE
from evaluation_tasks import write_task, write_tasks

from kdtune import distributed, parallel
from kdtune._cli.main import main
from kdtune.checkpoint import load_model
from kdtune.distributed import is_sharded
from kdtune.evaluation import score
from kdtune.generation import Sampling, generate_batch

SHARDED = ["parallelism.dp_shard=-1", "parallelism.dp_replicate=1"]
LAYOUTS = {
    "1": (1, []),
    "2": (2, []),
    "3 sharded": (3, SHARDED),
    "2 by 2, cut": (4, ["parallelism.tp=2", "teacher_parallelism=kdtune.distributed.Parallelism"]),
    "4, 2 shards of 2 copies, the teacher a copy on each": (
        4,
        ["parallelism.dp_shard=2", "teacher_parallelism=kdtune.distributed.Parallelism", "teacher_parallelism.dp_shard=1",
         "teacher_parallelism.dp_replicate=-1"],
    ),
}  # fmt: skip
# Documents in the order of a set of texts, which differs from process to process as hashes do, each with what it is.
BY_CHANCE = """
output_type: multiple_choice
process_docs: !function chance.shuffled
doc_to_text: "Long ago, the {{thing}}"
doc_to_target: label
doc_to_choice: endings
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SHUFFLED = """
import os, random

def shuffled(dataset):
    rank = int(os.environ["RANK"])
    return dataset.select(random.Random(rank).sample(range(len(dataset)), len(dataset)))
"""


def measure_all(folder: Path, model: Path) -> list[str]:
    """The arguments that measure everything there is to measure."""
    write_tasks(folder / "tasks", 10)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is"} for n in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "story.txt").write_text("Once there was a lamp. " * 200)
    answers = (
        f"name: drawn, source: {folder}/rows.jsonl, max_new_tokens: 9, prompt: plain, temperature: 1.0, seeds: [1, 2]"
    )
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {model}}}"
    return [
        *EVALUATE, base, "~model", f"include_path={folder / 'tasks'}", "log_samples=true", "num_fewshot=1", "batch_size=2",
        "tasks=[own_endings,own_letters,own_texts,own_answers]", f"perplexity_files=[{folder}/story.txt]",
        f"rouge=[{{_component_: kdtune.evaluation.InstructionSet, {answers}}}]", "dataset_val.split=test[:9]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["1", "2 by 2, cut"], id="both cut"),
        pytest.param(
            list(LAYOUTS), id="every layout", marks=pytest.mark.slow("14 processes that measure everything there is")
        ),
    ],
)
def test_everything_that_one_process_measures(names: list[str], launch, loud_model: Path, tmp_path: Path) -> None:
    command = measure_all(tmp_path, loud_model)
    found = {}
    for name in names:
        (ranks, layout), out = LAYOUTS[name], tmp_path / name
        ended = launch.kdtune(*command, *layout, f"output_dir={out}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, "\n".join(rank.text for rank in ended)
        assert not any(rank.text for rank in ended[1:]), ended[1].text
        assert ended[0].text.count("results: ") == 1
        assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "results.json", "run.json", "samples"]
        found[name] = json.loads((out / "results.json").read_text())["metrics"]
        for file in (out / "samples").iterdir():
            expected = (tmp_path / "1" / "samples" / file.name).read_text().splitlines()
            for mine, line in zip(file.read_text().splitlines(), expected, strict=True):
                check_same(json.loads(mine), json.loads(line))
        check_same(found[name], found["1"])
    answers = [
        json.loads(line)["answer"] for line in (tmp_path / "1/samples/rouge_drawn.jsonl").read_text().splitlines()
    ]
    assert len(found["1"]) > 20 and len(answers) == 14 and len(set(answers)) > 7
    assert {"own_answers/exact_match", "held_out/agreement", "perplexity/story"} <= found["1"].keys()


def check_same(mine: object, theirs: object) -> None:
    """Texts and counts are equal, numbers to 1e-6, at any depth."""
    if isinstance(theirs, dict):
        assert isinstance(mine, dict) and mine.keys() == theirs.keys()
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(theirs, list):
        assert isinstance(mine, list)
        for one, other in zip(mine, theirs, strict=True):
            check_same(one, other)
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-6)
    else:
        assert mine == theirs


def test_documents_that_each_process_has_in_another_order(launch, loud_model: Path, tmp_path: Path) -> None:
    """The requests of the main process count: every one of its documents gets its own scores."""
    folder = write_tasks(tmp_path / "tasks", 12)
    write_task(folder, "own_chance", BY_CHANCE)
    (folder / "chance.py").write_text(SHUFFLED)
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {loud_model}}}"
    command = [*EVALUATE, base, "~model", "~teacher_model", "~dataset_val", f"include_path={folder}", "tasks=[own_chance]",
               "log_samples=true", "batch_size=1"]  # fmt: skip
    for ranks in (1, 3):
        ended = launch.kdtune(*command, f"output_dir={tmp_path / str(ranks)}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    one, three = (json.loads((tmp_path / name / "results.json").read_text())["metrics"] for name in ("1", "3"))
    assert three == pytest.approx(one, rel=1e-6)
    answers = [(tmp_path / name / "samples" / "own_chance.jsonl").read_text().splitlines() for name in ("1", "3")]
    assert len(answers[0]) == 12
    for mine, line in zip(*answers, strict=True):
        check_same(json.loads(mine), json.loads(line))


def share_unequally(model_folder: Path, sharded: bool) -> None:
    """Items that take a process one forward, another ten, another none; each is done once, by the process whose turn it is."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    whole = load_model(model_folder).eval()
    items = [[5, 6, 7], [8], *([[9, 10]] * (size * 16 - 3)), [11, 12]]
    settings = {"stop_ids": (), "sampling": Sampling(1.0)}
    with distributed.start_world(torch.device("cpu")) as world:
        model = load_model(model_folder).requires_grad_(False)
        if sharded:
            parallel.shard_model(model, distributed.Parallelism(), world)
        mine, rounds = [], []

        def answer(prompt: list[int]) -> tuple[int, list[int]]:
            mine.append(prompt)
            (ids,) = generate_batch(model, [prompt], max_new_tokens=len(prompt) ** 2, **settings)
            return rank, ids

        found = distributed.parallel_map(answer, items, model, world, on_done=rounds.append)
        assert [owner for owner, _ in found] == [index % size for index in range(len(items))]
        assert mine == items[rank::size] and [item for one in rounds for item in one] == items
        for prompt, (_, ids) in zip(items, found, strict=True):
            assert [ids] == generate_batch(whole, [prompt], max_new_tokens=len(prompt) ** 2, **settings)
        assert is_sharded(model.layers.parameters()) == sharded
        # Fewer items than processes, and none.
        pairs = [([1, 2], [3, 4])]
        (mine,), (theirs,) = (
            score(model, pairs, max_length=64, batch_tokens=64, world=world),
            score(whole, pairs, max_length=64, batch_tokens=64),
        )
        assert mine == pytest.approx(theirs, rel=1e-6)
        assert distributed.parallel_map(answer, [], model, world) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_shares_that_are_not_alike(sharded: bool, launch, loud_model: Path) -> None:
    launch.call(share_unequally, loud_model, sharded, ranks=3)


def test_what_is_refused(launch, tmp_path: Path) -> None:
    for override, message in (
        ("parallelism.dp_replicate=2", "parallelism: dp_replicate=2 dp_shard=1 tp=1: needs 2 processes, found 3"),
        ("parallelism.dp_shard=-1", "parallelism: dp_replicate=-1 dp_shard=-1 tp=1: only one of them may be -1"),
    ):
        ended = launch.kdtune(*EVALUATE, override, f"output_dir={tmp_path / 'out'}", ranks=3)
        assert [rank.code for rank in ended] == [2, 2, 2]
        assert message in ended[0].text and not ended[1].text and not (tmp_path / "out").exists()


def test_the_name_for_several_processes(launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "eleuther_eval_distributed", *EVALUATE[2:], f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert (
        stopped.value.code == 2 and "eleuther_eval_distributed ..., or use eleuther_eval\n" in capsys.readouterr().err
    )
    ended = launch.kdtune(*command, ranks=2)
    assert [rank.code for rank in ended] == [0, 0] and (tmp_path / "out" / "results.json").exists()


def test_answers_to_many_prompts_and_to_one(launch, loud_model: Path, tmp_path: Path) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {loud_model}}}"
    many = ["prompt=null", f"prompts=[{', '.join('Go on' + ' and on' * n for n in range(5))}]", "batch_size=2"]
    command = [*GENERATE, base, "~model", "max_new_tokens=8"]
    texts = {}
    for ranks, layout in ((1, []), (2, ["dtype=null"]), (3, SHARDED), (4, [*SHARDED, "parallelism.tp=2"])):
        file = tmp_path / f"{ranks}.jsonl"
        ended = launch.kdtune(*command, *many, *layout, f"output_file={file}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
        assert ended[0].text.count("wrote") == 1 and not any(rank.text for rank in ended[1:])
        assert file.read_text() == (tmp_path / "1.jsonl").read_text()
        ended = launch.kdtune(*command, *layout, ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks and not any(rank.text for rank in ended[1:])
        texts[ranks] = ended[0].text.rpartition(" tokens in ")[0]
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 5
    assert texts[1] and texts[1] == texts[2] == texts[3] == texts[4]
    for layout in (SHARDED, ["parallelism.param_dtype=bf16"]):
        ended = launch.kdtune(*command, *layout, "dtype=null", ranks=2)
        assert [rank.code for rank in ended] == [2, 2]
        assert "dtype=null: parallelism.dp_shard or tp above 1, cpu_offload and param_dtype need one" in ended[0].text
