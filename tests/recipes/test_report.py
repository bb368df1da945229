"""The report: its tables against the results, and its page in a real browser where there is one."""

import csv
import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from command_line import run_here
from markdown_it import MarkdownIt

from kdtune.errors import CheckpointError, ConfigError
from kdtune.reports import write_report
from kdtune.reports.plots import COLORS
from kdtune.runs import curve_look
from kdtune.sweeps.results import step_metrics

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


def cell(axes: dict[str, Any], metrics: Mapping[str, float | None], **more: Any) -> dict[str, Any]:
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
    assert "| none | 1 | 0.4000 ± 0.0100 d | - |" in text, "of one seed the task's own standard error"
    assert "Baseline: method=sft" in text and " p, n 3)" in text and "(- t, n 1, 3)" in text
    assert "covers the seeds alone" in text
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


def write(folder: Path, cells: list[dict[str, Any]], **settings: Any) -> str:
    """A report of cells; its Markdown."""
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cells))
    write_report(folder / "results.jsonl", folder / "report", title="t", **settings)
    return (folder / "report/report.md").read_text()


def page_data(folder: Path) -> dict[str, Any]:
    page = Page()
    page.feed((folder / "report/report.html").read_text())
    return json.loads(page.scripts["data"])


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    losses: dict[str, list[float | None]] = {
        "a": [1.0, 3.0, None],
        "b": [None, None, None],
        "c": [1.0, 2.0, float("nan")],
    }
    cells = [cell({"m": m, "seed": seed}, {"train.loss": loss}) for m in losses for seed, loss in enumerate(losses[m])]
    text = write(tmp_path, cells)
    assert "| a | 3 | 2.0000 ± 1.0000 (2 of 3) |" in text and "| b | 3 | - (0 of 3) |" in text
    assert "| c | 3 | 1.5000 ± 0.5000 (2 of 3) |" in text
    rows = list(csv.DictReader((tmp_path / "report/report.csv").open()))
    assert [row["train.loss:n"] for row in rows] == ["2", "0", "2"]
    assert [line[3][0] for line in page_data(tmp_path)["cells"]["lines"]][:3] == ["1.0000", "3.0000", "not finite"]


def test_a_large_number_has_an_exponent(tmp_path: Path) -> None:
    text = write(tmp_path, [cell({"seed": seed}, {"train.total_flops": 1.1e13 + 1e12 * seed}) for seed in range(3)])
    assert "| 1.2e+13 ± 5.774e+11 |" in text
    assert page_data(tmp_path)["cells"]["lines"][0][2][0] == "1.1e+13"


def test_null_metrics_of_a_step_are_kept(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.0, "val_kd_loss": 1.0, "note": "x", "total_flops": 5},
            {"step": 2, "loss": None, "val_kd_loss": None, "total_flops": 7}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.json").write_text('{"metrics": {"a/acc": NaN, "b/acc": 0.5}}')
    assert step_metrics(tmp_path) == {
        "loss": None,
        "val_kd_loss": None,
        "total_flops": 7.0,
        "a/acc": None,
        "b/acc": 0.5,
    }


def test_only_what_passes_the_bound_of_t_is_strong(tmp_path: Path) -> None:
    """Three paired seeds: 3.5 standard errors are not beyond the bound 4.3, 8.7 are."""
    noise = {"base": (0.0, 0.0, 0.0), "three": (1.0, 2.0, 3.0), "nine": (4.0, 5.0, 6.0)}
    cells = [cell({"m": m, "seed": seed}, {"train.loss": value}) for m in noise for seed, value in enumerate(noise[m])]
    text = write(tmp_path, cells, baseline={"m": "base"})
    assert "| three | +2.0000 (+3.5 p, n 3) |" in text and "| nine | **+5.0000 (+8.7 p, n 3)** |" in text
    assert [line[2][3] for line in page_data(tmp_path)["summary"]["lines"]] == ["", "", "strong"]
    rows = list(csv.DictReader((tmp_path / "report/report.csv").open()))
    assert [row["train.loss:bound"] for row in rows] == ["", "4.303", "4.303"]


def compared(folder: Path) -> list[tuple[str, str, str]]:
    """Of each row of report.csv: what it is compared with, the difference in train.loss, and how it was taken."""
    rows = csv.DictReader((folder / "report/report.csv").open())
    return [(row["baseline"], row["train.loss:difference"], row["train.loss:comparison"]) for row in rows]


def test_a_baseline_of_several_rows_is_matched_by_the_other_axes(tmp_path: Path) -> None:
    """KD against no KD at each learning rate: the differences are numpy's, of cells with the same lr and seed."""
    draw = np.random.default_rng(1)
    losses = {(ratio, lr): draw.normal(size=3) for ratio in (0.0, 0.5, 1.0) for lr in (0.1, 0.2)}
    cells = [
        cell({"kd_ratio": ratio, "lr": lr, "seed": seed}, {"train.loss": loss})
        for (ratio, lr), of_seed in losses.items() for seed, loss in enumerate(of_seed)
    ]  # fmt: skip
    text = write(tmp_path, cells, baseline={"kd_ratio": 0})
    found = compared(tmp_path)
    for (ratio, lr), (name, value, kind) in zip(losses, found, strict=True):
        if ratio == 0:
            assert (name, value, kind) == ("", "", "")
        else:
            assert (name, kind) == (f"kd_ratio=0.0 lr={lr}", "paired")
            assert float(value) == pytest.approx((losses[ratio, lr] - losses[0.0, lr]).mean(), rel=1e-12)
    assert "Baseline: the row with kd_ratio=0 and otherwise the same axis values" in text
    table = text.split("## Difference to the baseline")[1].strip().splitlines()
    assert len(table) == 2 + 4 and all(line.startswith(("| 0.5", "| 1.0")) for line in table[2:])
    details = [line[3][2] for line in page_data(tmp_path)["summary"]["lines"]]
    assert details[:2] == ["baseline"] * 2 and all(" p, n 3)" in detail for detail in details[2:])
    latex = (tmp_path / "report/report.tex").read_text()
    assert r"difference to the row with kd\_ratio=0 and otherwise the same axis values" in latex


def test_axes_that_do_not_matter_to_the_baseline_need_not_match(tmp_path: Path) -> None:
    """As in a sweep whose rows without a teacher have no axis `teacher`."""
    rows: list[dict[str, Any]] = [
        {"m": "start"}, {"m": "sft", "lr": 1}, {"m": "sft", "lr": 2}, {"m": "kd", "lr": 1, "teacher": "a"},
        {"m": "kd", "lr": 2, "teacher": "a"}, {"m": "kd", "lr": 2, "teacher": "b"}, {"m": "kd", "lr": 3, "teacher": "b"},
    ]  # fmt: skip
    write(
        tmp_path, [cell(axes, {"train.loss": float(index)}) for index, axes in enumerate(rows)], baseline={"m": "sft"}
    )
    assert [(name, value) for name, value, _ in compared(tmp_path)] == [
        ("", ""), ("", ""), ("", ""), ("m=sft lr=1", "2.0"), ("m=sft lr=2", "2.0"), ("m=sft lr=2", "3.0"), ("", ""),
    ]  # fmt: skip


def test_cells_to_come_decide_whether_a_baseline_is_one_row(tmp_path: Path) -> None:
    """With the baseline of one learning rate finished alone, a row of the other one is not compared with it."""
    planned = [{"r": ratio, "lr": lr} for ratio in (0, 1) for lr in (1, 2)]
    cells = [cell(axes, {"train.loss": float(index)}) for index, axes in enumerate(planned) if index != 1]
    write(tmp_path, cells, baseline={"r": 0}, planned=planned)
    assert [name for name, *_ in compared(tmp_path)] == ["", "r=0 lr=1", ""]
    write(tmp_path, cells, baseline={"r": 0})
    assert [name for name, *_ in compared(tmp_path)] == ["", "r=0 lr=1", "r=0 lr=1"], "of these cells it is one row"


def test_axis_values_of_different_types_are_different_rows(tmp_path: Path) -> None:
    cells = [cell({"a": value, "seed": 0}, {"train.loss": float(i)}) for i, value in enumerate([1, "1", True, "true"])]
    table = write(tmp_path, cells).split("## Results")[1].strip().splitlines()
    assert len(table) == 2 + 4


def test_standard_errors_of_filtered_metrics_are_no_metrics_of_their_own(tmp_path: Path) -> None:
    cells = [cell({"a": 1}, {"e.t/exact,strict": 0.5, "e.t/exact_stderr,strict": 0.1})]
    assert "| a | n | t/exact,strict |\n| :-- | --: | --: |\n| 1 | 1 | 0.5000 ± 0.1000 d |" in write(tmp_path, cells)
    assert "e.t/exact,strict:document_error" in (tmp_path / "report/report.csv").read_text()


def test_without_strict_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    text = write(tmp_path, [cell({"a": 1}, {"train.loss": 1.0})], metrics=["x.*"], baseline={"a": 2}, strict=False)
    assert "Left out: metrics: 'x.\\*' fits none" in text and "Left out: baseline: no row has a=2" in text
    assert "| a | n | loss |" in text, "all metrics, where none of the chosen ones is there"


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
    with pytest.raises((ConfigError, CheckpointError), match=words):
        write_report(tmp_path / "results.jsonl", tmp_path, title="t")


def trained_cell(folder: Path, axes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A finished cell with a training run of six steps as finetune and knowledge_distillation leave it."""
    run = folder / f"train-{len(list(folder.glob('train-*')))}"
    run.mkdir()
    config = {
        "dataset": {"_component_": "kdtune.data.alpaca_dataset", "source": "/home/me/secret/rows.jsonl"},
        "dataset_val": {"_component_": "kdtune.data.quickstart_dataset", "split": "test"},
        "tokenizer": {"_component_": "kdtune.tokenizers.byte_tokenizer", "max_seq_len": 64},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01}, "batch_size": 4, "gradient_accumulation_steps": 1,
        "kd_ratio": 0.5, "kd_loss": {"_component_": "kdtune.losses.ForwardKLLoss"}, "dtype": "fp32", "seed": 0,
        "checkpointer": {"checkpoint_dir": "/models/Tiny-Instruct"},
    }  # fmt: skip
    (run / "config.yaml").write_text(json.dumps(config | changes))
    start = {
        "started": "2026-11-29T18:00:00+00:00",
        "versions": {"kdtune": "0.1.0", "torch": "2.13.0"},
        "batches_per_step": 2,
    }
    (run / "run.json").write_text(json.dumps({"starts": [start]}))
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 3 / step, "class_loss": 4 / step, "kd_loss": 2 / step, "num_valid_tokens": 10}
        for step in range(1, 7)
    ]
    rows[0] |= {"val_kd_loss": 2.0, "val_class_loss": 3.0}
    rows[-1] |= {"val_kd_loss": 1.0, "val_class_loss": 2.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cell(axes, {"train.val_kd_loss": 1.0}, folders={"train": run.name})


def panels(folder: Path) -> dict[str, list[list[int]]]:
    """The rows of each panel of the page, by metric."""
    found: dict[str, list[list[int]]] = {}
    for panel in page_data(folder)["panels"]:
        found.setdefault(panel["metric"], []).append(panel["rows"])
    return found


def test_curves_that_mean_different_things_have_panels_of_their_own(tmp_path: Path) -> None:
    skewed = {"_component_": "mine.SkewedLoss"}
    other = {"_component_": "kdtune.data.quickstart_dataset", "split": "train"}
    cells = [
        trained_cell(tmp_path, {"a": 0}),
        trained_cell(tmp_path, {"a": 1}, optimizer={"_component_": "torch.optim.SGD", "lr": 0.1}, seed=3),
        trained_cell(tmp_path, {"a": 2}, kd_loss=skewed),
        trained_cell(tmp_path, {"a": 3}, dataset_val=other),
    ]
    write(tmp_path, cells)
    assert panels(tmp_path) == {
        "kd_loss": [[0, 1, 3], [2]], "class_loss": [[0, 1, 2, 3]],
        "val_kd_loss": [[0, 1], [2], [3]], "val_class_loss": [[0, 1, 2], [3]],
    }  # fmt: skip
    titles = [panel["title"] for panel in page_data(tmp_path)["panels"] if panel["metric"] == "kd_loss"]
    assert titles[0].startswith("KL to the teacher (1 of 2") and titles[1].startswith("Skewed to the teacher (2 of 2")
    units = [panel["unit"] for panel in page_data(tmp_path)["panels"] if panel["metric"] == "kd_loss"]
    assert units == ["nats per token", "per token"]
    drawn = (tmp_path / "report/losses.svg").read_text()
    assert "Skewed to the teacher" in drawn and "(2 of 2: other data" in drawn and drawn.count("Held-out") == 5


def with_another_term(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The cell, its total loss with a term of the user's own in it."""
    file = folder / row["folders"]["train"] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(one | {"loss": one["loss"] + 0.1}) + "\n" for one in rows))
    return row


def test_a_total_loss_is_drawn_where_it_is_more_than_the_two_that_are_drawn(tmp_path: Path) -> None:
    cells = [
        trained_cell(tmp_path, {"ratio": ratio, "lr": lr}, kd_ratio=ratio, dataset={"_component_": "d", "lr": lr})
        for ratio in (0.5, 0.75) for lr in (1, 2)
    ]  # fmt: skip
    for row in cells[2:]:
        file = tmp_path / row["folders"]["train"] / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(one | {"loss": 2.5 / one["step"]}) + "\n" for one in rows))
    text = write(tmp_path, cells)
    assert "loss" not in panels(tmp_path) and len(panels(tmp_path)["kd_loss"]) == 2
    assert not any(curve["metric"] == "loss" for curve in page_data(tmp_path)["curves"])
    assert "Total loss" not in (tmp_path / "report/losses.svg").read_text()
    assert "the total loss, a mix of the two by kd_ratio, is not drawn" in text
    cells = [with_another_term(tmp_path, row) for row in cells]
    write(tmp_path, cells)
    assert "loss" not in panels(tmp_path), "of several kd_ratios"
    assert "Total loss" in (tmp_path / "report/losses_by_lr.svg").read_text(), "of one kd_ratio it is"


def test_curves_that_coincide_can_be_told_apart(tmp_path: Path) -> None:
    """Six runs with the same numbers: each has dashes and a marker that no other has, whatever the colour."""
    cells = [trained_cell(tmp_path, {"a": number}) for number in range(6)]
    write(tmp_path, cells)
    drawing = ElementTree.fromstring((tmp_path / "report/losses.svg").read_bytes())
    lines = [list(group) for group in drawing.findall(".//{*}g") if group.get("id", "").startswith("line2d")]
    # A curve is its line, the definition of its marker, and the places of that; a tick of an axis has no line.
    curves = [
        (line[0].get("style"), line[1][0].get("d"))
        for line in lines
        if len(line) == 3 and any(color in (line[0].get("style") or "") for color in COLORS)
    ]
    patterns = {(re.sub("stroke: #[0-9a-f]{6}", "", style or ""), marker) for style, marker in curves}
    assert len(patterns) == len(set(curves)) == len(cells)
    every = [curve_look(place, 100, COLORS) for place in range(35)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in every}) == 35
    assert len({look["markevery"][0] for look in every[:7]}) == 7, "and their markers stand at other steps"
    solid = [look for look in every if look["linestyle"] == "-"]
    assert max(look["zorder"] for look in solid) < min(look["zorder"] for look in every if look not in solid)


def test_the_report_says_what_was_run(tmp_path: Path) -> None:
    cells = [
        trained_cell(tmp_path, {"lr": lr}, optimizer={"_component_": "torch.optim.AdamW", "lr": lr})
        for lr in (0.1, 0.2)
    ]
    text = write(tmp_path, cells)
    page = (tmp_path / "report/report.html").read_text()
    for name, value in (("base model", "Tiny-Instruct"), ("learning rate", "0.1 | 0.2"), ("steps", "6"), ("examples a step", "8"),
                        ("data", "kdtune.data.alpaca_dataset(source=rows.jsonl, split=train)"), ("date", "2026-11-29"),
                        ("versions", "kdtune 0.1.0, torch 2.13.0")):  # fmt: skip
        assert f"<th scope=row>{name}</th><td>{value}</td>" in page
        assert f"| {name} | {value.replace('|', chr(92) + '|')} |" in text
    assert "secret" not in page + text, "no path of this machine"


def test_runs_of_a_users_own_recipe_are_left_out_of_what_was_run(tmp_path: Path) -> None:
    lacking = ["seed", "dtype", "kd_loss", "optimizer", "batch_size"]
    cells = [trained_cell(tmp_path, {"a": number}) for number in range(len(lacking) + 1)]
    for key, row in zip(lacking, cells[1:], strict=True):
        file = tmp_path / row["folders"]["train"] / "config.yaml"
        config = json.loads(file.read_text())
        del config[key]
        file.write_text(json.dumps(config))
    text = write(tmp_path, cells)
    assert "## What was run" in text and "| seed | 0 |" in text and len(panels(tmp_path)["class_loss"][0]) == len(cells)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"starts": [{"ver', "is not JSON"),
        ('{"starts": [1]}', "is no record of a run's starts"),
        ("{}", "is no record of a run's starts"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(tmp_path: Path, content: str, what: str) -> None:
    row = trained_cell(tmp_path, {"a": 0})
    file = tmp_path / row["folders"]["train"] / "run.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: {what}.*put it right, or remove it"):
        write(tmp_path, [row])


def test_latex_is_whole_and_says_n_and_what_the_error_is(tmp_path: Path) -> None:
    cells = [
        trained_cell(tmp_path, {"m_%": method, "seed": seed}, seed=seed) for method in ("a&b", "c") for seed in (0, 1)
    ]
    cells = [row | {"metrics": {"train.x_y": float(index) - 1}} for index, row in enumerate(cells)]
    write(tmp_path, cells, baseline={"m_%": "c"})
    text = (tmp_path / "report/report.tex").read_text()
    assert r"a\&b & $2$ & $-0.5000$ $\pm$ $0.5000$ \\" in text and r"m\_\% & n & x\_y \\" in text
    assert r"mean over n seeds $\pm$ its standard error $s/\sqrt{n}$" in text and "n = 2 seeds" in text
    for kind in ("table", "figure", "tabular"):
        assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") > 0
    assert text.count("{") == text.count("}") and r"\toprule" in text
    for name in re.findall(r"includegraphics\[.*?\]\{(.*?)\}", text):
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
            assert (tmp_path / f"report/{name}{suffix}").read_bytes().startswith(magic)
    outside = re.sub(r"\$[^$]*\$", "", re.sub(r"%.*", "", text, count=1))
    assert not re.search(r"(?<!\\)[_#]", re.sub(r"\\(label|includegraphics\[.*?\])\{.*?\}", "", outside))


LATEX_NAMES = [
    "a&b_c%d#e$f~g^h\\i{j}k<l>m", "Größe ß éàøå çŁš ąę “quoted” ‘x’ – — … €", "Ω 中文 😀 √2 ₁ ≤ ×±·½",
    "--flag ``x'' \"q\" a|b ?`!` <<x>> ,,",
]  # fmt: skip


def report_with_hard_names(folder: Path) -> Path:
    """A report whose names, values, title and settings have what LaTeX reads as more than a character."""
    cells = []
    for number, name in enumerate(LATEX_NAMES):
        long = {"_component_": "a.dataset", "source": "x" * 300, "name": name.replace("😀", "")}
        row = trained_cell(folder, {"größe": name, "l_%&": number % 2}, dataset=long)
        cells.append(row | {"metrics": {"train.x_^y<ü": float(number)}})
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cells))
    baseline = {"größe": LATEX_NAMES[0]}
    write_report(folder / "results.jsonl", folder / "report", title=f"T {LATEX_NAMES[0]} √n", baseline=baseline)
    return folder / "report"


def test_latex_has_only_what_every_engine_sets(tmp_path: Path) -> None:
    """Beside accented letters and a few signs all is ASCII, and no quoted character is left bare."""
    text = (report_with_hard_names(tmp_path) / "report.tex").read_text().partition("\n")[2]
    letters = {c for c in text if not c.isascii()}
    assert letters <= set("öüßéàøåçŁš“”‘’–—…€·"), letters
    for shown in (r"a\&b\_c\%d\#e\$f\textasciitilde{}g\textasciicircum{}h\textbackslash{}i\{j\}k\textless{}l\textgreater{}m",
                  "U+03A9 U+4E2DU+6587 U+1F600", r"-{}-flag", r"{\ttfamily\char34}q", "U+0105U+0119", r"$\surd$n"):  # fmt: skip
        assert shown in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_pdflatex_compiles_the_report(tmp_path: Path) -> None:
    folder = report_with_hard_names(tmp_path)
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{report}\end{document}"
    (folder / "main.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "main.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and (folder / "main.pdf").read_bytes().startswith(b"%PDF")


UNSAFE = [
    "<script>alert(1)</script>",
    "[a](javascript:alert(1)) ![b](http://example.org/x.png)",
    "a|b",
    "`code` **bold** _soft_ ~~gone~~ $x$ \\\\",
    "two\nlines\n\n# heading",
    "&lt;b&gt; <!-- c -->",
    "\x1b[31m \x00 \ud800",
    "```\n<b>out</b>\n````",
]


def test_markdown_shows_text_from_data_as_it_is(tmp_path: Path) -> None:
    """Rendered by markdown-it-py (CommonMark with GitHub's tables), nothing of a value is markup."""
    render = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render
    cells = [cell({"a": text}, {"train.loss": 1.0, f"train.{text}": 2.0}) for text in UNSAFE]
    cells += [
        cell({"a": text, "b": 1}, {}) | {"status": "failed", "failed_step": "train", "error": text} for text in UNSAFE
    ]
    text = write(tmp_path, cells, baseline={"a": UNSAFE[0]})
    page = render(text)
    assert not re.search(
        r"<(script|b|em|strong|a|s|code)\b(?! class)",
        re.sub(r"<pre>.*?</pre>|<p><strong>.*?</strong>", "", page, flags=re.S),
    )
    assert "<img" not in page, "no training folder, so no plot"
    shown = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    columns = 2 + 1 + len(UNSAFE)
    wanted = [
        " ".join(text.encode("unicode_escape").decode().replace("\\n", " ").replace("\\\\", "\\").split())
        for text in UNSAFE
    ]
    assert shown[: columns * len(UNSAFE) : columns] == wanted
    blocks = [html.unescape(block) for block in re.findall(r"<pre><code>(.*?)</code></pre>", page, flags=re.S)]
    assert [block.strip() for block in blocks] == [
        text.replace("\x1b", "\\x1b").replace("\x00", "\\x00").replace("\ud800", "\\ud800") for text in UNSAFE
    ]


def test_csv_fields_are_no_formulas_and_numbers_stay_numbers(tmp_path: Path) -> None:
    texts = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1"]
    numbers = [-1, 1e-05, "-2.5", -0.5]
    cells = [cell({"status": text, "n": 7}, {"train.loss": -1.5, "=x": -2.0}) for text in [*texts, *numbers]]
    write(tmp_path, cells)
    for name, axis in (("report.csv", "status"), ("cells.csv", "axis:status")):
        rows = list(csv.DictReader((tmp_path / "report" / name).open(newline="")))
        assert [row[axis] for row in rows] == [f"'{text}" for text in texts] + ["-1", "1e-05", "-2.5", "-0.5"]
        assert {row["train.loss"] for row in rows} == {"-1.5"} and {row["'=x"] for row in rows} == {"-2.0"}
    assert {row["axis:n"] for row in csv.DictReader((tmp_path / "report/report.csv").open())} == {"7"}
    assert {row["status"] for row in csv.DictReader((tmp_path / "report/cells.csv").open())} == {"done"}


def test_cells_of_one_row_and_seed_are_told(tmp_path: Path) -> None:
    cells = [cell({"a": 1, "seed": seed}, {"train.loss": loss}) for seed, loss in ((0, 1.0), (1, 3.0), (0, 100.0))]
    cells.append(cell({"a": 1, "seed": 1}, {}) | {"status": "failed", "failed_step": "train", "error": ""})
    words = "results: lines 1 and 3 are both of one row and seed, a=1 seed=0; keep one of them"
    with pytest.raises(ConfigError, match=words):
        write(tmp_path, cells)
    text = write(tmp_path, cells, strict=False)
    assert f"Left out: {words}" in text and "| 1 | 2 | 2.0000 ± 1.0000 |" in text, "the first is kept"
    assert [line[1][0] for line in page_data(tmp_path)["summary"]["lines"]] == ["2"]


def test_plots_of_axes_with_any_names_and_values(tmp_path: Path) -> None:
    """A dollar is no formula, a slash no folder, and what no font or file can hold is written out."""
    cells = []
    for index, (method, value) in enumerate([("$\\nothing{", 1), ("\ud800\x00<&", 1), ("$\\nothing{", 2)]):
        (tmp_path / f"train{index}").mkdir()
        rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
        (tmp_path / f"train{index}/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        axes = {"../../method": method, "b": value}
        cells.append(cell(axes, {"train.loss": 1.0}, folders={"train": f"train{index}"}))
    text = write(tmp_path, cells)
    names = ["losses.png", "losses_by_______method.png", "losses_by_b.png"]
    assert sorted(path.name for path in (tmp_path / "report").glob("*.png")) == names
    assert all(f"]({name})" in text for name in names)


def test_the_command_needs_no_config(results: Path) -> None:
    result = run_here(
        "run", "report", f"results={results}", "metrics=[evaluate.*acc]", f"output_dir={results.parent}/by_command"
    )
    assert result.code == 0, result.err
    header = (results.parent / "by_command/report.csv").read_text().splitlines()[0]
    assert (
        header
        == "method,n,evaluate.task/acc,evaluate.task/acc:standard_error,evaluate.task/acc:n,evaluate.task/acc:document_error"
    )
    again = ("run", "report", f"results={results}", f"output_dir={results.parent}/by_command")
    result = run_here(*again)
    assert result.code == 2 and "by_command: holds a report; overwrite=true replaces it" in result.err
    assert (results.parent / "by_command/report.csv").read_text().splitlines()[0] == header
    assert run_here(*again, "overwrite=true").code == 0
    assert (results.parent / "by_command/report.csv").read_text().splitlines()[0] != header
    result = run_here("run", "report", "results=/nowhere.jsonl")
    assert result.code == 2 and "results=/nowhere.jsonl: no such file" in result.err


def test_what_was_run_names_every_ratio_and_what_only_some_runs_have(tmp_path: Path) -> None:
    cells = [trained_cell(tmp_path, {"kd_ratio": ratio}, kd_ratio=ratio) for ratio in (0.0, 0.5)]
    text = write(tmp_path, cells)
    assert "| kd_ratio | 0 \\| 0.5 |" in text
    assert "| divergence from the teacher | kdtune.losses.ForwardKLLoss (1 of 2 runs) |" in text
