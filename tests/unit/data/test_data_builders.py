import json
import logging
from pathlib import Path

import pytest
from word_tokenizer import ASSISTANT, BOS, END, EOS, SYSTEM, USER, WordTokenizer

import kdtune
from kdtune.constants import IGNORE_INDEX as I
from kdtune.data import (
    alpaca_cleaned_dataset,
    alpaca_dataset,
    alpaca_prompt,
    batches,
    chat_dataset,
    instruct_dataset,
    quickstart_dataset,
    text_completion_dataset,
)
from kdtune.errors import ConfigError, DataError
from kdtune.log import get_logger


def keep_short(row):
    return len(row["output"]) < 4


def test_prompt_wording():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Say {x}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {x}.\n\n### Response:\n"
    )


@pytest.mark.parametrize("builder", [alpaca_dataset, alpaca_cleaned_dataset])
@pytest.mark.parametrize("train_on_input", [True, False])
def test_alpaca_labels(tokenizer, jsonl, builder, train_on_input):
    source = jsonl([{"instruction": "i", "input": "", "output": "x y"}])
    (example,) = builder(tokenizer, source=source, train_on_input=train_on_input).examples(
        seed=0, epoch=0, shuffle=False
    )
    prompt = [tokenizer.words[word] for word in alpaca_prompt("i").split()]
    x, y = tokenizer.words["x"], tokenizer.words["y"]
    assert example.tokens.tolist() == [BOS, USER, *prompt, END, ASSISTANT, x, y, END]
    if train_on_input:
        assert example.labels.tolist() == [USER, *prompt, END, ASSISTANT, x, y, END, I]
    else:
        assert example.labels.tolist() == [I] * (len(prompt) + 3) + [x, y, END, I]


def test_alpaca_trains_on_the_input_unless_told(tokenizer, jsonl):
    source = jsonl([{"instruction": "i", "output": "x"}])
    assert alpaca_dataset(tokenizer, source=source)[0].labels[0] == USER


def test_alpaca_input_may_be_null_or_missing(tokenizer, jsonl):
    rows = [{"instruction": "i", "output": "x"}, {"instruction": "i", "input": None, "output": "x"}]
    dataset = alpaca_dataset(tokenizer, source=jsonl(rows))
    assert dataset[0].tokens.tolist() == dataset[1].tokens.tolist()
    with_input = alpaca_dataset(tokenizer, source=jsonl([{"instruction": "i", "input": "q", "output": "x"}], "b.jsonl"))
    assert tokenizer.words["q"] in with_input[0].tokens


def test_column_map_is_ours_to_theirs(tokenizer, jsonl):
    plain = alpaca_dataset(tokenizer, source=jsonl([{"instruction": "i", "input": "q", "output": "x"}]))
    source = jsonl([{"ask": "i", "with": "q", "answer": "x"}], "mapped.jsonl")
    columns = {"instruction": "ask", "input": "with", "output": "answer"}
    mapped = alpaca_dataset(tokenizer, source=source, column_map=columns)
    assert mapped[0].tokens.tolist() == plain[0].tokens.tolist()


@pytest.mark.parametrize(
    ("row", "column_map", "message"),
    [
        ({"instruction": "i", "answer": "x"}, None, r"row 1: column 'output' is missing; found: instruction, answer"),
        ({"instruction": "i", "output": "x"}, {"input": "ctx"}, r"column 'ctx' is missing; found: instruction, output"),
        (
            {"instruction": "i", "output": 42},
            None,
            r"rows.jsonl \(train\): row 1: column 'output' must hold text: found int",
        ),
        ({"instruction": "i", "output": None}, None, "column 'output' must hold text: found null"),
        ({"instruction": "i", "input": ["q"], "output": "x"}, None, "column 'input' must hold text: found list"),
    ],
)
def test_bad_rows_are_named(tokenizer, jsonl, row, column_map, message):
    with pytest.raises(DataError, match=message):
        alpaca_dataset(tokenizer, source=jsonl([row]), column_map=column_map)


def test_unknown_column_map_key(tokenizer):
    with pytest.raises(ConfigError, match="column_map: unknown column 'outptu'; allowed: instruction, input, output"):
        alpaca_dataset(tokenizer, source="nowhere", column_map={"outptu": "a"})


@pytest.mark.parametrize("filter_fn", [keep_short, f"{__name__}.keep_short"])
def test_filter(tokenizer, jsonl, filter_fn):
    rows = [{"instruction": "i", "output": output} for output in ("long one", "no", "yes", "longer")]
    dataset = alpaca_dataset(tokenizer, source=jsonl(rows), filter_fn=filter_fn)
    assert (len(dataset), dataset.report.rows, dataset.report.filtered) == (2, 4, 2)
    assert tokenizer.words["no"] in dataset[0].tokens


def test_filter_must_answer_true_or_false(tokenizer, jsonl):
    with pytest.raises(DataError, match="filter_fn must return true or false: found str"):
        alpaca_dataset(
            tokenizer, source=jsonl([{"instruction": "i", "output": "x"}]), filter_fn=lambda row: row["output"]
        )


def test_unknown_filter(tokenizer):
    with pytest.raises(ConfigError, match="no_such_function"):
        alpaca_dataset(tokenizer, source="nowhere", filter_fn="os.path.no_such_function")


def test_instruct(tokenizer, jsonl):
    source = jsonl([{"q": "a b", "output": "x"}])
    dataset = instruct_dataset(tokenizer, source=source, column_map={"input": "q"}, new_system_prompt="s")
    a, b, x, s = (tokenizer.words[word] for word in "abxs")
    assert dataset[0].tokens.tolist() == [BOS, SYSTEM, s, END, USER, a, b, END, ASSISTANT, x, END]
    assert dataset[0].labels.tolist() == [I] * 8 + [x, END, I]


def test_chat_trains_on_unmasked_assistant_turns(tokenizer, jsonl):
    turns = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x", "masked": True},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "y"},
    ]
    dataset = chat_dataset(tokenizer, source=jsonl([{"messages": turns}]), new_system_prompt="new")
    a, x, b, y, new = (tokenizer.words[word] for word in ("a", "x", "b", "y", "new"))
    ids = [BOS, SYSTEM, new, END, USER, a, END, ASSISTANT, x, END, USER, b, END, ASSISTANT, y, END]
    assert dataset[0].tokens.tolist() == ids
    assert dataset[0].labels.tolist() == [I] * 13 + [y, END, I]


def test_chat_sharegpt_column_and_style(tokenizer, jsonl):
    source = jsonl([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]}])
    dataset = chat_dataset(tokenizer, source=source, conversation_column="conversations", conversation_style="sharegpt")
    assert dataset[0].labels.tolist()[-3:] == [tokenizer.words["x"], END, I]
    with pytest.raises(ConfigError, match="conversation_style=vicuna: unknown; allowed: openai, sharegpt"):
        chat_dataset(tokenizer, source=source, conversation_style="vicuna")
    with pytest.raises(DataError, match="row 1: column 'messages' is missing; found: conversations"):
        chat_dataset(tokenizer, source=source)


@pytest.mark.parametrize("add_eos", [True, False])
def test_text_completion(tokenizer, tmp_path, add_eos):
    (tmp_path / "lines.txt").write_text("a b\n\nc d\n")
    dataset = text_completion_dataset(tokenizer, source=str(tmp_path / "lines.txt"), add_eos=add_eos)
    assert (dataset.report.rows, dataset.report.untrainable, len(dataset)) == (3, 1, 2)
    a, b = tokenizer.words["a"], tokenizer.words["b"]
    assert dataset[0].tokens.tolist() == [BOS, a, b] + [EOS] * add_eos
    assert dataset[0].labels.tolist() == [a, b] + [EOS] * add_eos + [I]


def test_text_completion_without_bos_where_transformers_puts_none(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "begins_with_bos", False)
    (tmp_path / "lines.txt").write_text("a b\n")
    assert text_completion_dataset(tokenizer, source=str(tmp_path / "lines.txt"))[0].tokens[0] == tokenizer.words["a"]


def test_untrainable_rows_are_left_out_and_reported(jsonl, caplog, monkeypatch):
    tokenizer = WordTokenizer(max_seq_len=6)
    rows = [{"input": "a", "output": "x"}, {"input": "a b c d e", "output": "x"}, {"input": "a", "output": "x y z"}]
    source = jsonl(rows)
    monkeypatch.setattr(get_logger(), "propagate", True)
    with caplog.at_level(logging.INFO, logger="kdtune"):
        dataset = instruct_dataset(tokenizer, source=source, truncation="right")
    report = dataset.report
    assert (len(dataset), report.examples, report.rows, report.truncated, report.untrainable) == (2, 2, 3, 3, 1)
    assert dataset[1].tokens.tolist() == [BOS, USER, tokenizer.words["a"], END, ASSISTANT, END]
    assert "rows.jsonl (train): 2 examples from 3 rows, 3 truncated" in caplog.text
    assert "1 left out" in caplog.text


def test_all_rows_untrainable(jsonl):
    source = jsonl([{"input": "a b c d e", "output": "x"}])
    with pytest.raises(DataError, match=r"nothing to train on: .*rows.jsonl.*1 left out.*max_seq_len"):
        instruct_dataset(WordTokenizer(max_seq_len=4), source=source, truncation="right")


def test_empty_after_filter_and_empty_file(tokenizer, jsonl):
    with pytest.raises(DataError, match=r"nothing to train on: .*1 filtered out"):
        instruct_dataset(tokenizer, source=jsonl([{"input": "a", "output": "x"}]), filter_fn=lambda row: False)
    with pytest.raises(DataError, match=r"none.jsonl \(train\): the dataset is empty \(0 rows\)"):
        instruct_dataset(tokenizer, source=jsonl([], "none.jsonl"))


def test_quickstart_splits(tokenizer):
    train = quickstart_dataset(tokenizer)
    test = quickstart_dataset(tokenizer, split="test", train_on_input=False)
    total = len(train) + len(test)
    assert total >= 150
    assert len(test) == total // 8
    assert not {tuple(e.tokens) for e in train.examples(seed=0, epoch=0, shuffle=False)} & {
        tuple(e.tokens) for e in test.examples(seed=0, epoch=0, shuffle=False)
    }
    assert test[0].labels[0] == I
    assert train[0].labels[0] == USER
    assert len(quickstart_dataset(tokenizer, split="train[:10]")) == 10
    with pytest.raises(DataError, match="unknown split 'val'; available: train, test"):
        quickstart_dataset(tokenizer, split="val")


def test_quickstart_prompts(tokenizer):
    rows = [json.loads(line) for line in (Path(kdtune.__file__).parent / "data" / "quickstart.jsonl").open()]
    rows = [row for number, row in enumerate(rows, start=1) if number % 8]
    index = next(index for index, row in enumerate(rows) if row["input"])
    for prompt, text in (
        ("plain", f"{rows[index]['instruction']} {rows[index]['input']}"),
        ("alpaca", alpaca_prompt(rows[index]["instruction"], rows[index]["input"])),
    ):
        example = quickstart_dataset(tokenizer, prompt=prompt, train_on="answers")[index]
        words = [tokenizer.words[word] for word in text.split()]
        assert example.tokens.tolist()[: len(words) + 4] == [BOS, USER, *words, END, ASSISTANT]
    with pytest.raises(ConfigError, match="prompt='chat'; allowed are alpaca, plain"):
        quickstart_dataset(tokenizer, prompt="chat")


def test_batches_are_one_pass_in_order(tokenizer, jsonl):
    dataset = instruct_dataset(tokenizer, source=jsonl([{"input": "a", "output": f"x{n}"} for n in range(5)]))
    passed = list(batches(dataset, 2, pad_id=0))
    assert [batch.tokens.shape[0] for batch in passed] == [2, 2, 1]
    assert [int(row[-2]) for batch in passed for row in batch.tokens] == [tokenizer.words[f"x{n}"] for n in range(5)]
