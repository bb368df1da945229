"""`kdtune data`: what a reader sees of a config's examples, in a terminal, a pipe and 60 columns."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exit_codes import run_command

from kdtune.data import DatasetStats, show
from kdtune.data.transforms import make_example
from kdtune.models import Transformer
from kdtune.tokenizers import byte_tokenizer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = run_command(["data", *argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


CHAT = {
    "messages": [
        {"role": "user", "content": "Hi \x1b[2J"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye."},
    ],
    "id": 7,
}
ROWS = [CHAT, {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "x" * 900}]}]  # type: ignore[index]
DATASET = ("dataset=kdtune.data.chat_dataset", "dataset.source=rows.jsonl", "tokenizer.max_seq_len=128")


@pytest.fixture
def rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_a_pipe_gets_marks_and_60_columns(
    shown: Callable[..., Any], rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = shown("tiny/finetune", *DATASET, "dataset.train_on=last", "--rows", "1")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["dataset: rows.jsonl (train)", "what is trained on is between [[ and ]]"]
    assert "<|im_start|>assistant\nHello.<|im_end|>\n" in out and "<|im_start|>assistant\n[[Bye.<|im_end|>]]\n" in out
    assert "\x1b" not in out and "Hi \\x1b[2J" in out
    table = dict(re.findall(r"^ *([a-z][a-z :,0-9]+?) {2,}([\d,]+)", out, re.MULTILINE))
    # One id a byte, and one for each of the 8 special tokens; a line end after each turn.
    length = sum(len(f"{m['role']}\n{m['content']}\n") + 2 for m in CHAT["messages"])  # type: ignore[union-attr,index,attr-defined]
    assert table == {"rows read": "2", "left out: too long": "1", "examples": "1", "tokens": str(length),
                     "trained on": "5", "an example, mean": str(length), "longest": str(length)}  # fmt: skip
    assert "note: columns that are not read: id" in out
    assert max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_no_color(
    shown: Callable[..., Any], rows: None, monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert shown("tiny/finetune", *DATASET)[0] == 0
    assert ("\x1b[1;32mHello.<|im_end|>\x1b[0m" in terminal.getvalue()) == coloured
    assert ("[[Hello.<|im_end|>]]" in terminal.getvalue()) != coloured


def test_configs_of_every_kind_and_no_weight(shown: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    build = Transformer.__init__

    def build_without_weights(self: Transformer, *args: Any, **kwargs: Any) -> None:
        assert torch.get_default_device().type == "meta", "a model is built with weights"
        build(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "__init__", build_without_weights)
    for name, key in (
        ("tiny/knowledge_distillation", "dataset"),
        ("tiny/evaluate", "dataset_val"),
        ("tiny/prune", "dataset"),
    ):
        code, out, err = shown(name, "--rows", "0")
        assert (code, err) == (0, "") and out.startswith(f"{key}: quickstart ("), out
    assert shown("tiny/finetune", "--key", "dataset_val", "--rows", "0")[1].startswith("dataset_val: quickstart (test)")
    code, out, _ = shown("tiny/finetune", "--count", "10", "--rows", "0")
    assert "rows read                  10\n" in out and "(the first rows of the source; --count all" in out
    assert "rows read                  189\n" in shown("tiny/finetune", "--count", "all", "--rows", "0")[1]


def test_mixtures_one_by_one(shown: Callable[..., Any], rows: None) -> None:
    part = "{_component_: kdtune.data.chat_dataset, source: rows.jsonl, train_on: %s}"
    mixed = f"[{part % 'last'}, {part % 'answers'}]"
    _, out, _ = shown(
        "tiny/finetune", f"dataset={{_component_: kdtune.data.mixed_dataset, datasets: {mixed}, weights: [1, 1]}}"
    )
    assert "dataset.datasets.0: rows.jsonl" in out and "dataset.datasets.1: rows.jsonl" in out
    assert out.count("[[Hello.") == 1 and out.count("[[Bye.") == 2


def test_long_texts_are_shortened_unless_full(shown: Callable[..., Any], rows: None) -> None:
    settings = (*DATASET, "tokenizer.max_seq_len=2000")
    short, full = shown("tiny/finetune", *settings)[1], shown("tiny/finetune", *settings, "--full")[1]
    assert "\n... 310 characters left out ...\n" in short and "x" * 900 not in short
    assert "[[" + "x" * 900 + "<|im_end|>]]" in full


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("tiny/finetune", "--count", "0"), "--count 0: must be a number of rows"),
        (("tiny/finetune", "--rows", "-1"), "--rows -1: must be at least 0"),
        (("tiny/finetune", "--key", "dataste"), "has no such dataset; it has dataset, dataset_val"),
        (("tiny/generate",), "names no dataset"),
        (("tiny/finetune", "dataset.trian_on=last"), "did you mean 'train_on"),
        (("tiny/finetune", "dataset=kdtune.data.text_completion_dataset", "dataset.source=gone.txt"), "no such file"),
    ],
)
def test_mistakes(shown: Callable[..., Any], argv: tuple[str, ...], words: str) -> None:
    code, _, err = shown(*argv)
    assert code == 2 and words in err and "Traceback" not in err


def test_nothing_to_train_on_is_shown_not_refused(shown: Callable[..., Any], rows: None) -> None:
    code, out, _ = shown("tiny/finetune", *DATASET, "tokenizer.max_seq_len=8")
    assert code == 0 and re.search(r"left out: too long +2\n", out) and "tokens an example" not in out


def test_histogram_counts_every_example() -> None:
    rng = np.random.default_rng(0)
    for size, low, high in ((1, 5, 6), (500, 1, 3000), (200, 90, 96), (1000, 2040, 2049)):
        lengths = rng.integers(low, high, size).tolist()
        lines = show.histogram(lengths, width=60).splitlines()[1:]
        assert len(lines) <= 10 and max(map(len, lines)) <= 60
        assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == size
        for line in lines:
            start, _, end = line.split()[0].replace(",", "").partition("-")
            inside = [length for length in lengths if int(start) <= length <= int(end or start)]
            assert len(inside) == int(line.split()[-1].replace(",", ""))
    assert show.histogram([]) == ""


def test_marked_stretches_spell_the_whole_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("añb", add_bos=False)
    example = make_example(ids, [False, True, True, True, False])
    assert show.example_text(example, tokenizer) == "a[[ñb]]<|im_end|>"
    assert show.rows_table(DatasetStats("x"), [], 0, None).splitlines()[0].split() == ["rows", "read", "0"]


def test_a_variable_of_the_chat_template_is_set_by_the_config(shown: Callable[..., Any], tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "thinker")
    (tmp_path / "thinker" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% if enable_thinking is false %}<think></think>{% endif %}"
        "{% endif %}"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT["messages"][2:]}))
    thinker = f"tokenizer={{_component_: kdtune.tokenizers.load, path: {tmp_path / 'thinker'}}}"
    run = ("tiny/finetune", thinker, "dataset=kdtune.data.chat_dataset", "dataset.source=rows.jsonl", "~dataset_val")
    assert "assistant:[[<think></think>Bye.<|im_end|>]]" in shown(*run)[1]
    assert "<think></think>[[Bye.<|im_end|>]]" in shown(*run, "tokenizer.chat_template_kwargs.enable_thinking=false")[1]
    code, _, err = shown(*run, "tokenizer.chat_template_kwargs.thinking=false")
    assert code == 2 and "tokenizer.chat_template_kwargs.thinking: no variable of the chat template" in err
