"""The first row of a config's datasets: what is missing is told as what to type."""

import csv
import json
import shlex
from dataclasses import dataclass, field
from typing import Any

import pytest
from datasets import Dataset as HFDataset

from kdtune import config
from kdtune.config.load import parse_value
from kdtune.config.overrides import apply_overrides
from kdtune.data import alpaca_dataset, dataset_nodes, first_row_problems
from kdtune.errors import DataError


@dataclass(kw_only=True)
class Config:
    dataset: Any = config.component("tokenizer", default=None)
    dataset_val: Any = config.component("tokenizer", default=None)
    other: dict[str, Any] = field(default_factory=dict)


def node(builder: str, source: str, **settings: Any) -> dict[str, Any]:
    return {"_component_": f"kdtune.data.{builder}_dataset", "source": source, **settings}


ROWS = {
    "a known pair": ("alpaca", {"prompt": "p", "response": "r"}, "'dataset.column_map={instruction: prompt, output: response}'"),
    "with context": (
        "alpaca",
        {"question": "p", "context": "c", "answer": "a"},
        "'dataset.column_map={instruction: question, output: answer, input: context}'",
    ),
    "any two texts": ("instruct", {"n": 3, "frage": "f", "antwort": "a"}, "'dataset.column_map={input: frage, output: antwort}'"),
    "capitals, blanks": ("instruct", {"Question": "q", "my answer": "a"}, "'dataset.column_map={input: Question, output: \"my answer\"}'"),
    "one known of two": ("instruct", {"story": "q", "summary": "a"}, "'dataset.column_map={input: story, output: summary}'"),
    "sharegpt": (
        "chat",
        {"id": 1, "conversations": [{"from": "human", "value": "x"}]},
        "dataset.conversation_column=conversations dataset.conversation_style=sharegpt",
    ),
    "another column": (
        "chat",
        {"chat": json.dumps([{"role": "user", "content": "x"}])},
        "dataset.conversation_column=chat dataset.conversation_style=openai",
    ),
    "a pair for chat": (
        "chat",
        {"prompt": "p", "completion": "c"},
        "dataset._component_=kdtune.data.instruct_dataset 'dataset.column_map={input: prompt, output: completion}'",
    ),
    "a chat for a pair": (
        "instruct",
        {"messages": [{"role": "user", "content": "x"}]},
        "dataset._component_=kdtune.data.chat_dataset dataset.conversation_column=messages dataset.conversation_style=openai",
    ),
    "text": ("text_completion", {"id": "1", "body": "longer"}, "dataset.column=body"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_column_is_told_with_what_to_type(name, jsonl):
    builder, row, typed = ROWS[name]
    made = node(builder, jsonl([row, {"nothing": 1}]))
    (problem,) = first_row_problems(Config(dataset=made))
    assert problem.startswith("dataset: ") and "row 1: column " in problem and f"; set {typed}" in problem
    # What is to be typed works: with these overrides the first row can be read.
    changed, problems = apply_overrides(
        {"dataset": made}, shlex.split(typed), defaults={}, component_keys={"dataset"}, parse_value=parse_value
    )
    assert not problems and first_row_problems(Config(dataset=changed["dataset"])) == []


def test_columns_that_cannot_be_guessed(jsonl):
    (problem,) = first_row_problems(Config(dataset_val=node("alpaca", jsonl([{"a": "x", "b": "y", "c": "z"}]))))
    assert problem.startswith("dataset_val: ") and "found: a, b, c; name the columns in the dataset's config" in problem


def test_the_style_of_turns_is_told(jsonl):
    source = jsonl([{"messages": [{"from": "human", "value": "x"}]}])
    (problem,) = first_row_problems(Config(dataset=node("chat", source)))
    assert "found keys from, value; set conversation_style=sharegpt" in problem


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_looked_at_too(tmp_path, kind):
    file, rows = tmp_path / f"rows.{kind}", [{"prompt": "p", "response": "r"}] * 3
    if kind == "csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        HFDataset.from_list(rows).to_parquet(file)
    made = node("alpaca", str(file), split="train[50%:]", streaming=False)
    (problem,) = first_row_problems(Config(dataset=made))
    assert "'dataset.column_map={instruction: prompt, output: response}'" in problem


def test_mixtures_are_looked_at_one_by_one(jsonl):
    good, bad = jsonl([{"input": "a", "output": "b"}], "good.jsonl"), jsonl([{"q": "a", "a": "b"}], "bad.jsonl")
    mixed = {"_component_": "kdtune.data.mixed_dataset", "weights": [1, 1]}
    cfg = Config(dataset={**mixed, "datasets": [node("instruct", good), node("instruct", bad)]})
    assert [key for key, _ in dataset_nodes(cfg)] == ["dataset.datasets.0", "dataset.datasets.1"]
    (problem,) = first_row_problems(cfg)
    assert "'dataset.datasets.1.column_map={input: q, output: a}'" in problem


def test_what_is_elsewhere_is_left_alone(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("a hub dataset was asked for"))
    for source in ("tatsu-lab/alpaca", str(tmp_path / "gone.jsonl"), f"{tmp_path}/gone"):
        assert first_row_problems(Config(dataset=node("alpaca", source))) == []
    own = {"_component_": "collections.OrderedDict", "source": str(tmp_path)}
    assert first_row_problems(Config(dataset=own, other={"x": 1})) == []


@pytest.mark.parametrize("name", ["kdtune.data.prompts_dataset", "kdtune.data.prompts.prompts_dataset"])
def test_prompts_alone_are_known_by_every_name(name, jsonl):
    cfg = Config(dataset={"_component_": name, "source": jsonl([{"prompt": "a"}])})
    (problem,) = first_row_problems(cfg)
    assert problem.startswith(f"dataset: {name} has no answers")
    assert first_row_problems(cfg, prompts_alone=["dataset"]) == []


def test_other_problems_of_the_first_row(jsonl):
    source = jsonl([{"instruction": "i", "output": 3}])
    cfg = Config(
        dataset=node("alpaca", source), dataset_val=node("alpaca", source, train_on="last", train_on_input=True)
    )
    assert ["must hold text: found int" in first_row_problems(cfg)[0], "contradict" in first_row_problems(cfg)[1]] == [
        True,
        True,
    ]


def test_a_dataset_itself_says_it_too(tokenizer, jsonl):
    with pytest.raises(
        DataError, match=r"row 1: column 'instruction' is missing; .*; set 'column_map=\{instruction: q"
    ):
        alpaca_dataset(tokenizer, source=jsonl([{"q": "a", "answer": "b"}]))
