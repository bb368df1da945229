"""Resume a run: from which step, whether the config is still that of the run, and the changes it may ask for (`resume_changes`)."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.checkpoint import newest_step
from kdtune.config.check import resolve
from kdtune.config.component import parameters_of
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.runs.folder import holds_run
from kdtune.runs.metrics_file import read_metrics
from kdtune.runs.record import Difference, differing_values, read_resolved_config, recorded_starts

log = get_logger(__name__)

_LENGTH = ("epochs", "max_steps_per_epoch")


def step_to_resume(
    output_dir: Path, config_values: Mapping[str, Any], *, may_change: Collection[str], batches_per_step: int
) -> Path | None:
    """Return the newest complete step folder of a run, after checking its config; None if there is nothing to resume.

    `config_values`: the current config, key by key. `may_change`: keys that may differ from the config in `output_dir`.
    `batches_per_step`: micro-batches of a step, over all processes. Keys in `resume_changes` may differ too.

    Raises:
        ConfigError: a key has another value than in the run's config.yaml; the message names each.
    """
    if not holds_run(output_dir):
        log.info("%s: holds no run; starting from step 0", output_dir)
        return None
    before, config_values = (_renamed(values) for values in (read_resolved_config(output_dir), config_values))
    before = _dated(output_dir, before, config_values)
    asked = config_values.get("resume_changes", ())
    changed = check_unchanged(before, config_values, may_change=may_change, asked=asked)
    _check_same_steps(output_dir, before, config_values, batches_per_step)
    newest = newest_step(output_dir)
    log.info("%s: resuming from %s", output_dir, newest.name if newest else "step 0 (no checkpoint yet)")
    length = [
        one for key in _LENGTH if key in before for one in differing_values(key, before[key], config_values.get(key))
    ]
    first = int(newest.name.removeprefix("step_")) + 1 if newest else 1
    for one in [*changed, *length]:
        log.info("%s %s -> %s from step %d", *one.texts, first)
    if length and goes_by_length(config_values.get("lr_scheduler")):
        log.info(
            "lr_scheduler goes by the number of steps: from step %d its rates are those of a run of the new length",
            first,
        )
    return newest


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with components that have an older name also under their current name."""
    node = values.get("kd_loss")
    if isinstance(node, Mapping) and node.get("_component_") == "kdtune.losses.ForwardKLLoss":
        return {**values, "kd_loss": {**node, "_component_": "kdtune.losses.ForwardKL"}}
    return dict(values)


def _dated(output_dir: Path, before: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Use the current `tokenizer.date` if the run, made by an older version, records none."""
    was, is_now = before.get("tokenizer"), now.get("tokenizer")
    if not (isinstance(was, dict) and isinstance(is_now, Mapping) and "date" in is_now) or "date" in was:
        return before
    log.info(
        "%s: records no tokenizer.date; it continues with %s (tokenizer.date=YYYY-MM-DD sets the day on which it was started)",
        output_dir, is_now["date"],
    )  # fmt: skip
    return {**before, "tokenizer": {**was, "date": is_now["date"]}}


def check_unchanged(
    before: Mapping[str, Any], now: Mapping[str, Any], *, may_change: Collection[str], asked: Sequence[str] = ()
) -> list["Difference"]:
    """Raise if the config would make a resumed run another run; return the requested changes.

    Args:
        before: the config that the run was started with, key by key.
        now: the config it is resumed with.
        may_change: keys that do not change the numbers, or that the user may extend.
        asked: keys, such as "optimizer.lr", whose change is requested.

    Raises:
        ConfigError: a key differs; the message names each, down to a component's own arguments, with both values.
    """
    found = [
        difference
        for key in now
        if key not in may_change and key in before
        for difference in differing_values(key, before[key], now[key])
    ]
    for name in asked:
        if not any(is_asked_for(difference.key, [name]) for difference in found):
            log.warning("resume_changes: %s is what the run already has; nothing is changed there", name)
    if left := [difference for difference in found if not is_asked_for(difference.key, asked)]:
        lines = "\n".join(f"  {difference}" for difference in left)
        possible = [difference.key for difference in left if is_changeable(difference.key)]
        advice = "take the changes back, or choose another output_dir for a new run"
        if possible:
            others = "" if len(possible) == len(left) else "; the others would make it another run"
            advice += f"; to resume with {', '.join(possible)} changed: resume_changes=[{','.join([*asked, *possible])}]{others}"
        raise ConfigError(
            f"the run in output_dir was started with another config; a resumed run keeps these keys:\n{lines}\n{advice}"
        )
    return [difference for difference in found if is_asked_for(difference.key, asked)]


def _check_same_steps(
    output_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any], batches_per_step: int
) -> None:
    """Raise if a step would have another number of micro-batches over all processes than before, or other rounding."""
    starts = recorded_starts(output_dir)
    # Runs of versions before this one were of one process.
    recorded = starts[-1].get("batches_per_step") if starts else None
    made = recorded or before.get("gradient_accumulation_steps", batches_per_step)
    if made != batches_per_step:
        raise ConfigError(
            f"gradient_accumulation_steps * processes = {batches_per_step}: the run makes its steps of {made} micro-batches; a "
            f"resumed run keeps that, on any number of processes that divides {made}; set gradient_accumulation_steps to {made} / "
            "the number of processes"
        )
    for key in ("parallelism", "teacher_parallelism"):
        for setting in ("param_dtype", "reduce_dtype"):
            was, is_now = ((values.get(key) or {}).get(setting) for values in (before, now))
            if was != is_now:
                raise ConfigError(f"{key}.{setting}: was {was!r}, is {is_now!r}; a resumed run keeps it")


def is_finished(output_dir: Path, num_steps: int) -> bool:
    """Return whether the run has made all its steps and written final/.

    ConfigError if it made fewer steps than the config now asks for, and left no step folder to resume from.
    """
    metrics = output_dir / "metrics.jsonl"
    if not ((output_dir / "final").is_dir() and metrics.exists()):
        return False
    rows = read_metrics(metrics)
    made = rows[-1]["step"] if rows else 0
    if made < num_steps and newest_step(output_dir) is None:
        raise ConfigError(
            f"output_dir={output_dir}: holds a finished run of {made} steps without a step folder, so {num_steps} steps "
            "cannot be made from it; start from its final/ in another output_dir (save_every_n_steps leaves step folders)"
        )
    return bool(rows) and made >= num_steps


_WHOLE = ("lr_scheduler", "kd_ratio", "clip_grad_norm")
_NUM_STEPS = "num_training_steps"
ALLOWED = "optimizer.ARGUMENT (such as optimizer.lr), lr_scheduler, kd_ratio and clip_grad_norm"


def is_changeable(key: str) -> bool:
    """Return whether a resumed run may change this key, such as "optimizer.lr", on request."""
    node, _, argument = key.partition(".")
    return key in _WHOLE or node == "lr_scheduler" or (node == "optimizer" and argument not in ("", "_component_"))


def is_asked_for(key: str, asked: Sequence[str]) -> bool:
    """Return whether the key, or a node that contains it, is among the requested ones."""
    return any(key == name or key.startswith(f"{name}.") for name in asked)


def resume_changes_problems(asked: Sequence[str], *, resume: bool) -> list[str]:
    """Return why these keys cannot be requested, one sentence each."""
    found = []
    if asked and not resume:
        found.append(f"resume_changes={list(asked)}: is about a resumed run; set resume_from_checkpoint=true too")
    for name in asked:
        if name in ("optimizer", "optimizer._component_"):
            found.append(
                f"resume_changes: {name} cannot be changed, the saved state is of one class of optimizer; name its arguments, "
                "such as optimizer.lr"
            )
        elif not is_changeable(name):
            found.append(f"resume_changes: {name} would make it another run; allowed are {ALLOWED}")
    return found


def goes_by_length(lr_scheduler: Any) -> bool:
    """Return whether the recipe passes the number of steps to this config node's schedule, so that its rates depend on it."""
    if not isinstance(lr_scheduler, Mapping) or _NUM_STEPS in lr_scheduler:
        return False
    return _NUM_STEPS in (parameters_of(resolve(lr_scheduler["_component_"])) or {})
