import doctest
import io
import json
import struct

import pytest

import kdtune.training.table
from kdtune.errors import DataError
from kdtune.training import ProgressBar, format_table, plot_losses


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
    assert [axes.get_title() for axes in (kd, total)] == ["KD loss (divergence from the teacher)", "Total loss"]
    assert [list(line.get_ydata()) for line in kd.get_lines()] == [[2.0, 4.0, 6.0], [7.0]]
    assert [list(line.get_xdata()) for line in kd.get_lines()] == [[1, 2, 3], [0]]
    assert [text.get_text() for text in kd.get_legend().get_texts()] == ["training", "validation"]
    assert kd.get_ylabel() == "nats per token" and kd.get_xlabel() == "optimizer step"


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
    assert doctest.testmod(kdtune.training.table).failed == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_every_few_steps_and_the_last():
    stream = io.StringIO()
    with ProgressBar(7, initial=2, every=2, stream=stream) as bar:
        for step in range(3, 8):
            bar.update({"loss": 1.5, "kd_loss": step, "lr": 3e-4, "tokens_per_second": 12345.6, "grad_norm": 1.0})
        bar.write("a note")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 4/7", "step 6/7", "step 7/7", "a note"]
    assert "loss 1.500  kl 4.000  lr 3.00e-04  tok/s 12,346" in lines[0]
    assert lines[2].endswith("00:00 left")


def test_in_a_terminal_a_bar():
    stream = Terminal()
    with ProgressBar(2, stream=stream) as bar:
        bar.update({"loss": 2.0, "lr": 1e-3})
        bar.write("a note")
        bar.update({"loss": 1.0, "lr": 1e-3})
    assert "2/2" in stream.getvalue() and "loss=1.000" in stream.getvalue() and "a note\n" in stream.getvalue()
