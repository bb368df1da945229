"""Evaluation settings from a finished run: its model, tokenizer, held-out examples, teacher and divergence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtune import checkpoint
from kdtune.config.load import read_yaml
from kdtune.paths import user_path

FINAL, BEST = "final", "best"
_CHECKPOINTER = "kdtune.checkpoint.Checkpointer"
_OF_THE_DATA = ("teacher_checkpointer", "teacher_model", "teacher_dtype", "teacher_quantization", "teacher_device",
                "teacher_offload", "kd_loss")  # fmt: skip
_TEACHERS = [f"kdtune.teachers.{name}" for name in ("CachedTeacher", "LiveTeacher", "Mixture", "Routed")]


def run_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation keys that a run determines: its training settings, applied to the weights it has written.

    If the run cannot be measured, `run_problems` reports it; a key is then missing or names a missing file.

    Args:
        given: the keys that the evaluation's config sets itself, including `run` and `run_weights`.

    Raises:
        ConfigError: the run's config.yaml cannot be read.
    """
    run, weights = given.get("run"), given.get("run_weights", FINAL)
    if not (isinstance(run, str) and isinstance(weights, str)):
        return {}
    values = _config(user_path(run))
    folder = _weights_folder(user_path(run), weights, values)
    found = {key: values[key] for key in ("tokenizer", "dataset_val", "device", "dtype") if values.get(key) is not None}
    found.setdefault("tokenizer", {"_component_": "kdtune.tokenizers.load", "path": str(folder)})
    found["output_dir"] = str(user_path(run) / ("evaluation" if weights == FINAL else f"evaluation_{weights}"))
    found["checkpointer"] = {"_component_": _CHECKPOINTER, "checkpoint_dir": str(folder)}
    if family := (values.get("checkpointer") or {}).get("family"):
        found["checkpointer"]["family"] = family
    if checkpoint.is_adapter_folder(folder) and (base := values.get("checkpointer")):
        found["checkpointer"] = {**base, "adapter_dir": str(folder)}
        found["model"] = values.get("model")
    if batch_size := values.get("batch_size_val") or values.get("batch_size"):
        found["batch_size"] = batch_size
    if {**found, **given}.get("dataset_val") is not None:
        found |= {key: values[key] for key in _OF_THE_DATA if values.get(key) is not None}
        if "teacher_model" in found and "teacher_checkpointer" not in found:
            found["seed"] = values["seed"]  # of the teacher's random weights
        node = values.get("teacher")
        if node and not {"teacher", "teacher_checkpointer", "teacher_model"} & given.keys():
            # A cache has the run's own held-out examples; other components may compute with the student.
            if node["_component_"] in _TEACHERS and "dataset_val" not in given:
                found["teacher"] = node
            else:
                found.pop("kd_loss", None)
    return found


def run_problems(run: str, weights: str) -> list[str]:
    """Return why a run cannot be measured, one sentence each: no run, not finished, or without the requested weights."""
    folder = user_path(run)
    if not folder.is_dir():
        return [f"run={run}: no such folder; give the output_dir of a finished run"]
    values = _config(folder)
    if not {"optimizer", "dataset"} <= values.keys():
        what = f"its config.yaml is of {values.get('recipe', 'another recipe')}" if values else "it has no config.yaml"
        return [
            f"run={run}: is no training run: {what}; give the output_dir of a run of finetune or knowledge_distillation"
        ]
    steps = [path.name for path in checkpoint.step_folders(folder)]
    choices = [*([FINAL] if (folder / FINAL).is_dir() else []), *steps]
    if weights == BEST and values.get("best_metric") is None:
        return [f"run_weights=best: the run has no best_metric; give one of {', '.join(choices) or 'a finished run'}"]
    wanted = _weights_folder(folder, weights, values)
    if wanted.name not in choices:
        if weights != FINAL:
            return [f"run_weights={weights}: {run} has no such weights; there are {', '.join(choices) or 'none'}"]
        other = f", or measure what it has so far with run_weights={steps[-1]}" if steps else ""
        return [f"run={run}: is not finished, it has no final/; resume it with resume_from_checkpoint=true{other}"]
    if checkpoint.is_adapter_folder(wanted) and not values.get("checkpointer"):
        return [
            f"run={run}: {wanted.name}/ holds an adapter alone, for random weights that no file has; train with "
            "save_weights=both to have a model to measure"
        ]
    return []


def _config(run: Path) -> dict[str, Any]:
    """Return the config.yaml of a run; {} if there is none."""
    path = run / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


def _weights_folder(run: Path, weights: str, values: Mapping[str, Any]) -> Path:
    if weights == BEST:
        return checkpoint.best_step(run, values.get("best_metric")) or run / BEST
    return run / weights
