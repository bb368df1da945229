"""Prompts from files, and as token ids."""

import json

import pytest

from kdtune.data import Conversation, Message
from kdtune.errors import DataError
from kdtune.generation import encode_prompt, read_prompts
from kdtune.log import get_logger
from kdtune.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def user(text: str) -> Conversation:
    return Conversation([Message("user", text)])


def test_a_line_is_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffOne?\n\n  \nTwo\u2028é\x0c?\r\nThree?", encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "p.txt") == [user("One?"), user("Two\u2028é\x0c?"), user("Three?")]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_of_json(tmp_path, suffix):
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": "P"},
        {"instruction": "Translate.", "input": "oui", "output": "yes"},
        {"instruction": "Sing.", "input": ""},
        {"messages": turns},
        {"messages": [*turns, {"role": "assistant", "content": "Hello"}]},
    ]
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"p.{suffix}").write_text(text)
    conversation = Conversation([Message("system", "Be short."), Message("user", "Hi")])
    assert read_prompts(tmp_path / f"p.{suffix}") == [
        user("P"), user("Translate.\n\noui"), user("Sing."), conversation, conversation
    ]  # fmt: skip


def test_rows_with_tools_and_with_columns_that_are_not_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    tools, call = [{"type": "function", "function": {"name": "f"}}], {"function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    rows = [{"messages": turns, "tools": tools}, {"prompt": "P", "system": "S"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with_tools, _ = read_prompts(tmp_path / "p.jsonl")
    assert (with_tools.tools, with_tools.messages[1].fields) == (tools, {"tool_calls": [call]})
    assert "p.jsonl: columns that are not read: system" in caplog.text
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}"
        "{{ (m.tool_calls | tojson) if m.tool_calls else m.content }}{% endfor %}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, with_tools)) == json.dumps(tools) + "Hi" + json.dumps([call]) + "1"
    with pytest.raises(DataError, match="no place for tools"):
        encode_prompt(tokenizer, Conversation(user("a").messages, tools), chat=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a", ".txt, .json, .jsonl file expected"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}', r"row 2: columns question; messages, prompt or"),
        ("p.jsonl", '{"prompt": 3}', "row 1: column 'prompt' must hold text"),
        ("p.jsonl", '{"messages": []}', "row 1: a conversation must be"),
        ("p.jsonl", '{"prompt": ', "line 1: invalid JSON"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file():
    with pytest.raises(DataError, match=r"prompt_file=nowhere\.txt: no such file"):
        read_prompts("nowhere.txt")


def test_chat_ends_where_the_answer_begins():
    ids = encode_prompt(TOKENIZER, user("Hi"))
    assert ids == TOKENIZER.tokenize_messages([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[0]
    with_system = encode_prompt(
        TOKENIZER, Conversation([Message("system", "Old."), Message("user", "Hi")]), system_prompt="New."
    )
    text = TOKENIZER.decode(with_system)
    assert "New." in text and "Old." not in text


@pytest.mark.parametrize("begins", [True, False])
def test_plain_text_starts_with_bos_where_transformers_puts_it_and_has_no_end(monkeypatch, begins):
    monkeypatch.setattr(type(TOKENIZER), "begins_with_bos", begins)
    ids = encode_prompt(TOKENIZER, user("Once"), chat=False)
    assert ids == [TOKENIZER.bos_id] * begins + TOKENIZER.encode("Once", add_bos=False, add_eos=False)
    two = Conversation([Message("user", "a"), Message("user", "b")])
    for messages, system in ((two, None), (user("a"), "Be short.")):
        with pytest.raises(DataError, match="chat=true"):
            encode_prompt(TOKENIZER, messages, chat=False, system_prompt=system)


@pytest.mark.parametrize("messages", [Conversation([]), user(""), user(" \n")])
def test_an_empty_prompt(messages):
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_prompt(TOKENIZER, messages)
