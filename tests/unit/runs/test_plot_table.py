import doctest
import json
import math
import struct

import numpy as np
import pytest

import kdtune.runs.table
from kdtune.errors import DataError
from kdtune.runs import TrainingRun, comparison_table, format_table, plot_losses, shared_divergence_title
from kdtune.runs.plot import running_mean


def write_metrics(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_plot_has_a_panel_for_each_loss(tmp_path):
    rows = [{"step": k, "loss": 5 / k, "kd_loss": 4 / k, "class_loss": 6 / k} for k in range(1, 60)]
    rows.insert(20, {"step": 20, "val_kd_loss": 0.4, "val_class_loss": None})
    three = plot_losses(write_metrics(tmp_path / "m.jsonl", rows), tmp_path / "three.png")
    one = plot_losses(
        write_metrics(tmp_path / "n.jsonl", [{"step": 1, "class_loss": 2.0, "kd_loss": None}]), tmp_path / "one.png"
    )
    assert three == tmp_path / "three.png"
    assert png_size(three)[0] > 2.5 * png_size(one)[0] / 2


def test_plot_draws_the_values_it_is_given(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    rows = [{"step": 0, "val_kd_loss": 7.0}] + [{"step": k, "loss": 1.0 * k, "kd_loss": 2.0 * k} for k in (1, 2, 3)]
    plot_losses(write_metrics(tmp_path / "m.jsonl", rows), tmp_path / "p.png")
    kd, total = figures[0].axes
    assert [axes.get_title() for axes in (kd, total)] == ["KD loss (KL to the teacher)", "Total loss"]
    assert [list(line.get_ydata()) for line in kd.get_lines()] == [[2.0, 4.0, 6.0], [7.0]]
    assert [list(line.get_xdata()) for line in kd.get_lines()] == [[1, 2, 3], [0]]
    assert [text.get_text() for text in kd.get_legend().get_texts()] == ["training", "validation"]
    assert kd.get_ylabel() == "KL, nats per token" and kd.get_xlabel() == "optimizer step"
    plot_losses(tmp_path / "m.jsonl", tmp_path / "p.png", divergence="JensenShannon")
    kd, total = figures[1].axes
    assert kd.get_title() == "KD loss (JensenShannon to the teacher)"
    assert [axes.get_ylabel() for axes in (kd, total)] == ["JensenShannon, per token", "loss, per token"]


def test_plot_without_losses_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no losses to plot"):
        plot_losses(write_metrics(tmp_path / "m.jsonl", [{"step": 1, "lr": 0.1}]), tmp_path / "p.png")


def test_table():
    text = format_table([{"name": "student", "KL": 10.25, "n": 3}, {"name": "t", "KL": None, "more": "x"}])
    assert text.splitlines() == [
        "name         KL  n  more",
        "-------  ------  -  ----",
        "student  10.250  3  -",
        "t             -  -  x",
    ]
    assert format_table([]) == ""
    assert doctest.testmod(kdtune.runs.table).failed == 0


def test_a_table_that_is_too_wide_is_turned_and_then_cut_into_paragraphs():
    rows = [
        {"held-out": "before", "cross entropy": 7.25, "KL": None},
        {"held-out": "after", "cross entropy": 3.5, "KL": 0.5},
    ]
    wide = format_table(rows)
    assert format_table(rows, width=30) == wide and max(map(len, wide.splitlines())) == 30
    assert format_table(rows, width=29).splitlines() == [
        "held-out       before  after",
        "-------------  ------  -----",
        "cross entropy   7.250  3.500",
        "KL                  -  0.500",
    ]
    assert format_table(rows, width=27).splitlines() == [
        "held-out: before", "cross entropy: 7.250", "KL: -", "", "held-out: after", "cross entropy: 3.500", "KL: 0.500",
    ]  # fmt: skip


def test_the_teacher_is_in_the_table_whichever_validation_has_measured_it():
    """As in the model card: the first one may have been without it, or not finite."""
    rows = [{"step": step, "val_class_loss": 2.0, "val_kd_loss": 1.0, "val_agreement": 0.5} for step in (0, 1)]
    rows[0]["val_teacher_class_loss"] = None
    assert "\nteacher" not in comparison_table({"student": rows})
    rows[1]["val_teacher_class_loss"] = 1.5
    line = next(line for line in comparison_table({"student": rows}).splitlines() if line.startswith("teacher"))
    assert line.split() == ["teacher", "1.500", f"{math.exp(1.5):.4g}", "0.000", "100.0%"]


def test_the_divergence_has_its_own_name_in_the_table():
    rows = [{"step": 0, "val_class_loss": 2.0, "val_kd_loss": 1.0, "val_agreement": 0.5, "val_teacher_class_loss": 1.0}]
    assert "KL to teacher" in comparison_table({"student": rows})
    text = comparison_table({"student": rows}, divergence="JensenShannon")
    assert "JensenShannon to teacher" in text and "KL" not in text
    assert text.split("  ")[0] == "held-out" and "cross entropy (nats)" in text, "only the KL is known to be in nats"
    rows[0]["val_forward_kl"] = 0.75
    header, _, *lines = comparison_table({"student": rows}, divergence="JensenShannon").splitlines()
    assert "KL to teacher (nats)" in header and "  0.750  " in lines[-1]
    assert "0.750" not in comparison_table({"student": rows})


def test_runs_that_are_compared_name_their_divergence(tmp_path):
    rows = [{"step": 0, "val_class_loss": 2.0, "val_kd_loss": 1.0}]
    runs = {name: TrainingRun(tmp_path, {"kd_loss": {"_component_": name}}, rows) for name in (
        "kdtune.losses.ForwardKLLoss", "mine.JensenShannonLoss")}  # fmt: skip
    assert [shared_divergence_title({"run": run}) for run in runs.values()] == ["KL", "JensenShannon"]
    assert shared_divergence_title({"sft": TrainingRun(tmp_path, {}, [{"step": 0, "val_class_loss": 2.0}])}) == "KL"


def test_the_last_table_of_a_run_fits_into_sixty_columns(monkeypatch):
    first = {"step": 0, "val_class_loss": 5.0, "val_kd_loss": 0.5, "val_agreement": 0.25, "val_teacher_class_loss": 4.0}
    last = {"step": 480, "val_class_loss": 4.5, "val_kd_loss": 0.25, "val_agreement": 0.5}
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = comparison_table({"student": [first, last]})
    monkeypatch.setenv("COLUMNS", "60")
    narrow = comparison_table({"student": [first, last]})
    assert max(map(len, wide.splitlines())) > 60 >= max(map(len, narrow.splitlines()))
    assert narrow.splitlines()[0].split() == [
        "held-out",
        "(nats)",
        "teacher",
        "student,",
        "step",
        "0",
        "student,",
        "step",
        "480",
    ]
    assert narrow.splitlines()[-1].split() == ["top-1", "agreement", "100.0%", "25.0%", "50.0%"]


def test_therunning_mean_is_numpys_convolution() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    found = running_mean(values, 3)
    assert found[:2] == [3.0, 2.0], "of what there is"
    assert found[2:] == pytest.approx(np.convolve(values, np.ones(3) / 3, mode="valid"))
