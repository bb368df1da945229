"""What finished runs show: the table of teacher, before and after, and the answers, made from their own metrics."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.training.table import format_table

_CLASS_LOSS = "val_class_loss"


def comparison_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Text table of held-out metrics: the teacher's, those before each run's first step, those after its last step.

    Args:
        runs: each run's metrics, by what the table calls the model it trains. The first row with a validation is "before",
            the last one is "after".

    Returns:
        None where no run has a validation.
    """
    validated = {name: found for name, rows in runs.items() if (found := [row for row in rows if _CLASS_LOSS in row])}
    lines: list[dict[str, Any]] = []
    for row in (rows[0] for rows in validated.values()):
        if (loss := row.get("val_teacher_class_loss")) is not None:
            lines.append(_line("teacher", {_CLASS_LOSS: loss, "val_kd_loss": 0.0, "val_agreement": 1.0}))
    lines += _starts({name: rows[0] for name, rows in validated.items()})
    lines += [_line(f"{name}, step {rows[-1]['step']}", rows[-1]) for name, rows in validated.items()]
    lines = list({format_table([line]): line for line in lines}.values())  # teachers with the same numbers are one
    columns = [column for column in _line("", {_CLASS_LOSS: 0.0}) if any(line[column] is not None for line in lines)]
    return format_table([{column: line[column] for column in columns} for line in lines]) or None


def _starts(first_rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each start; runs whose numbers read the same have one start."""
    sharing: dict[str, list[str]] = {}
    for name, row in first_rows.items():
        sharing.setdefault(format_table([_line("", row)]), []).append(name)
    if len(first_rows) > 1 and len(sharing) == 1:
        return [_line("before training", next(iter(first_rows.values())))]
    return [
        _line(f"{', '.join(names)}, step {first_rows[names[0]]['step']}", first_rows[names[0]])
        for names in sharing.values()
    ]


def _line(title: str, row: Mapping[str, Any]) -> dict[str, Any]:
    class_loss, kd_loss, agreement = row[_CLASS_LOSS], row.get("val_kd_loss"), row.get("val_agreement")
    return {
        "held-out, nats/token": title,
        "cross entropy": class_loss,
        "perplexity": None if class_loss is None else f"{math.exp(min(class_loss, 700)):.4g}".rjust(10),
        "KL to teacher": kd_loss,
        "top-1 agreement": None if agreement is None else f"{agreement:.1%}".rjust(15),
    }


def samples_text(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The answers to each prompt: the teacher's, those before each run's training and those after it.

    Args:
        runs: the rows of each run's samples.jsonl, each with step, model, prompt and answer, by what the text calls the
            model it trains. Equal answers before training are shown once.
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
    """What a run that was told to stop says: after which step, and how to go on."""
    folder = output_dir / f"step_{step}"
    cause = signal_name or "a signal to another process"
    outcome = f"saved in {folder}; go on" if folder.exists() else "nothing to save yet; start again"
    return f"stopped by {cause} after step {step} of {num_steps}: {outcome} with resume_from_checkpoint=true"
