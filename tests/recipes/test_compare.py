"""Training runs side by side: what the table, plot and CSV say, and which runs are not compared."""

import csv
import fcntl
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

CONFIG: dict[str, Any] = {
    "dataset_val": {"_component_": "kdtune.data.quickstart_dataset", "split": "test"},
    "tokenizer": {"_component_": "kdtune.tokenizers.byte_tokenizer", "max_seq_len": 256},
    "teacher_checkpointer": {"_component_": "kdtune.checkpoint.Checkpointer", "checkpoint_dir": "models/teacher"},
    "kd_loss": {"_component_": "kdtune.losses.ForwardKLLoss"},
}
BEFORE = {"step": 0, "val_class_loss": 3.25, "val_kd_loss": 0.875, "val_agreement": 0.5, "val_teacher_class_loss": 2.5}
AFTER = {
    "sft": {"step": 8, "loss": 2.0, "val_class_loss": 2.75, "val_kd_loss": 0.625, "val_agreement": 0.625},
    "kd": {"step": 8, "loss": 0.5, "val_class_loss": 2.875, "val_kd_loss": 0.3125, "val_agreement": 0.75},
}


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def write_run(
    folder: Path, rows: list[dict[str, Any]], answers: tuple[str, str] = ("?", "Paris."), **changes: Any
) -> Path:
    """A run's folder: its config, its metrics, and one question answered before and after."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [("student", 0, answers[0]), ("teacher", 0, "It is Paris."), ("student", rows[-1]["step"], answers[1])]
    (folder / "samples.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "model": who, "prompt": "Capital?", "answer": answer}) + "\n"
            for who, step, answer in asked
        )
    )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    middle = {"step": 4, "loss": 1.0, "val_class_loss": 3.0, "val_kd_loss": 0.75, "val_agreement": 0.5}
    return {
        name: write_run(tmp_path / "runs" / name, [BEFORE, {"step": 1, "loss": 2.5}, middle, after], ("?", name))
        for name, after in AFTER.items()
    }


def named(*folders: Path) -> str:
    return f"runs=[{','.join(map(str, folders))}]"


def test_table_and_answers(runs: dict[str, Path], cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("run", "compare", named(*runs.values()))
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    expected = [
        ["teacher", "2.500", f"{math.exp(2.5):.4g}", "0.000", "100.0%"],
        ["before", "training", "3.250", f"{math.exp(3.25):.4g}", "0.875", "50.0%"],
        ["sft,", "step", "8", "2.750", f"{math.exp(2.75):.4g}", "0.625", "62.5%"],
        ["kd,", "step", "8", "2.875", f"{math.exp(2.875):.4g}", "0.312", "75.0%"],
    ]
    start = lines.index(expected[0])
    assert lines[start : start + 4] == expected
    answers = [line.strip() for line in done.out.splitlines() if line.startswith("  [")]
    assert answers == ["[teacher] It is Paris.", "[before training] ?", "[sft, step 8] sft", "[kd, step 8] kd"]
    assert all(len(line) <= 80 for line in done.out.splitlines() if str(tmp_path) not in line)


def test_a_terminal_gets_no_control_sequences(
    runs: dict[str, Path], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model answered is shown, not executed; a file gets it unchanged."""
    (runs["kd"] / "samples.jsonl").write_text(
        json.dumps({"step": 0, "model": "student", "prompt": "\x1b[2JCapital?", "answer": "\x1b]0;title\x07"}) + "\n"
    )
    assert "\x1b[2JCapital?" in cli("run", "compare", named(*runs.values())).out
    monkeypatch.setattr("io.StringIO", Terminal)
    done = cli("run", "compare", named(*runs.values()))
    assert done.code == 0 and "\x1b" not in done.out and "\x07" not in done.out
    assert "> \\x1b[2JCapital?" in done.out and "\\x1b]0;title\\x07" in done.out


def test_csv_has_every_validation_unrounded(runs: dict[str, Path], cli: Callable[..., Any], tmp_path: Path) -> None:
    assert cli("run", "compare", named(*runs.values()), f"output_dir={tmp_path / 'new'}").code == 0
    rows = list(csv.DictReader((tmp_path / "new" / "comparison.csv").open()))
    assert [(row["run"], int(row["step"])) for row in rows] == [(name, step) for name in runs for step in (0, 4, 8)]
    for row in rows:
        expected = AFTER[row["run"]] if row["step"] == "8" else BEFORE if row["step"] == "0" else {"val_kd_loss": 0.75}
        assert float(row["val_kd_loss"]) == expected["val_kd_loss"]
    assert rows[1]["val_teacher_class_loss"] == "", "a step that has not measured it"


def test_plot_has_a_curve_for_each_run_and_the_teachers_line(
    runs: dict[str, Path], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    assert cli("run", "compare", named(*runs.values())).code == 0
    divergence, cross_entropy = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in divergence.get_lines()}
    assert drawn == {"sft": [0.875, 0.75, 0.625], "kd": [0.875, 0.75, 0.3125]}
    drawn = {line.get_label(): list(line.get_ydata()) for line in cross_entropy.get_lines()}
    assert drawn == {"sft": [3.25, 3.0, 2.75], "kd": [3.25, 3.0, 2.875], "teacher": [2.5, 2.5]}
    assert divergence.get_ylim()[0] == 0
    assert len({line.get_color() for line in cross_entropy.get_lines()}) == 3


def test_a_finetuned_model_stands_beside_a_distilled_one(runs: dict[str, Path], cli: Callable[..., Any]) -> None:
    config = {"teacher_checkpointer": None, "kd_loss": None}
    rows = [{"step": 0, "val_class_loss": 3.25}, {"step": 8, "val_class_loss": 2.75}]
    plain = write_run(runs["sft"].parent / "plain", rows, **config)
    done = cli("run", "compare", named(plain, runs["kd"]))
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["plain,", "step", "8", "2.750", f"{math.exp(2.75):.4g}", "-", "-"] in lines
    assert ["kd,", "step", "8", "2.875", f"{math.exp(2.875):.4g}", "0.312", "75.0%"] in lines
    assert "left out" not in done.out


def test_other_teachers_leave_cross_entropy_alone(runs: dict[str, Path], cli: Callable[..., Any]) -> None:
    teacher = CONFIG["teacher_checkpointer"] | {"checkpoint_dir": "models/other"}
    other = write_run(
        runs["kd"].parent / "other",
        [BEFORE, AFTER["kd"] | {"val_student_mass_outside": 0.25}],
        teacher_checkpointer=teacher,
    )
    done = cli("run", "compare", named(runs["kd"], other))
    assert done.code == 0, done.err
    assert "KL" not in done.out and "agreement  " not in done.out and "\nteacher" not in done.out
    assert "teacher_checkpointer.checkpoint_dir: 'models/teacher' in kd, 'models/other' in other" in done.out
    (header, *_) = csv.reader((other.parent / "comparison.csv").open())
    assert header == ["run", "step", "val_class_loss"]
    assert ["other,", "step", "8", "2.875", f"{math.exp(2.875):.4g}"] in [
        line.split() for line in done.out.splitlines()
    ]


def test_one_folder_by_two_paths_is_no_difference(
    runs: dict[str, Path], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    teacher = CONFIG["teacher_checkpointer"] | {"checkpoint_dir": str(tmp_path / "models" / "teacher")}
    other = write_run(runs["kd"].parent / "other", [BEFORE, AFTER["kd"]], teacher_checkpointer=teacher)
    done = cli("run", "compare", named(runs["kd"], other))
    assert done.code == 0 and "left out" not in done.out and "KL to teacher" in done.out


def record_inputs(run: Path, **inputs: Any) -> None:
    (run / "run.json").write_text(json.dumps({"starts": [{"inputs": {"tokenizer": {"ids": "1a"}} | inputs}]}))


def test_the_same_rows_and_weights_under_other_names_are_compared(
    runs: dict[str, Path], cli: Callable[..., Any]
) -> None:
    """As in runs of two machines: what was recorded of the inputs decides, not what they are called."""
    other = write_run(
        runs["kd"].parent / "other", [BEFORE, AFTER["kd"]],
        dataset_val={"_component_": "mine.dataset", "source": "/there/rows.jsonl"},
        tokenizer={"_component_": "kdtune.tokenizers.load", "path": "/there/teacher"},
        teacher_checkpointer={"_component_": "kdtune.checkpoint.Checkpointer", "checkpoint_dir": "/there/teacher"},
    )  # fmt: skip
    for run in (runs["kd"], other):
        record_inputs(run, dataset_val="27 examples, 5e", teacher_checkpointer={"model.safetensors": "7f"})
    done = cli("run", "compare", named(runs["kd"], other))
    assert done.code == 0, done.err
    assert "left out" not in done.out and "KL to teacher" in done.out


def test_other_rows_under_the_same_name_are_refused(runs: dict[str, Path], cli: Callable[..., Any]) -> None:
    record_inputs(runs["kd"], dataset_val="27 examples, 5e")
    record_inputs(runs["sft"], dataset_val="28 examples, 6e")
    done = cli("run", "compare", named(*runs.values()))
    assert done.code == 2 and "dataset_val: '28 examples, 6e' in sft, '27 examples, 5e' in kd" in done.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"dataset_val": CONFIG["dataset_val"] | {"split": "train"}},
            "dataset_val.split: 'test' in kd, 'train' in other",
        ),
        ({"tokenizer": CONFIG["tokenizer"] | {"max_seq_len": 128}}, "tokenizer.max_seq_len: 256 in kd, 128 in other"),
    ],
)
def test_other_held_out_tokens_are_refused(
    change: dict[str, Any], words: str, runs: dict[str, Path], cli: Callable[..., Any]
) -> None:
    other = write_run(runs["kd"].parent / "other", [BEFORE, AFTER["kd"]], **change)
    done = cli("run", "compare", named(runs["kd"], other))
    assert done.code == 2 and words in done.err and not (other.parent / "comparison.png").exists()


def test_names_are_what_differs_in_the_paths(tmp_path: Path, cli: Callable[..., Any]) -> None:
    folders = [
        write_run(tmp_path / "sweep" / name / "run", [BEFORE, AFTER["kd"]]) for name in ("lr1e-3/kd", "lr1e-4/kd")
    ]
    done = cli("run", "compare", named(*folders))
    assert done.code == 0, done.err
    assert "\nlr1e-3, step 8 " in done.out and "\nlr1e-4, step 8 " in done.out
    assert (tmp_path / "sweep" / "comparison.png").is_file()


@pytest.mark.parametrize(
    ("rows", "words"), [(None, "no metrics.jsonl"), ([{"step": 1, "loss": 2.0}], "has no validation to compare")]
)
def test_a_folder_without_a_validated_run_is_named(
    rows: list[dict[str, Any]] | None, words: str, runs: dict[str, Path], cli: Callable[..., Any]
) -> None:
    other = runs["kd"].parent / "other"
    if rows is None:
        other.mkdir()
    else:
        write_run(other, rows)
    done = cli("run", "compare", named(runs["kd"], other))
    assert done.code == 2 and str(other) in done.err and words in done.err


def test_runs_in_different_trees_need_an_output_dir(
    runs: dict[str, Path], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.path.commonpath", lambda paths: "/")
    done = cli("run", "compare", named(*runs.values()))
    assert done.code == 2 and "output_dir: the runs lie in no folder together but the root" in done.err
    assert cli("run", "compare", named(*runs.values()), f"output_dir={tmp_path}/out").code == 0


def test_a_folder_that_cannot_be_written_to_is_a_finding(runs: dict[str, Path], cli: Callable[..., Any]) -> None:
    file = runs["kd"] / "config.yaml"
    done = cli("run", "compare", named(*runs.values()), f"output_dir={file}")
    assert done.code == 2 and f"output_dir={file}: is a file; name a folder" in done.err


def test_runs_of_a_sweep_that_goes_on_are_compared(runs: dict[str, Path], cli: Callable[..., Any]) -> None:
    with (runs["kd"].parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli("run", "compare", named(*runs.values())).code == 0


def test_a_folder_is_named_once(runs: dict[str, Path], cli: Callable[..., Any]) -> None:
    done = cli("run", "compare", named(runs["kd"], runs["kd"].parent / "sft" / ".." / "kd"))
    assert done.code == 2 and "name each folder once" in done.err


def test_a_validation_that_was_not_finite_is_shown_as_missing(tmp_path: Path, cli: Callable[..., Any]) -> None:
    rows = [BEFORE, AFTER["kd"] | {"val_class_loss": None, "val_kd_loss": None}]
    done = cli("run", "compare", named(write_run(tmp_path / "kd", rows)))
    assert done.code == 0, done.err
    assert ["kd,", "step", "8", "-", "-", "-", "75.0%"] in [line.split() for line in done.out.splitlines()]
