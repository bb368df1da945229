"""Compare runs: which ones are comparable, their table, plot and answers."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kdtune.errors import ConfigError
from kdtune.paths import user_path
from kdtune.runs.model_card import divergence_title
from kdtune.runs.record import TrainingRun, differences, read_run

VALIDATION = "val_class_loss"
# What the held-out cross entropy depends on beside the model, and what its distance to the teacher depends on too.
_DATA_KEYS = ("dataset_val", "tokenizer")
_TEACHER_KEYS = ("teacher", "teacher_checkpointer", "teacher_model", "kd_loss")
_TEACHER_METRICS = (
    "val_kd_loss",
    "val_forward_kl",
    "val_agreement",
    "val_teacher_class_loss",
    "val_student_mass_outside",
)


def read_runs(folders: Sequence[str | Path]) -> dict[str, TrainingRun]:
    """Read the training runs in these folders, named by the part of their paths that differs.

    Raises:
        ConfigError: a folder holds no training run with a validation, or two of the folders are the same.
        CheckpointError: a file in one is damaged.
    """
    paths = [user_path(folder) for folder in folders]
    names = _short_names(paths)
    if len(set(names)) < len(names):
        raise ConfigError(f"runs: {', '.join(map(str, folders))}: name each folder once")
    return {name: _validated_run(path) for name, path in zip(names, paths, strict=True)}


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths without the folders that all of them start or end with; for a single path its own name."""
    parts = [path.absolute().resolve().parts for path in paths]
    start = _num_common(parts) if len(parts) > 1 else len(parts[0]) - 1
    rest = [part[start:] for part in parts]
    end = _num_common([part[::-1] for part in rest]) if len(parts) > 1 else 0
    return ["/".join(part[: len(part) - min(end, len(part) - 1)]) for part in rest]


def _num_common(sequences: Sequence[Sequence[str]]) -> int:
    """Return the length of the common prefix."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _validated_run(folder: Path) -> TrainingRun:
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"runs: {folder}: holds no metrics.jsonl; name the output_dir of a training run")
    run = read_run(folder)
    if not any(row.get(VALIDATION) is not None for row in run.rows):
        raise ConfigError(
            f"runs: {folder}: has no validation to compare; train with dataset_val, and run_val_every_n_steps for a curve"
        )
    return run


def _has_teacher(run: TrainingRun) -> bool:
    """Return whether the validation has measured the divergence from a teacher."""
    return any("val_kd_loss" in row for row in run.rows)


def _with_held_out_teacher(run: TrainingRun) -> TrainingRun:
    """Return the run with the teacher of its validation in place of the one that it was trained with, if it names another."""
    node, inputs = run.config.get("teacher"), run.start.get("inputs")
    if not isinstance(node, Mapping) or not node.get("validation"):
        return run
    recorded = inputs.get("teacher") if isinstance(inputs, Mapping) else None
    judge = recorded.get("validation") if isinstance(recorded, Mapping) else None
    start = {**run.start, "inputs": {**(inputs or {}), "teacher": judge}}
    return replace(run, config={**run.config, "teacher": node["validation"]}, start=start)


def _without_teacher(run: TrainingRun) -> TrainingRun:
    """Return the run without the metrics that depend on its teacher."""
    rows = [{name: value for name, value in row.items() if name not in _TEACHER_METRICS} for row in run.rows]
    return replace(run, rows=rows)


def comparable(runs: Mapping[str, TrainingRun]) -> tuple[dict[str, TrainingRun], list[str]]:
    """Return the runs with the metrics that mean the same in all of them, and a sentence for each omission.

    Raises:
        ConfigError: the runs were validated on other data, or with other tokens.
    """
    if found := _conflicts(runs, _DATA_KEYS):
        raise ConfigError(
            "runs: their held-out losses are not of the same tokens:\n" + found + "\n"
            "compare runs that have the same dataset_val and tokenizer"
        )
    taught = {name: _with_held_out_teacher(run) for name, run in runs.items() if _has_teacher(run)}
    if found := _conflicts(taught, _TEACHER_KEYS):
        note = f"left out: divergence and agreement, which are not to the same teacher by the same measure:\n{found}"
        return {name: _without_teacher(run) for name, run in runs.items()}, [note]
    return dict(runs), []


def shared_divergence_title(runs: Mapping[str, TrainingRun]) -> str:
    """Display name of the runs' `val_kd_loss`, the same for comparable runs."""
    return next((divergence_title(run.config, run.start) for run in runs.values() if _has_teacher(run)), "KL")


def _conflicts(runs: Mapping[str, TrainingRun], keys: Sequence[str]) -> str:
    """Return a line for each setting or fingerprint in which a run differs from the first in one of the keys; "" if none does."""
    (first, *others) = runs or [""]
    return "\n".join(
        f"  {setting}: {value} in {first}, {other} in {name}"
        for name in others
        for key in keys
        for difference in differences(runs[first], runs[name], key)
        for setting, value, other in [difference.texts]
    )


def metrics_csv(runs: Mapping[str, TrainingRun]) -> str:
    """Return every validation of the runs as CSV, numbers unrounded: run, step, and each metric of a validation."""
    rows = [(name, row) for name, run in runs.items() for row in run.rows if VALIDATION in row]
    metrics = dict.fromkeys(key for _, row in rows for key in row if key.startswith("val_"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "step", *metrics])
    writer.writerows([[name, row["step"], *(row.get(metric) for metric in metrics)] for name, row in rows])
    return text.getvalue()
