"""The prune recipe: its checks before anything is measured, and a search that is stopped; what it writes is in test_run_output.py."""

import json
import os
import signal
import time

import pytest
from command_line import Fork

from kdtune.checkpoint import load_model
from kdtune.config import load
from recipes.prune import Config


def prune(cli, folder, *overrides):
    return cli("run", "prune", "--config", "tiny/prune", f"output_dir={folder}", *overrides)


def test_a_folder_that_is_not_empty_is_refused_at_the_start(cli, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    done = prune(cli, tmp_path / "out")
    assert done.code == 2 and "is not empty (holds 'notes.txt'); choose another output_dir" in done.err


def test_a_vocabulary_that_is_too_small_is_refused(cli, tmp_path):
    done = prune(cli, tmp_path / "out", "model.vocab_size=257")
    assert done.code == 2 and "the model's vocabulary is 257" in done.err


def test_models_dir_is_where_everything_lies():
    cfg = load("smollm2/prune", ["models_dir=/elsewhere"], Config)
    assert cfg.output_dir == "/elsewhere/SmolLM2-12-layers"
    assert cfg.checkpointer["checkpoint_dir"] == cfg.tokenizer["path"] == "/elsewhere/SmolLM2-135M-Instruct"


SEARCH = ("model.num_layers=12", "num_layers=2", "num_candidates=6", "num_calibration_tokens=1500")


def stopped(folder, number, num_removals):
    """Starts the search, and sends it a signal when so many removals are decided."""
    process = Fork("run", "prune", "--config", "tiny/prune", f"output_dir={folder}", *SEARCH)
    record = folder.with_name(f"{folder.name}.partial")
    deadline = time.monotonic() + 60
    while not record.exists() or len(json.loads(record.read_text())["removals"]) < num_removals:
        assert process.is_running and time.monotonic() < deadline, process.end(timeout=0)
        time.sleep(0.002)
    process.send(number)
    ended = process.end(timeout=60)
    assert ended.code == (-number if number == signal.SIGKILL else 1), ended.err
    assert not folder.exists(), "the signal came too late"
    return ended.err, json.loads(record.read_text())["removals"]


def test_a_search_that_is_stopped_continues(cli, tmp_path):
    """Witness: the same search, never stopped."""
    whole, folder = tmp_path / "whole", tmp_path / "student"
    assert prune(cli, whole, *SEARCH).code == 0
    told, decided = stopped(folder, signal.SIGTERM, 2)
    kept = f"{folder}.partial"
    assert told.endswith(
        f"error: stopped by SIGTERM after {len(decided)} of 10 removals: kept in {kept}; the same command continues\n"
    )
    assert "\r" not in told
    told, more = stopped(folder, signal.SIGKILL, len(decided) + 2)
    assert f"{kept}: continuing a search after {len(decided)} removals" in told
    assert more[: len(decided)] == decided and len(more) < 10
    done = prune(cli, folder, *SEARCH)
    assert done.code == 0 and f"removal {len(more) + 1}/10  layer" in done.err, done.err
    assert f"removal {len(more)}/10  layer" not in done.err
    ours, theirs = (json.loads((one / "prune.json").read_text()) for one in (folder, whole))
    assert ours == theirs and [step["layer"] for step in ours["removals"]][: len(more)] == [
        one["layer"] for one in more
    ]
    ours, theirs = (load_model(one).state_dict() for one in (folder, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert not os.path.exists(kept)


def test_a_record_of_another_search_is_refused(cli, tmp_path, monkeypatch):
    record = tmp_path / "out.partial"
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    settings = {"model": {}, "dtype": "bf16", "seed": 0, "num_candidates": 7, "calibration text": ""}
    record.write_text(json.dumps({"settings": settings, "removals": []}))
    done = prune(cli, tmp_path / "out")
    assert done.code == 2 and f"{record}: has a search that was stopped, with other settings:\n" in done.err
    for line in ("dtype: was 'bf16', is 'fp32'", "num_candidates: was 7, is None", "calibration text: was ''"):
        assert f"\n  {line}" in done.err
    assert "seed: " not in done.err and "remove the file to start again" in done.err
    for damaged in ('{"settings": {}', '{"settings": {}, "removals": [{"layer": 1}]}', "[]"):
        record.write_text(damaged)
        done = prune(cli, tmp_path / "out")
        assert done.code == 2 and f"{record}: is no record of a search that was stopped (" in done.err
