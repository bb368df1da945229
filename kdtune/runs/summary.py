"""Text output of runs, made from their own metrics: each step and validation; at the end the answers, and the table of
teacher, before and after.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.checkpoint import best_step
from kdtune.log import fit_for_stdout
from kdtune.runs.held_out import HeldOut, held_out, teacher_held_out, validated_rows
from kdtune.runs.metrics_file import read_metrics
from kdtune.runs.plot import plot_losses
from kdtune.runs.table import format_table

_DIVERGENCE, _FORWARD_KL = "divergence", "forward KL"
_NOTABLE_WAIT = 0.05
_SAMPLES, _METRICS, _PLOT = "samples.jsonl", "metrics.jsonl", "loss.png"


def step_numbers(row: Mapping[str, float], *, divergence: str = "KL") -> list[str]:
    """Format a step's metrics for display, most important first: "loss 2.310", "KL 0.520", "0.41 s/step" ...

    The wait for data, and that for a teacher's files, is shown where it is over 5 % of the step.
    """
    forms = {
        "loss": "loss {:.3f}",
        "kd_loss": f"{divergence} {{:.3f}}",
        "step_seconds": "{:.2f} s/step",
        "data_seconds": "waited {:.2f} s for data",
        "teacher_seconds": "waited {:.2f} s for the teacher",
        "class_loss": "ce {:.3f}",
        "lr": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tok/s",
    }
    for name in ("data_seconds", "teacher_seconds"):
        if row.get(name, 0.0) <= _NOTABLE_WAIT * row.get("step_seconds", math.inf):
            del forms[name]
    return [form.format(row[name]) for name, form in forms.items() if name in row]


def validation_text(row: Mapping[str, Any], before: Sequence[Mapping[str, Any]], *, divergence: str = "KL") -> str:
    """Format a validation in a line: each value, its change since the one before, and whether it is the best so far.

    `row` is one of metrics.jsonl, `before` those of earlier validations, oldest first, `divergence` the display name of
    `val_kd_loss`.
    """
    shown = [
        _measured("cross entropy", "val_class_loss", row, before, ".3f", 1.0),
        _measured(divergence, "val_kd_loss", row, before, ".3f", 1.0),
        None if divergence == "KL" else _measured("KL", "val_forward_kl", row, before, ".3f", 1.0),
        _measured("agreement", "val_agreement", row, before, ".1f", 100.0),
        _measured("teacher's cross entropy", "val_teacher_class_loss", row, [], ".3f", 1.0),
    ]
    return f"validation, step {row['step']}: {', '.join(text for text in shown if text)}"


def _measured(
    title: str, name: str, row: Mapping[str, Any], before: Sequence[Mapping[str, Any]], form: str, scale: float
) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    unit = " %" if scale > 1 else ""
    text = f"{title} {format(scale * value, form)}{unit}"
    earlier = [one[name] for one in before if one.get(name) is not None]
    if not earlier:
        return text
    is_best = value > max(earlier) if name == "val_agreement" else value < min(earlier)
    change = format(scale * (value - earlier[-1]), f"+z{form}")
    return f"{text} ({change}{', best' if is_best else ''})"


def print_results(output_dir: Path, *, trained: str, best_metric: str | None, divergence: str = "KL") -> None:
    """Draw loss.png in a finished run's `output_dir` and print its results: answers, the table, and the paths of its files.

    `trained` is the model's name in the table, such as "student", `best_metric` the one whose best step is named,
    `divergence` the display name of `kd_loss`.
    """
    plot_losses(output_dir / _METRICS, output_dir / _PLOT, divergence=divergence)
    if (output_dir / _SAMPLES).exists():
        print(fit_for_stdout(samples_text({trained: read_metrics(output_dir / _SAMPLES)})))
    table = comparison_table({trained: read_metrics(output_dir / _METRICS)}, divergence=divergence)
    print(table or "no validation: give dataset_val for a table")
    best = best_step(output_dir, best_metric)
    for label, path in (("model", output_dir / "final"), ("best step", best), ("loss plot", output_dir / _PLOT)):
        if path:
            print(f"{label + ':':<11}{path}")


def comparison_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, divergence: str = "KL") -> str | None:
    """Format held-out metrics per token as a table: the teacher's, and each run's before its first and after its last step.

    `runs` are the metrics by the name of the model; of each, the first and the last row with a validation are shown.
    None if no run has one. `divergence` is the display name of `val_kd_loss`.
    """
    validated = {name: found for name, rows in runs.items() if (found := validated_rows(rows))}
    teachers = map(teacher_held_out, validated.values())
    lines = [_line("teacher", teacher) for teacher in teachers if teacher is not None]
    lines += _starts({name: rows[0] for name, rows in validated.items()})
    lines += [_line(f"{name}, step {rows[-1]['step']}", held_out(rows[-1])) for name, rows in validated.items()]
    lines = list({format_table([line]): line for line in lines}.values())  # teachers with the same numbers share a row
    return _table(lines, divergence) or None


def held_out_table(values: Mapping[str, Any], model: str = "model", *, divergence: str = "KL") -> str:
    """Format a model's held-out metrics below its teacher's, in the columns of `comparison_table`.

    `values` are class_loss and, with a teacher, kd_loss, agreement and teacher_class_loss; `model` is the name in the
    table, `divergence` the display name of `kd_loss`.
    """
    row = {f"val_{name}": value for name, value in values.items()}
    teacher = teacher_held_out([row])
    lines = [] if teacher is None else [_line("teacher", teacher)]
    return _table([*lines, _line(model, held_out(row))], divergence)


def _table(lines: Sequence[Mapping[str, Any]], divergence: str) -> str:
    columns = [column for column in (lines[0] if lines else []) if any(line[column] is not None for line in lines)]
    if divergence == "KL" or not any(line[_FORWARD_KL] for line in lines):  # the same numbers, or only the teacher's 0
        columns = [column for column in columns if column != _FORWARD_KL]
    renamed = {_DIVERGENCE: f"{divergence} to teacher", _FORWARD_KL: "KL to teacher (nats)"}
    if divergence != "KL":  # whose unit is not known
        renamed |= {"held-out (nats)": "held-out", "cross entropy": "cross entropy (nats)"}
    return format_table([{renamed.get(column, column): line[column] for column in columns} for line in lines])


def _starts(first_rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each start; runs whose numbers read the same share one start."""
    sharing: dict[str, list[str]] = {}
    for name, row in first_rows.items():
        sharing.setdefault(format_table([_line("", held_out(row))]), []).append(name)
    if len(first_rows) > 1 and len(sharing) == 1:
        return [_line("before training", held_out(next(iter(first_rows.values()))))]
    return [
        _line(f"{', '.join(names)}, step {first_rows[names[0]]['step']}", held_out(first_rows[names[0]]))
        for names in sharing.values()
    ]


def _line(title: str, found: HeldOut) -> dict[str, Any]:
    perplexity, agreement = found.perplexity_text, found.agreement_text
    return {
        "held-out (nats)": title,
        "cross entropy": found.class_loss,
        "perplexity": None if perplexity is None else perplexity.rjust(10),
        _DIVERGENCE: found.kd_loss,
        _FORWARD_KL: found.forward_kl,
        "top-1 agreement": None if agreement is None else agreement.rjust(15),
    }


def samples_text(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format the answers to each prompt: the teacher's, and each run's before and after training, equal ones before it once.

    `runs` are the rows of each run's samples.jsonl (step, model, prompt, answer), by the name of its model in the text.
    """
    lines = []
    for prompt in dict.fromkeys(row["prompt"] for rows in runs.values() for row in rows):
        asked = {name: [row for row in rows if row["prompt"] == prompt] for name, rows in runs.items()}
        teachers = {row["answer"]: "teacher" for rows in asked.values() for row in rows if row["model"] == "teacher"}
        trained = {name: [row for row in rows if row["model"] != "teacher"] for name, rows in asked.items()}
        before: dict[str, list[str]] = {}
        for name, rows in trained.items():
            for row in rows[:1]:
                before.setdefault(row["answer"], []).append(f"{name}, step {row['step']}")
        shared = len(runs) > 1 and len(before) == 1
        answers = [(who, answer) for answer, who in teachers.items()]
        answers += [("before training" if shared else "; ".join(who), answer) for answer, who in before.items()]
        answers += [
            (f"{name}, step {row['step']}", row["answer"]) for name, rows in trained.items() for row in rows[1:][-1:]
        ]
        lines.append(f"> {prompt}")
        lines += [textwrap.indent(f"[{who}] {' '.join(answer.split())}", "  ") for who, answer in answers]
        lines.append("")
    return "\n".join(lines)


def stopped_text(output_dir: Path, signal_name: str | None, step: int, num_steps: int) -> str:
    """Return the message for a run stopped by a signal: the last step of num_steps and how to resume.

    output_dir: the run's folder. signal_name: the signal, None if another process got it.
    """
    folder = output_dir / f"step_{step}"
    cause = signal_name or "a signal to another process"
    outcome = f"saved in {folder}; resume" if folder.exists() else "nothing to save yet; start again"
    return f"stopped by {cause} after step {step} of {num_steps}: {outcome} with resume_from_checkpoint=true"
