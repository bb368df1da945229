"""The cache of tokenized rows and tokenizing in several processes: the same examples as without, and no others."""

import json
import logging
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtune import tokenizers
from kdtune.data import parallel_rows, tokenized_cache
from kdtune.data.mix import load_dataset
from kdtune.errors import DataError

NODE = {"_component_": "kdtune.data.alpaca_dataset"}


@pytest.fixture(autouse=True)
def _few_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_cache, "FEWEST_ROWS", 3)


def rows_file(path: Path, count: int = 5, **changed: str) -> Path:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i} it is.", "more": 1} for i in range(count)]
    rows[1] |= changed
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def built(folder: Path | None, source: Path, tokenizer: Any = None, **arguments: Any) -> Any:
    node = {**NODE, "source": str(source), **arguments}
    return load_dataset("dataset", node, tokenizer or tokenizers.byte_tokenizer(max_seq_len=200), cache_dir=folder)


def same(one: Any, other: Any) -> bool:
    assert one.is_chat == other.is_chat and one.report == other.report
    return one.fingerprint() == other.fingerprint() and all(
        np.array_equal(one[i].tokens, other[i].tokens) and np.array_equal(one[i].labels, other[i].labels)
        for i in range(len(one))
    )


def test_the_second_time_the_rows_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = rows_file(tmp_path / "a.jsonl"), tmp_path / "cache"
    first = built(cache, source)
    assert len(list(cache.iterdir())) == 1 and same(first, built(None, source))
    monkeypatch.setattr("kdtune.data.rows.RowEncoder.encoded", lambda *_: pytest.fail("tokenized again"))
    assert same(built(cache, source), first)
    assert first.report.unread == {"more": 5}


def test_whatever_changes_an_example_has_a_file_of_its_own(tmp_path: Path) -> None:
    source, cache = rows_file(tmp_path / "a.jsonl"), tmp_path / "cache"
    dated = tokenizers.byte_tokenizer(max_seq_len=200)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(dated.chat_template)
    other_template = tokenizers.byte_tokenizer(max_seq_len=200)
    other_template.chat_template = str(other_template.chat_template) + " "
    builds = [
        lambda folder: built(folder, source),
        lambda folder: built(folder, source, tokenizers.byte_tokenizer(max_seq_len=100)),
        lambda folder: built(folder, source, other_template),
        lambda folder: built(folder, source, train_on="answers"),
        lambda folder: built(folder, source, truncation="drop"),
        lambda folder: built(folder, source, column_map={"input": "input", "instruction": "output"}),
        lambda folder: built(folder, rows_file(source, output="Another.")),
        lambda folder: built(folder, rows_file(source, count=6)),
    ]
    for number, build in enumerate(builds, start=1):
        assert same(build(cache), build(None))
        assert len(list(cache.iterdir())) == number
    for day in ("2024-07-26", "2024-07-27"):
        dated.date = day
        assert same(built(cache, source, dated), built(None, source, dated))
    assert len(list(cache.iterdir())) == len(builds) + 2


def test_parts_of_a_mixture_with_the_same_rows_keep_apart(tmp_path: Path) -> None:
    source, tokenizer = rows_file(tmp_path / "a.jsonl"), tokenizers.byte_tokenizer(max_seq_len=200)
    parts = [{**NODE, "source": str(source), "train_on": train_on} for train_on in ("all", "answers")]
    node = {"_component_": "kdtune.data.mixed_dataset", "datasets": parts, "weights": [1, 1]}
    plain, *cached = (
        load_dataset("dataset", node, tokenizer, cache_dir=folder) for folder in (None, tmp_path / "c", tmp_path / "c")
    )
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert {plain.fingerprint()} == {one.fingerprint() for one in cached}


def test_a_damaged_file_is_found_and_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, cache = rows_file(tmp_path / "a.jsonl"), tmp_path / "cache"
    first = built(cache, source)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-40], b"", bytes([*whole[:200], whole[200] ^ 1, *whole[201:]]), b"PK" * 99):
        file.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert same(built(cache, source), first)
        assert "damaged" in caplog.text and same(built(cache, source), first)
        assert [one.name for one in cache.iterdir()] == [file.name]


def keep(row: dict[str, Any]) -> bool:
    return True


def test_what_ones_own_code_decides_is_not_kept(tmp_path: Path) -> None:
    source, cache = rows_file(tmp_path / "a.jsonl"), tmp_path / "cache"
    built(cache, source, filter_fn=keep)
    (tmp_path / "file").write_text("")
    assert same(built(tmp_path / "file", source), built(None, source))  # no folder can be made there
    assert not cache.exists()


def test_several_processes_give_the_same_examples_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rows_file(tmp_path / "a.jsonl", count=23, output="")
    alone = built(None, source)
    monkeypatch.setattr(parallel_rows, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr("kdtune.data.rows.num_processes", lambda rows: 3)
    assert same(built(None, source), alone)


def test_an_error_in_another_process_names_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rows_file(tmp_path / "a.jsonl", count=11)
    source.write_text(source.read_text() + json.dumps({"instruction": 1, "input": "", "output": "x"}) + "\n")
    monkeypatch.setattr(parallel_rows, "_ROWS_AT_ONCE", 4)
    found = []
    for processes in (1, 2):
        monkeypatch.setattr("kdtune.data.rows.num_processes", lambda rows, processes=processes: processes)
        with pytest.raises(DataError, match="row 12: ") as error:
            built(None, source)
        found.append(str(error.value))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("rows", "on_host", "expected"),
    [
        (iter([{}] * 4_000), 1, 1),
        ([{}] * 3_999, 1, 1),
        ([{}] * 4_000, 1, 4),
        ([{}] * 4_000, 2, 2),
        ([{}] * 4_000, 8, 1),
    ],
)
def test_processes_share_the_hosts_processors(
    rows: Any, on_host: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_rows.os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_host))
    assert parallel_rows.num_processes(rows) == expected


def kill_this_process(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.data.rows.num_processes", lambda _: 2)
    monkeypatch.setattr(parallel_rows, "_encoded", kill_this_process)
    with pytest.raises(DataError, match=r"a\.jsonl.*: a process that tokenizes rows has ended"):
        built(None, rows_file(tmp_path / "a.jsonl"))


def test_a_filter_with_state_sees_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = tmp_path / "a.jsonl", set()

    def is_new(row: dict[str, Any]) -> bool:
        is_first = row["output"] not in seen
        seen.add(row["output"])
        return is_first

    rows = [{"instruction": "Say.", "input": "", "output": f"{i % 7}"} for i in range(60)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(parallel_rows, "FEWEST_ROWS", 10)
    monkeypatch.setattr(parallel_rows, "_ROWS_AT_ONCE", 10)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert len(built(None, source, filter_fn=is_new)) == 7


def test_others_may_read_a_shared_cache(tmp_path: Path) -> None:
    source, cache = rows_file(tmp_path / "a.jsonl"), tmp_path / "cache"
    before = os.umask(0o022)
    try:
        built(cache, source)
    finally:
        os.umask(before)
    (file,) = cache.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_what_no_run_has_used_for_long_is_deleted(tmp_path: Path) -> None:
    """By the run that writes another; a file that was read counts as used, and others' files stay."""
    cache, old = tmp_path / "cache", time.time() - 91 * 86_400
    used, unused, fresh = (rows_file(tmp_path / f"{name}.jsonl", output=name) for name in "abc")
    built(cache, unused)
    (cache / "weights.npz").touch()
    (cache / f"{'0' * 64}.ab12.part").touch()
    ours = set(cache.iterdir())
    built(cache, used)
    (of_used,) = set(cache.iterdir()) - ours
    for file in cache.iterdir():
        os.utime(file, (old, old))
    built(cache, used)
    built(cache, fresh)
    left = set(cache.iterdir())
    assert len(left) == 3 and {of_used, cache / "weights.npz"} < left and not ours - {cache / "weights.npz"} & left
