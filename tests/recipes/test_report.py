"""The report: its tables against the results, and its page in a real browser where there is one."""

import csv
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtune.errors import ConfigError
from kdtune.sweeps import write_report

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)
NASTY = "</script><script>window.broken=1</script><!--"
TRUE_MEANS = {"sft": 0.50, "kd": 0.55}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results.jsonl of two methods and three seeds with curves, a baseline without seed, and a failed cell."""
    root, draw = tmp_path_factory.mktemp("sweep"), np.random.default_rng(0)
    cells = [cell({"method": "none"}, {"evaluate.task/acc": 0.4, "evaluate.task/acc_stderr": 0.01})]
    for method, mean in TRUE_MEANS.items():
        for seed in SEEDS:
            folder = root / "steps" / f"train-{method}{seed}"
            folder.mkdir(parents=True)
            rows = [
                {"step": step, "kd_loss": 2 / step + draw.normal(0, 0.02), "loss": 3 / step, "class_loss": 4 / step}
                for step in range(1, 61)
            ]
            rows[-1]["val_kd_loss"], rows[0]["val_kd_loss"] = 0.3, 2.0
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            values = {"train.val_kd_loss": draw.normal(1, 0.1), "evaluate.task/acc": mean + draw.normal(0, 0.01)}
            cells.append(cell({"method": method, "seed": seed}, values, folders={"train": f"steps/{folder.name}"}))
    failed = cell({"method": NASTY, "seed": 0}, {}) | {"status": "failed", "failed_step": "train", "error": NASTY}
    (root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*cells, failed]))
    return root / "results.jsonl"


def cell(axes: dict[str, Any], metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    name = " ".join(f"{key}={value}" for key, value in axes.items())
    row = {"cell": name, "axes": axes, "status": "done", "metrics": metrics, "seconds": {"train": 2.0}, "folders": {}}
    return row | more


@pytest.fixture(scope="module")
def report(results: Path) -> Path:
    write_report(results, results.parent / "report", title="A <title>", baseline={"method": "sft"})
    return results.parent / "report"


def values(results: Path, method: str, metric: str) -> np.ndarray:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return np.array([row["metrics"][metric] for row in rows if row["axes"]["method"] == method])


def test_csv_reads_back_to_the_exact_numbers(results: Path, report: Path) -> None:
    rows = {row["method"]: row for row in csv.DictReader((report / "report.csv").open())}
    assert set(rows) == {"none", "sft", "kd"}
    for method in TRUE_MEANS:
        for metric in ("train.val_kd_loss", "evaluate.task/acc"):
            found = values(results, method, metric)
            assert float(rows[method][metric]) == pytest.approx(found.mean(), rel=1e-14)
            error = float(rows[method][f"{metric}:standard_error"])
            assert error == pytest.approx(found.std(ddof=1) / np.sqrt(3), rel=1e-12)
    differences = values(results, "kd", "evaluate.task/acc") - values(results, "sft", "evaluate.task/acc")
    kd = rows["kd"]
    assert float(kd["evaluate.task/acc:difference"]) == pytest.approx(differences.mean())
    expected = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    assert float(kd["evaluate.task/acc:difference_in_standard_errors"]) == pytest.approx(expected)
    assert kd["evaluate.task/acc:comparison"] == "paired"
    assert rows["none"]["evaluate.task/acc:comparison"] == "two-sample"
    assert rows["none"]["evaluate.task/acc:standard_error"] == rows["none"]["train.val_kd_loss"] == ""
    assert rows["none"]["n"] == "1" and not any("stderr" in name for name in kd)
    cells = list(csv.DictReader((report / "cells.csv").open()))
    assert [row["status"] for row in cells] == ["done"] * 7 + ["failed"]
    assert float(cells[1]["evaluate.task/acc"]) == values(results, "sft", "evaluate.task/acc")[0]


def test_markdown_shows_means_errors_differences_and_failures(results: Path, report: Path) -> None:
    text = (report / "report.md").read_text()
    found = values(results, "kd", "evaluate.task/acc")
    assert f"{found.mean():.4f} ± {found.std(ddof=1) / np.sqrt(3):.4f}" in text
    assert "| none | 1 | 0.4000 ± - | - |" in text
    assert "Baseline: method=sft" in text and " p) |" in text and "(- t)" in text
    assert "step train failed" in text and "![losses](losses.png)" in text
    assert (report / "losses.png").read_bytes().startswith(b"\x89PNG")


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: dict[str, str] = {}
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        if tag == "script":
            self.last = dict(attrs).get("id") or "code"
            self.scripts[self.last] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self.last] += data


def test_page_is_whole_and_holds_the_data(results: Path, report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open and set(page.scripts) == {"data", "code"}
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not [value for name, value in page.attributes if name in ("src", "href") and value != "data:,"]
    data = json.loads(page.scripts["data"])
    assert data["rows"] == ["method=none", "method=sft", "method=kd"]
    assert len([curve for curve in data["curves"] if curve["metric"] == "kd_loss"]) == 6
    first = json.loads((results.parent / "steps/train-sft0/metrics.jsonl").read_text().splitlines()[0])
    assert data["curves"][0]["values"][0] == pytest.approx(first["kd_loss"], rel=1e-5)
    assert NASTY not in text and "A &lt;title&gt;" in text
    assert any(NASTY in json.dumps(line) for line in data["cells"]["lines"])


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    rows = [{"step": step, "loss": float(step)} for step in range(1, 2502)]
    (tmp_path / "train/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.jsonl").write_text(
        json.dumps(cell({"a": 1}, {"train.loss": 1.0}, folders={"train": "train"})) + "\n"
    )
    write_report(tmp_path / "results.jsonl", tmp_path / "report", title="t")
    page = Page()
    page.feed((tmp_path / "report/report.html").read_text())
    curve = json.loads(page.scripts["data"])["curves"][0]
    assert curve["bin"] == 3 and len(curve["values"]) == 834
    assert curve["values"][:2] == curve["steps"][:2] == [2.0, 5.0] and curve["values"][-1] == 2500.5
    assert "mean of up to 3 logged steps" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metrics": ["evaluate.task/ac"]}, "did you mean 'evaluate.task/acc'"),
        (
            {"baseline": {"method": "nothing"}},
            "no row has method=nothing; name one row by its axes: method=none; method=sft",
        ),
    ],
)
def test_what_does_not_fit_is_named(results: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        write_report(results, tmp_path, title="t", **settings)


@pytest.mark.parametrize(
    ("text", "words"), [("", "holds no cell"), ("[1]\n", "line 1"), ('{"a": 1}\n', "has no cell, axes")]
)
def test_files_that_are_not_results(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        write_report(tmp_path / "results.jsonl", tmp_path, title="t")


def kdtune(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "kdtune", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_command_needs_no_config(results: Path) -> None:
    result = kdtune(
        "run", "report", f"results={results}", "metrics=[evaluate.*acc]", f"output_dir={results.parent}/by_command"
    )
    assert result.returncode == 0, result.stderr
    header = (results.parent / "by_command/report.csv").read_text().splitlines()[0]
    assert header == "method,n,evaluate.task/acc,evaluate.task/acc:standard_error,evaluate.task/acc:n"
    result = kdtune("run", "report", "results=/nowhere.jsonl")
    assert result.returncode == 2 and "results=/nowhere.jsonl: no such file" in result.stderr
