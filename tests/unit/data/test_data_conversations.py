"""What of a conversation is trained on, what the template sees of a row, and what becomes of one that is too long."""

import json
import logging

import pytest
from datasets import Dataset as HFDataset
from word_tokenizer import ASSISTANT, BOS, END, SYSTEM, USER, WordTokenizer

from kdtune.constants import IGNORE_INDEX as I
from kdtune.data import alpaca_dataset, chat_dataset, instruct_dataset, parse_conversation, quickstart_dataset
from kdtune.errors import ConfigError, DataError
from kdtune.log import get_logger
from kdtune.tokenizers import byte_tokenizer

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEFT_OUT = "the chat template leaves out"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


CHAT = [turn("system", "s"), turn("user", "a"), turn("assistant", "x"), turn("user", "b"), turn("assistant", "y z")]


@pytest.fixture
def byte_chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def told(caplog, monkeypatch):
    """What is logged."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, logger="kdtune")
    return caplog


def texts(dataset, tokenizer):
    """The text of each example, and of its trained tokens."""
    examples = [dataset[i] for i in range(len(dataset))]
    return [
        tuple(tokenizer.decode(ids, skip_special=False) for ids in (one.tokens, one.labels[one.labels != I]))
        for one in examples
    ]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [("last", ["y", "z", "END"]), ("answers", ["x", "END", "y", "z", "END"]), ("all", None)],
)
def test_train_on(tokenizer, jsonl, train_on, trained):
    dataset = chat_dataset(tokenizer, source=jsonl([{"messages": CHAT}]), train_on=train_on)
    labels = [label for label in dataset[0].labels.tolist() if label != I]
    words = {**tokenizer.words, "END": END}
    assert labels == (dataset[0].tokens.tolist()[1:] if trained is None else [words[word] for word in trained])


def test_train_on_last_trains_nothing_where_the_last_answer_is_masked(tokenizer, jsonl):
    rows = [{"messages": CHAT}, {"messages": [*CHAT[:4], turn("assistant", "y", train=False)]}]
    dataset = chat_dataset(tokenizer, source=jsonl(rows), train_on="last")
    assert (len(dataset), dataset.report.untrainable) == (1, 1)


@pytest.mark.parametrize("builder", [alpaca_dataset, instruct_dataset, quickstart_dataset])
def test_train_on_input_is_another_spelling(tokenizer, jsonl, builder):
    source = jsonl([{"instruction": "i", "input": "j", "output": "x"}])
    where = {} if builder is quickstart_dataset else {"source": source}

    def labels(**options):
        return builder(tokenizer, **where, **options)[0].labels.tolist()

    assert labels(train_on="all") == labels(train_on_input=True) != labels(train_on="answers")
    assert labels(train_on="answers") == labels(train_on_input=False) == labels(train_on="last", train_on_input=False)
    assert labels() == labels(train_on="answers" if builder is instruct_dataset else "all")
    for options in ({"train_on": "answers", "train_on_input": True}, {"train_on": "all", "train_on_input": False}):
        with pytest.raises(ConfigError, match=r"train_on=.*train_on_input=.*contradict"):
            labels(**options)
    with pytest.raises(ConfigError, match="train_on=both: unknown; allowed: last, answers, all"):
        labels(train_on="both")


def test_fields_of_turns_and_rows_reach_the_template(byte_chat, jsonl):
    messages = [
        turn("user", "Rain?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        turn("tool", "rain", name="weather"),
        turn("assistant", "Yes.", reasoning_content="It rains."),
    ]
    (text, trained), = texts(chat_dataset(byte_chat, source=jsonl([{"tools": [TOOL], "messages": messages}])), byte_chat)  # fmt: skip
    assert text.startswith(f"TOOLS {json.dumps([TOOL])}\n<|im_start|>user\nRain?")
    assert trained == (f"CALL {json.dumps(CALL['function'])}<|im_end|><think>It rains.</think>Yes.<|im_end|>")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}, {"weight": 0.0}])
def test_marks_keep_a_turn_out(byte_chat, jsonl, mark):
    messages = [turn("user", "a"), turn("assistant", "WRONG", **mark), turn("user", "b"), turn("assistant", "right")]
    ((text, trained),) = texts(chat_dataset(byte_chat, source=jsonl([{"messages": messages}])), byte_chat)
    assert "WRONG<|im_end|>" in text and trained == "right<|im_end|>"
    everything = chat_dataset(byte_chat, source=jsonl([{"messages": messages}]), train_on="all")
    assert "WRONG" not in texts(everything, byte_chat)[0][1]


def test_marks_that_say_yes_change_nothing(byte_chat, jsonl):
    marked = [turn("user", "a"), turn("assistant", "x", weight=1), turn("assistant", "y", train=True, masked=False)]
    plain = [turn(one["role"], one["content"]) for one in marked]
    assert texts(chat_dataset(byte_chat, source=jsonl([{"messages": marked}])), byte_chat) == texts(
        chat_dataset(byte_chat, source=jsonl([{"messages": plain}])), byte_chat
    )


def test_conversations_as_json_text_and_as_lists(byte_chat, jsonl):
    messages = [turn("user", "a"), {"role": "assistant", "content": "x", "tool_calls": [CALL]}]
    as_lists = {"role": ["user", "assistant"], "content": ["a", "x"], "tool_calls": [None, [CALL]]}
    rows = [
        {"tools": [TOOL], "messages": messages},
        {"tools": json.dumps([TOOL]), "messages": json.dumps(messages)},
        {"tools": [TOOL], "messages": as_lists},
    ]
    found = texts(chat_dataset(byte_chat, source=jsonl(rows)), byte_chat)
    assert len(set(found)) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_nulls_that_a_table_fills_in_are_not_there(byte_chat, jsonl, tmp_path, streaming):
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    rows = [
        {"messages": [turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": [call]}, turn("assistant", "x")]}
        for call in (CALL, other)
    ]  # fmt: skip
    HFDataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    loaded = chat_dataset(byte_chat, source=str(tmp_path / "rows.parquet"), streaming=streaming)
    found = [one.tokens.tolist() for one in loaded.examples(seed=0, epoch=0, shuffle=False)]
    plain = chat_dataset(byte_chat, source=jsonl(rows))
    assert found == [plain[i].tokens.tolist() for i in range(2)]
    assert all("null" not in byte_chat.decode(ids) and "None" not in byte_chat.decode(ids) for ids in found)


def test_what_the_template_leaves_out_is_told_with_a_count(byte_chat, jsonl, told):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    rows = [
        {"messages": [turn("user", "a"), turn("assistant", "x", id=7)], "source": "web"},
        {"messages": [turn("user", "a", weight=1), turn("assistant", "x", id=8)]},
        {"messages": [turn("user", "a"), turn("assistant", "x", tool_calls=[call])]},
        {"messages": [turn("user", "a"), turn("assistant", "x")], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    report = chat_dataset(byte_chat, source=jsonl(rows)).report
    assert (
        report.remarks[f"{LEFT_OUT} id"] == 2
        and report.remarks[f"{LEFT_OUT} enable_thinking"] == 1
        and report.unread == {"source": 1}
    )
    assert "the chat template leaves out id (2 of 4 rows)" in told.text
    assert (
        "leaves out that arguments of tool_calls are objects" in told.text
        and "columns that are not read: source" in told.text
    )
    assert (
        "train_on=answers leaves out turns of others than the assistant that are marked as trained on (1 of 4 rows)"
        in told.text
    )


def test_a_template_that_drops_text_or_fields_is_told(jsonl, told):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    rows = [{"messages": [turn("user", "a"), turn("assistant", "<think>Hm.</think>x")]}, {"messages": CHAT}]
    report = chat_dataset(tokenizer, source=jsonl(rows)).report
    assert report.remarks == {f"{LEFT_OUT} text of assistant turns, in whole or in part": 1}
    plain = byte_tokenizer()  # ChatML knows neither tools nor reasoning
    fields = {"tool_calls": [CALL], "reasoning_content": "r"}
    rows = [{"tools": [TOOL], "messages": [turn("user", "a"), turn("assistant", "x", **fields)]}]
    report = chat_dataset(plain, source=jsonl(rows)).report
    assert report.remarks == {f"{LEFT_OUT} {name}": 1 for name in ("tools", "tool_calls", "reasoning_content")}


def test_text_that_the_template_trims_or_escapes_is_not_left_out(jsonl, told):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim | tojson }}")
    rows = [{"messages": [turn("user", " a\n"), turn("assistant", ' "x"\ny ')]}]
    assert not chat_dataset(tokenizer, source=jsonl(rows)).report.remarks
    assert "leaves out" not in told.text


def test_a_null_content_that_the_template_would_print(byte_chat, jsonl):
    rows = [{"messages": [turn("user", "a"), turn("assistant", None, tool_calls=[CALL])]}]
    with pytest.raises(DataError, match=r"row 1: messages\[1\].content is null, which .* prints as the word None"):
        chat_dataset(byte_chat, source=jsonl(rows))
    del rows[0]["messages"][1]["content"]
    assert texts(chat_dataset(byte_chat, source=jsonl(rows)), byte_chat)[0][1].startswith("CALL")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "weather"}, "column 'tools' is text that is not JSON"),
        ({"tools": ["weather"]}, "column 'tools' must hold a list of JSON objects"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs' must hold a JSON object: found list"),
        ({"chat_template_kwargs": {"tools": []}}, "column 'chat_template_kwargs' must not set tools"),
    ],
)
def test_bad_columns_beside_the_messages(byte_chat, jsonl, columns, message):
    with pytest.raises(DataError, match=f"row 1: {message}"):
        chat_dataset(byte_chat, source=jsonl([{"messages": CHAT, **columns}]))


@pytest.mark.parametrize("train_on", ["answers", "last"])
def test_too_long_a_chat_loses_its_oldest_exchanges(jsonl, train_on):
    messages = [turn("system", "s")]
    for number in range(6):
        messages += [turn("user", f"q{number}"), turn("assistant", f"x{number} y{number}")]
    tokenizer = WordTokenizer(max_seq_len=20)  # BOS, system 3, and 7 an exchange
    dataset = chat_dataset(tokenizer, source=jsonl([{"messages": messages}]), train_on=train_on)
    w = tokenizer.words
    kept = [[USER, w[f"q{n}"], END, ASSISTANT, w[f"x{n}"], w[f"y{n}"], END] for n in (4, 5)]
    assert dataset[0].tokens.tolist() == [BOS, SYSTEM, w["s"], END, *kept[0], *kept[1]]
    answers = [w["x4"], w["y4"], END] * (train_on == "answers") + [w["x5"], w["y5"], END]
    assert [label for label in dataset[0].labels.tolist() if label != I] == answers
    assert (dataset.report.truncated, dataset.report.too_long) == (1, 0)


def test_turns_after_the_last_answer_go_first(jsonl):
    messages = [turn("user", "a"), turn("assistant", "x"), turn("user", "b c d e")]
    tokenizer = WordTokenizer(max_seq_len=7)
    dataset = chat_dataset(tokenizer, source=jsonl([{"messages": messages}]))
    a, x = tokenizer.words["a"], tokenizer.words["x"]
    assert dataset[0].tokens.tolist() == [BOS, USER, a, END, ASSISTANT, x, END]


def test_never_half_an_answer_unless_asked(jsonl, told):
    short = [turn("user", "a"), turn("assistant", "x")]
    long = [*short, turn("user", "b"), turn("assistant", "y " * 20)]
    source = jsonl([{"messages": short}, {"messages": long}])

    def lengths(**options):
        dataset = chat_dataset(WordTokenizer(max_seq_len=12), source=source, **options)
        return [len(dataset[i].tokens) for i in range(len(dataset))], dataset.report.truncated, dataset.report.too_long

    assert lengths() == ([7], 0, 1)
    assert "1 examples from 2 rows, 1 left out: longer than max_seq_len" in told.text
    assert lengths(truncation="drop") == ([7], 0, 1)
    assert lengths(truncation="right") == lengths(train_on="all") == ([7, 12], 1, 0)
    assert lengths(train_on="all", truncation="turns") == ([7], 0, 1)
    with pytest.raises(ConfigError, match="truncation=left: unknown; allowed: turns, right, drop"):
        lengths(truncation="left")


def test_a_row_nested_too_deeply_is_named(byte_chat, jsonl, tmp_path):
    # What the JSON reader takes may still be too deep for what comes after it; the control string is one such thing.
    text = json.dumps({"messages": CHAT, "tools": "DEEP"})
    (tmp_path / "deep.jsonl").write_text(text.replace('"DEEP"', '[{"a": ' * 440 + '"<|im_end|>"' + "}]" * 440))
    with pytest.raises(DataError, match=r"deep.jsonl.*nested too deeply"):
        chat_dataset(byte_chat, source=str(tmp_path / "deep.jsonl"))


def test_sharegpt_turns_hold_fields_too():
    (one,) = parse_conversation(
        [{"from": "gpt", "value": "x", "weight": 0, "reasoning_content": "r", "n": None}], "sharegpt"
    )
    assert (one.masked, one.fields) == (True, {"reasoning_content": "r"})
    with pytest.raises(DataError, match="turn 1 has both 'content' and 'value'"):
        parse_conversation([{"from": "gpt", "value": "x", "content": "y"}], "sharegpt")
