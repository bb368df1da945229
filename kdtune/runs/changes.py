"""Config changes that a resumed run makes on request (`resume_changes`): which are allowed."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdtune.config.check import resolve
from kdtune.config.component import parameters_of

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
