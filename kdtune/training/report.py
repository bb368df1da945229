"""What a finished run shows: the table of before, after and teacher, made from the run's own metrics."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.training.table import format_table


def comparison_table(rows: Sequence[Mapping[str, Any]], model: str = "student") -> str | None:
    """Text table of the held-out metrics before the first step and after the last, beside the teacher's.

    Args:
        rows: the run's metrics. The first row with a validation is "before", the last one is "after".
        model: what the table calls what was trained.

    Returns:
        None where the run has no validation.
    """
    validated = [row for row in rows if "val_class_loss" in row]
    if not validated:
        return None
    table = [_line(f"{model}, step {row['step']}", row) for row in (validated[0], validated[-1])]
    teacher_loss = next((row["val_teacher_class_loss"] for row in validated if "val_teacher_class_loss" in row), None)
    if teacher_loss is not None:
        table.append(_line("teacher", {"val_class_loss": teacher_loss, "val_kd_loss": 0.0, "val_agreement": 1.0}))
    measured = [column for column in table[0] if any(line[column] is not None for line in table)]
    return format_table([{column: line[column] for column in measured} for line in table])


def _line(title: str, row: Mapping[str, Any]) -> dict[str, Any]:
    class_loss, kd_loss, agreement = row["val_class_loss"], row.get("val_kd_loss"), row.get("val_agreement")
    return {
        "held-out, per token": title,
        "cross entropy (nats)": class_loss,
        "perplexity": f"{math.exp(min(class_loss, 700)):.4g}".rjust(10),
        "KL to teacher (nats)": kd_loss,
        "teacher's top token": None if agreement is None else f"{agreement:.1%}".rjust(19),
    }


def samples_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The answers to each prompt: the trained model's before and after training, and the teacher's.

    Args:
        rows: of samples.jsonl, each with step, model, prompt and answer.
    """
    lines = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        asked = [row for row in rows if row["prompt"] == prompt]
        trained = [row for row in asked if row["model"] != "teacher"]
        lines.append(f"> {prompt}")
        for row in [*trained[:1], *trained[1:][-1:], *(row for row in asked if row["model"] == "teacher")]:
            who = "teacher" if row["model"] == "teacher" else f"{row['model']}, step {row['step']}"
            lines.append(textwrap.indent(f"[{who}] {' '.join(row['answer'].split())}", "  "))
        lines.append("")
    return "\n".join(lines)


def stopped_text(output_dir: Path, signal_name: str | None, step: int, num_steps: int) -> str:
    """What a run that was told to stop says: after which step, and how to go on."""
    folder = output_dir / f"step_{step}"
    cause = signal_name or "a signal to another process"
    outcome = f"saved in {folder}; go on" if folder.exists() else "nothing to save yet; start again"
    return f"stopped by {cause} after step {step} of {num_steps}: {outcome} with resume_from_checkpoint=true"
