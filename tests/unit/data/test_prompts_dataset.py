"""Prompts alone: the beginning of what the builders with answers make of the same rows, and nothing that is trained on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdtune.constants import IGNORE_INDEX
from kdtune.data import (
    Dataset,
    TokenizerPair,
    alpaca_dataset,
    chat_dataset,
    instruct_dataset,
    mixed_dataset,
    prompts_dataset,
)
from kdtune.data.columns import MissingColumnError
from kdtune.data.tokenized_cache import tokenized_cache
from kdtune.distributed import SINGLE_PROCESS
from kdtune.errors import ConfigError, DataError
from kdtune.tokenizers import byte_tokenizer
from kdtune.training import check_data

TOKENIZER = byte_tokenizer(max_seq_len=400)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def prompts(dataset: Dataset) -> list[list[int]]:
    examples = list(dataset.examples(seed=0, epoch=0, shuffle=False))
    assert all((one.labels == IGNORE_INDEX).all() and one.prompt_length == len(one.tokens) for one in examples)
    return [one.tokens.tolist() for one in examples]


def beginnings(dataset: Dataset) -> list[list[int]]:
    examples = dataset.examples(seed=0, epoch=0, shuffle=False)
    return [one.tokens[: one.prompt_length].tolist() for one in examples]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_is_what_an_answer_of_the_same_row_comes_after(tmp_path: Path, streaming: bool) -> None:
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    source = write(tmp_path, rows)
    found = prompts_dataset(TOKENIZER, source=source, streaming=streaming)
    with_answers = instruct_dataset(TOKENIZER, source=source, column_map={"input": "prompt", "output": "answer"})
    assert prompts(found) == beginnings(with_answers)
    assert TOKENIZER.decode(prompts(found)[1], skip_special=False) == (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.is_prompts and found.is_chat and not with_answers.is_prompts


def test_a_system_prompt_and_what_belongs_to_a_question(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"instruction": "Sing.", "input": None, "output": "la"},
    ]
    source = write(tmp_path, rows)
    asked = {"source": source, "column": "instruction", "input_column": "input"}
    assert prompts(prompts_dataset(TOKENIZER, prompt="alpaca", **asked)) == beginnings(
        alpaca_dataset(TOKENIZER, source=source, train_on="answers")
    )
    (first, second) = prompts(prompts_dataset(TOKENIZER, new_system_prompt="Be brief.", **asked))
    assert TOKENIZER.decode(first, skip_special=True).split("\n", 1)[1].startswith("Be brief.")
    assert "Sort.\n\nb a" in TOKENIZER.decode(first) and TOKENIZER.decode(second).count("\n\n") == 0


def test_conversations_end_before_an_answer(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."},
             {"role": "user", "content": "Three?"}]  # fmt: skip
    answered = [*turns, {"role": "assistant", "content": "Four."}]
    found = prompts_dataset(TOKENIZER, source=write(tmp_path, [{"messages": turns}]), column="messages")
    source = write(tmp_path, [{"messages": answered}], "answered.jsonl")
    assert prompts(found) == beginnings(chat_dataset(TOKENIZER, source=source, train_on="last"))
    with pytest.raises(
        DataError, match=r"row 1: column 'messages': the conversation ends with the assistant's turn.*chat_dataset"
    ):
        prompts_dataset(TOKENIZER, source=source, column="messages")
    (replaced,) = prompts(
        prompts_dataset(
            TOKENIZER, source=write(tmp_path, [{"messages": turns}]), column="messages", new_system_prompt="Ho."
        )
    )
    assert "Hm." not in TOKENIZER.decode(replaced) and "Ho." in TOKENIZER.decode(replaced)
    shares = [{"conversations": [{"from": "human", "value": "One?"}]}]
    found = prompts_dataset(
        TOKENIZER, source=write(tmp_path, shares), column="conversations", conversation_style="sharegpt"
    )
    assert "One?" in TOKENIZER.decode(prompts(found)[0])


def test_a_conversation_of_the_system_alone_is_no_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "One?"}, {"role": "system", "content": "Hm."}]
    for given in (turns, turns[1:]):
        with pytest.raises(DataError, match=r"row 1: column 'messages': the conversation ends with the system's turn"):
            prompts_dataset(TOKENIZER, source=write(tmp_path, [{"messages": given}]), column="messages")


@pytest.mark.parametrize("key", ["dataset", "dataset_val"])
def test_what_has_no_answers_is_refused_whoever_built_it(key: str, tmp_path: Path) -> None:
    made = prompts_dataset(TOKENIZER, source=write(tmp_path, [{"prompt": "a"}]))
    cfg = SimpleNamespace(**{key: {"_component_": "mine.built"}})
    with pytest.raises(ConfigError, match=f"{key}: mine.built has no answers, and they are needed here"):
        check_data(cfg, {key: made}, SINGLE_PROCESS, TOKENIZER, prompts_alone=() if key == "dataset" else ["dataset"])


def test_a_prompt_that_leaves_no_room_is_left_out(tmp_path: Path) -> None:
    (length,) = map(len, prompts(prompts_dataset(TOKENIZER, source=write(tmp_path, [{"prompt": "Twelve chars"}]))))
    rows = [{"prompt": "Twelve chars"}, {"prompt": "short"}]
    for room, kept in ((length, 1), (length + 1, 2)):
        found = prompts_dataset(byte_tokenizer(max_seq_len=room), source=write(tmp_path, rows))
        assert (found.report.examples, found.report.too_long) == (kept, 2 - kept)
    with pytest.raises(DataError, match="nothing to train on"):
        prompts_dataset(byte_tokenizer(max_seq_len=10), source=write(tmp_path, rows))


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"instruction": "a", "input": "b"}, {"column": "instruction", "input_column": "input"}),
        ({"question": "a"}, {"column": "question"}),
        ({"messages": [{"from": "human", "value": "a"}]}, {"column": "messages", "conversation_style": "sharegpt"}),
    ],
)
def test_the_columns_that_fit_are_named(row: dict[str, Any], settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(MissingColumnError, match="column 'prompt' is missing") as found:
        prompts_dataset(TOKENIZER, source=write(tmp_path, [row]))
    assert found.value.settings == settings
    assert len(prompts_dataset(TOKENIZER, source=write(tmp_path, [row]), **settings)) == 1


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "a", "more": 3}])
    with pytest.raises(DataError, match=r"column 'more' must hold text, or null: found int"):
        prompts_dataset(TOKENIZER, source=source, input_column="more")
    with pytest.raises(ConfigError, match="prompt=poem; allowed are alpaca, plain"):
        prompts_dataset(TOKENIZER, source=source, prompt="poem")
    with pytest.raises(ConfigError, match="conversation_style=x: unknown"):
        prompts_dataset(TOKENIZER, source=source, conversation_style="x")
    with pytest.raises(ConfigError, match="prompts_dataset: a teacher with another tokenizer"):
        prompts_dataset(TokenizerPair(TOKENIZER, TOKENIZER), source=source)


def test_mixtures_and_the_cache_keep_them(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": f"number {i}"} for i in range(1000)])
    node = {"_component_": "kdtune.data.prompts_dataset", "source": source}
    for _ in range(2):
        with tokenized_cache(tmp_path / "cache", node, TOKENIZER):
            found = prompts_dataset(TOKENIZER, source=source)
        assert found.is_prompts and len(prompts(found)) == 1000
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for streaming in (False, True):
        mixed = mixed_dataset(TOKENIZER, datasets=[node, {**node, "streaming": streaming}], weights=[1, 1])
        assert mixed.is_prompts
