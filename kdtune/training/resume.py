"""The state of a resumed run, and how the config changes that it asks for (`resume_changes`) take effect."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kdtune.checkpoint import load_state
from kdtune.checkpoint.state import read_state_file
from kdtune.config import instantiate
from kdtune.errors import ConfigError
from kdtune.training.optim import trainable_parameters

_RATES = ("lr", "initial_lr")


def resume_extra(cfg: Any, position: tuple[int, int]) -> dict[str, Any]:
    """Return the non-tensor part of the resume state: data position and changeable settings."""
    return {"position": position, "settings": _settings(cfg)}


def load_training_state(
    folder: Path,
    cfg: Any,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    loss: Any = None,
    rollouts: Any = None,
) -> dict[str, Any]:
    """Restore optimizer, scheduler, loss and rollouts (None: there are none) from a `state` folder, as `load_state`; return its `extra`.

    Both are built from this run's config, the scheduler before its first step. If the config's optimizer arguments
    differ from the saved ones, the config's are used; with another schedule or other learning rates, this config's
    schedule is used as if from the start, at the step that was reached. Raises as `load_state`; ConfigError if
    `resume_changes` names a setting that the state lacks.
    """
    now, recorded = _settings(cfg), read_state_file(folder)["extra"].get("settings")
    asked = [name for name in cfg.resume_changes if name.partition(".")[0] in now]
    if recorded is None and asked:
        raise ConfigError(
            f"resume_changes={asked}: {folder} is of a version that did not record these settings, so a change cannot be told "
            "from what it was saved with; resume without the change, and make it after the next checkpoint"
        )
    before = {**now, **(recorded or {})}
    if before == now:
        return load_state(folder, model=model, optimizer=optimizer, scheduler=scheduler, loss=loss, rollouts=rollouts)
    old, new = (_options(instantiate(node["optimizer"], params=trainable_parameters(model))) for node in (before, now))
    # Groups of the loss's own parameters, which these settings do not change, come after the model's.
    old, new = ([*one, *_options(optimizer)[len(one) :]] for one in (old, new))
    rates = [{key: group[key] for key in _RATES if key in group} for group in _options(optimizer)]
    replay = before["lr_scheduler"] != now["lr_scheduler"] or any(
        one["lr"] != other["lr"] for one, other in zip(old, new, strict=True)
    )
    extra = load_state(
        folder,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss=loss,
        rollouts=rollouts,
        ignore_scheduler=replay,
    )
    for group, was, is_now, rate in zip(optimizer.param_groups, old, new, rates, strict=True):
        changed = {key: value for key, value in is_now.items() if key not in _RATES and was.get(key) != value}
        _set(group, {**changed, **rate} if replay else changed)
    if replay and scheduler is not None:
        with warnings.catch_warnings():
            # PyTorch expects optimizer steps in between; the previous run made them.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(extra["step"]):
                scheduler.step()
    return extra


def _settings(cfg: Any) -> dict[str, Any]:
    return {"optimizer": cfg.optimizer, "lr_scheduler": cfg.lr_scheduler}


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copy each parameter group without its parameters."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _set(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(group.get(key), Tensor):  # a compiled optimizer reads it from there
            group[key].fill_(value)
        else:
            group[key] = value
