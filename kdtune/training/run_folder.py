"""The output folder of a run: whether it may be used, what is written into it, what a resumed run may change."""

import fcntl
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdtune.checkpoint import (
    SaveWeights,
    atomic_write_text,
    discard_steps_after,
    newest_step,
    remove_folder,
    save_model,
    writing,
)
from kdtune.config.load import resolved_values
from kdtune.distributed import World, together, wait_for_all
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.models import Transformer
from kdtune.paths import user_path
from kdtune.training.differences import ABSENT, Difference, differing_values
from kdtune.training.loggers import read_metrics, truncate_metrics
from kdtune.training.model_card import model_card
from kdtune.training.resume_changes import goes_by_length, is_asked_for, is_changeable
from kdtune.training.run_record import read_resolved_config, recorded_starts

log = get_logger(__name__)

_LENGTH = ("epochs", "max_steps_per_epoch")
_TRACES = ("config.yaml", "metrics.jsonl", "final")
_IN_USE = "another run is writing there; wait for it, stop it, or choose another output_dir"
_LOCK = ".lock"
_held: dict[Path, int] = {}


def holds_run(output_dir: Path) -> bool:
    """Return whether the folder has traces of a run: its config, metrics, a step folder or a final model."""
    return any((output_dir / name).exists() for name in _TRACES) or any(output_dir.glob("step_*"))


def output_dir_problems(output_dir: str, *, resume: bool) -> list[str]:
    """Return reasons why a run cannot write to the folder; write nothing."""
    return _problems(output_dir, lambda folder: _run_problems(folder, resume=resume))


def writing_problems(output_dir: str) -> list[str]:
    """Return reasons why files cannot be written to the folder; it may hold other things, a run in progress too."""
    return _problems(output_dir, _writing_problems)


def _problems(output_dir: str, look: Callable[[Path], list[str]]) -> list[str]:
    try:
        return look(user_path(output_dir))
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return [f"output_dir={output_dir!r}: {reason}; choose another output_dir"]


def new_folder_problems(output_dir: str) -> list[str]:
    """Return why a recipe that writes its folder at its end could not do so; writes nothing."""
    found = output_dir_problems(output_dir, resume=True)
    folder = user_path(output_dir)
    if found or not folder.exists():
        return found
    try:
        first = min((entry.name for entry in folder.iterdir()), default=None)
    except OSError as error:
        return [f"output_dir={output_dir}: {error.strerror}; choose another output_dir"]
    if first is None:
        return []
    what = "already holds a run" if holds_run(folder) else f"is not empty (holds {first!r})"
    return [f"output_dir={output_dir}: {what}; choose another output_dir"]


def _run_problems(folder: Path, *, resume: bool) -> list[str]:
    if folder.is_dir() and _is_locked(folder):
        return [f"output_dir={folder}: {_IN_USE}"]
    if folder.is_dir() and not resume and holds_run(folder):
        return [
            f"output_dir={folder}: already holds a run; resume it with resume_from_checkpoint=true, "
            "or choose another output_dir"
        ]
    return _writing_problems(folder)


def _writing_problems(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"output_dir={folder}: is a file; name a folder"]
    parent = folder
    while not parent.exists():
        parent = parent.parent
    # Even root cannot write to a read-only mount.
    is_mounted_read_only = hasattr(os, "statvfs") and bool(os.statvfs(parent).f_flag & os.ST_RDONLY)
    if is_mounted_read_only or not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        return [f"output_dir={folder}: {parent} is not a folder that can be written to; choose another output_dir"]
    return []


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


def start_run(output_dir: Path, world: World, *, step: int, resolved_config: str, record: Mapping[str, Any]) -> None:
    """Prepare the folder for the steps after `step`: write its config and record, and remove everything beyond the step.

    `world` is the processes; `resolved_config` becomes config.yaml in `output_dir`, `record` an entry of run.json.
    The record has `step` and, for a resumed run, `changed`: each changed key of the config, with both values. Only rank 0
    writes, once all processes have read what they resume from.

    Raises:
        CheckpointError: a file in it is damaged (nothing is written then), or it cannot be written.
        ConfigError: another run is writing into it.
    """
    wait_for_all()
    with together():
        if not world.is_main:
            return
        before, now = read_resolved_config(output_dir), resolved_values(resolved_config)
        shared = [key for key in now if key in before and key != "resume_from_checkpoint"]
        changed = [one for key in shared for one in differing_values(key, before[key], now[key])]
        record = {
            **record,
            "step": step,
            "changed": {one.key: {"was": _or_none(one.was), "is": _or_none(one.is_now)} for one in changed},
        }
        logs = [file for name in ("metrics.jsonl", "samples.jsonl") if (file := output_dir / name).exists()]
        for file in logs:
            read_metrics(file)
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        _lock(output_dir)
        write_run_files(output_dir, resolved_config=resolved_config, record=record)
        discard_steps_after(output_dir, step)
        for file in logs:
            # At step 0 the validation before the first step runs again.
            truncate_metrics(file, step if step > 0 else -1)


def write_run_files(folder: Path, *, resolved_config: str, record: Mapping[str, Any]) -> None:
    """Write `config.yaml` (every value) and `run.json` (versions and command line, one entry per start) into a folder.

    `resolved_config` is the text of config.yaml, `record` this start's entry in run.json.

    Raises:
        CheckpointError: an existing run.json is damaged, or the files cannot be written.
    """
    starts = recorded_starts(folder)
    atomic_write_text(folder / "config.yaml", resolved_config)
    atomic_write_text(folder / "run.json", json.dumps({"starts": [*starts, dict(record)]}, indent=1) + "\n")


def _lock(folder: Path) -> None:
    """Hold the lock on the folder until this process ends, however it ends.

    A file in it is locked, not the folder: NFS propagates only locks of files, opened for writing, to other hosts.
    """
    path = folder.absolute()
    if path in _held:
        return
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(f"output_dir={folder}: {_IN_USE}") from error
    except OSError as error:
        log.warning(
            "%s: its file system has no locks (%s); a second run there would not be noticed", folder, error.strerror
        )
    _held[path] = descriptor


def _let_go() -> None:
    """Release the lock in a forked child, such as a data worker, which must not hold it after its parent was killed."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _is_locked(folder: Path) -> bool:
    """Return whether another process holds the folder."""
    if folder.absolute() in _held:
        return False
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY)
    except OSError:  # no run has been there; what may not be read is told by the other checks
        return False
    try:
        # Shared: the processes of one run look at the same time.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


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


def _or_none(value: Any) -> Any:
    return None if value is ABSENT else value


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

    Raises:
        ConfigError: it made fewer steps than the config now asks for, and left no step folder to resume from.
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


def write_final(
    output_dir: Path,
    model: Transformer,
    world: World,
    *,
    base: str | Path | None,
    tokenizer: Any,
    save_weights: SaveWeights = "both",
    is_chat: bool = False,
) -> None:
    """Write `final/` into `output_dir`, replacing that of a shorter run that was resumed with more steps.

    `save_weights` selects the content for a model with adapters, see `save_model`: "both" is the merged model in `final/` and
    a PEFT folder in `final/adapter/`. Each has a model card, see `model_card`. `is_chat`: as in `save_model`.

    Raises:
        CheckpointError: it cannot be written.
        ConfigError: the adapter alone is requested of a model without adapters.
    """
    final = output_dir / "final"
    if world.is_main and final.exists():
        remove_folder(final)

    def card(kind: Literal["model", "adapter"]) -> str | None:
        try:
            return model_card(output_dir, kind)
        except Exception as error:  # a failed card must not lose the trained model
            log.warning("%s has no README.md: it could not be made: %s: %s", final, type(error).__name__, error)
            return None

    save_model(model, final, base=base, tokenizer=tokenizer, save_weights=save_weights, is_chat=is_chat, card=card)
