import importlib.util

import pytest
from evaluation_tasks import FILES, write_task, write_tasks
from lm_eval.models.utils import normalize_gen_kwargs

from kdtune.errors import ConfigError, DataError
from kdtune.evaluation import flat_metrics, load_tasks, results_rows, task_problems
from kdtune.evaluation.generation_settings import StopStrings, cut_at_stops, read_generation_settings
from kdtune.tokenizers import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    return write_tasks(tmp_path / "tasks")


def test_a_good_folder_has_no_problems_and_loads(folder):
    names = [f"own_{name}" for name in FILES]
    assert task_problems(names, str(folder)) == []
    assert [task.task_name for task in load_tasks(names, str(folder))] == names


def test_groups_and_task_files_by_path(folder):
    (folder / "both.yaml").write_text("group: own_group\ntask: [own_endings, own_letters]\n")
    (group,) = load_tasks(["own_group"], str(folder))
    assert sorted(task.task_name for task in group.get_all_tasks()) == ["own_endings", "own_letters"]
    (task,) = load_tasks([str(folder / "own_texts.yaml")], str(folder))
    assert task.task_name == "own_texts"


@pytest.mark.slow("reads lm-eval's 14,000 task files; tests/recipes asks for an unknown task once")
def test_an_unknown_task_is_named_with_the_nearest_and_where_it_was_looked_for(folder):
    (problem,) = task_problems(["own_ending"], str(folder))
    assert "'own_ending'" in problem and "'own_endings'" in problem and str(folder) in problem
    with pytest.raises(ConfigError, match="own_ending"):
        load_tasks(["own_ending"], str(folder))
    (problem,) = task_problems(["own_endings"], str(folder / "nowhere"))
    assert "include_path" in problem and "no such folder" in problem


@pytest.mark.slow("reads lm-eval's 14,000 task files once more, without a folder of one's own")
def test_an_unknown_task_of_lm_evals_own():
    (problem,) = task_problems(["hellaswagg"], None)
    assert "hellaswag" in problem and "lm-eval's own tasks" in problem


def test_without_the_extra_the_install_command_is_named(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    (problem,) = task_problems(["own_endings"], str(folder))
    assert "pip install 'lm-eval>=0.4.13'" in problem and problem.startswith("tasks:")
    assert task_problems([], None) == []


def test_a_missing_split_is_named(folder):
    write_task(folder, "own_other", FILES["endings"], split="validation")
    write_task(folder, "own_shots", FILES["letters"].replace("fewshot_split: examples", "fewshot_split: train"))
    with pytest.raises(DataError, match=r"own_other: needs the split 'validation' \(test_split\)"):
        load_tasks(["own_other"], str(folder))
    with pytest.raises(DataError, match=r"own_shots: needs the split 'train' \(fewshot_split\)"):
        load_tasks(["own_shots"], str(folder), num_fewshot=2)


def test_an_empty_or_missing_dataset(folder):
    (folder / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="own_endings"):
        load_tasks(["own_endings"], str(folder))
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"own_endings.*test\.jsonl"):
        load_tasks(["own_endings"], str(folder))


@pytest.mark.slow("reads lm-eval's 14,000 task files")
def test_a_hub_task_offline_says_so():
    with pytest.raises(DataError, match=r"hellaswag: .*the hub cannot be reached.*include_path"):
        load_tasks(["hellaswag"])


def test_more_examples_than_there_are(folder):
    load_tasks(["own_letters"], str(folder), num_fewshot=5)
    with pytest.raises(DataError, match="num_fewshot=6 needs more than 6 examples.*has 6"):
        load_tasks(["own_letters"], str(folder), num_fewshot=6)


def test_generation_settings_that_have_no_function(folder):
    write_task(folder, "own_beams", FILES["answers"].replace("do_sample: false", "num_beams: 4"))
    with pytest.raises(ConfigError, match=r"own_beams: generation_kwargs\.num_beams: has no function"):
        load_tasks(["own_beams"], str(folder))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"until": "\n"},
        {"until": ["a", "b"], "max_gen_toks": 7},
        {"max_new_tokens": 5, "do_sample": False, "temperature": 0.7},
        {"temperature": 0.5, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.8},
    ],
)
def test_generation_settings_are_lm_evals(given):
    ours, theirs = read_generation_settings(given), normalize_gen_kwargs(given)
    assert list(ours.until) == theirs["until"] and ours.max_new_tokens == theirs["max_gen_toks"]
    assert ours.sampling.top_p == given.get("top_p")
    assert ours.sampling.temperature == (theirs.get("temperature", 0.0) if theirs["do_sample"] else 0.0)


def test_stop_strings():
    tokenizer = byte_tokenizer()
    stops = StopStrings(tokenizer, ["ö!", "", "<|im_end|>"])
    ids = tokenizer.encode("so schön ö", add_bos=False, add_eos=False)
    assert not any(stops(0, ids[: i + 1]) for i in range(len(ids)))
    assert stops(0, [*ids, *tokenizer.encode("!", add_bos=False, add_eos=False)])
    assert stops(0, [*ids, tokenizer.eos_id])
    assert not StopStrings(tokenizer, [])(0, ids)
    assert cut_at_stops("one; two. three", [".", "", ";"]) == "one"


def test_flat_metrics_and_rows():
    values = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    results = {"results": {"t": values}, "n-shot": {"t": 3}}
    assert flat_metrics(results) == {"t/acc": 0.5, "t/acc_stderr": 0.1, "t/em,strict": 0.25}
    assert results_rows(results) == [
        {"task": "t", "shots": 3, "metric": "acc", "value": 0.5, "± stderr": 0.1},
        {"task": "t", "shots": 3, "metric": "em (strict)", "value": 0.25, "± stderr": None},
    ]
