"""Text from outside on its way out: to the terminal, and into files."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exit_codes import run_command
from tqdm import tqdm

from kdtune.checkpoint import atomic_write_text, collected_rows, partial_of
from kdtune.escape import one_line, printable
from kdtune.log import bar_settings, fit_for_stdout, get_logger
from kdtune.runs import JSONLLogger, print_results, read_metrics

SURROGATE = "cut \ud83d emoji"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Grüße, 日本語, \U0001f468\u200d\U0001f469, a\tb\nc", None),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        (SURROGATE, "cut \\ud83d emoji"),
        ("a\u2028b\u202eevil", "a\\u2028b\\u202eevil"),
    ],
)
def test_printable(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


def test_errors_and_messages_reach_the_terminal_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cat", "no\x1b[31m-such"]) == 2
    assert "no\\x1b[31m-such" in capsys.readouterr().err
    get_logger("kdtune.test").warning("%s", "name\x1b]0;title\x07")
    assert logging.getLogger("kdtune").handlers
    assert "name\\x1b]0;title\\x07" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "cut \\ud83d emoji é\n"), ("ascii", "cut \\ud83d emoji \\xe9\n")]
)
def test_standard_output_escapes_what_it_has_no_character_for(encoding: str, shown: str) -> None:
    code = "from kdtune.log import outlive_readers; outlive_readers(); print('cut \\ud83d emoji \\xe9')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == shown


def test_a_terminal_gets_no_control_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit_for_stdout("a\x1b[2J") == "a\x1b[2J"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert fit_for_stdout("a\x1b[2J") == "a\\x1b[2J"


def test_a_runs_answers_reach_the_terminal_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    row = {"step": 0, "model": "student", "prompt": "\x1b[2JHi", "answer": "\x1b]0;title\x07"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_results(tmp_path, trained="student", best_metric=None)
    out = capsys.readouterr().out
    assert "> \\x1b[2JHi\n  [student, step 0] \\x1b]0;title\\x07\n" in out and "\x1b" not in out


def test_one_line_has_no_line_ends_and_no_changes_of_direction() -> None:
    assert one_line(" a\r\nb\tc \u202eevil\x1b") == "a b c \\u202eevil\\x1b"


def test_lone_surrogates_are_written_as_json_has_them(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", json.dumps({"a": SURROGATE, "b": "é"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": SURROGATE, "b": "é"}
    with JSONLLogger(tmp_path / "m.jsonl") as logger:
        logger.log({"prompt": SURROGATE}, 1)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "prompt": SURROGATE}]


def test_rows_are_there_as_they_come_and_in_order_at_the_end(tmp_path: Path) -> None:
    path, partial = tmp_path / "new" / "a.jsonl", tmp_path / "new" / "a.jsonl.partial"
    assert partial_of(path) == partial
    with collected_rows(path) as add:
        add(2, {"text": SURROGATE})
        assert partial.read_text() == '{"number": 2, "text": "cut \\ud83d emoji"}\n' and not path.exists()
        add(1, {"text": "b"})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["b", SURROGATE]
    assert list(path.parent.iterdir()) == [path]


def test_an_old_file_stays_until_all_rows_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), collected_rows(path) as add:
        add(1, {"text": "new"})
        raise ZeroDivisionError
    assert path.read_text() == "old" and json.loads(partial_of(path).read_text()) == {"number": 1, "text": "new"}


def test_a_bar_in_a_log_file_is_lines(monkeypatch, capsys):
    monkeypatch.setattr("kdtune.log._LINE_SECONDS", 0.0)
    with tqdm(total=3, desc="quantizing", unit="linear", **bar_settings()) as bar:
        for _ in range(3):
            bar.update()
    assert list(tqdm([1, 2], desc="held-out examples", disable=True, **bar_settings())) == [1, 2]
    text = capsys.readouterr().err
    assert "\r" not in text and "\n\n" not in text
    lines = text.splitlines()
    assert (
        lines[0].startswith("quantizing: 0 of 3, 00:00 so far")
        and lines[-1] == "quantizing: 3 of 3, 00:00 so far, 00:00 left"
    )
    assert len(lines) == len(set(lines)) == 4


def test_a_bar_in_a_log_file_is_a_line_at_times(capsys):
    for _ in tqdm(range(1000), desc="scoring", **bar_settings()):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("scoring: 0 of 1000") and last.startswith("scoring: 1000 of 1000")
