"""Validate every step of a sweep by its recipe's own validation, in this process, before anything is run."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from tqdm import tqdm

from kdtune import _assets
from kdtune.config.load import check_machine, load
from kdtune.config.recipe import check_partner, import_recipe
from kdtune.config.schema import schema_fields
from kdtune.errors import KDTuneError
from kdtune.log import bar_settings, told_once
from kdtune.sweeps.plan import Plan, Step

RESUME_KEY = "resume_from_checkpoint"


@cache
def recipe_schema(recipe: str) -> type[Any]:
    """Return the config dataclass of a recipe, by its name or path."""
    return import_recipe(_assets.find_recipe(recipe)).schema


def can_resume(step: Step) -> bool:
    """Return whether a step that was stopped half-way can be resumed; otherwise it starts again."""
    return RESUME_KEY in schema_fields(recipe_schema(step.recipe))


def step_overrides(step: Step) -> list[str]:
    """Return all overrides of a step for now: its own, its folder, and the request to resume if it has begun."""
    resume = [f"{RESUME_KEY}=true"] if step.folder.exists() and can_resume(step) else []
    return [*step.overrides, f"output_dir={step.folder}", *resume]


def step_problems(plan: Plan, *, machine: bool) -> list[str]:
    """Return the errors of all distinct unfinished steps, each error once, prefixed with the step's name.

    `machine` adds the validation of files and devices, for the steps that use no other step's folder: the inputs of the
    other steps may not exist yet.
    """
    with told_once():
        return list(dict.fromkeys(_problems(plan.steps, machine=machine)))


def _problems(steps: Sequence[Step], *, machine: bool) -> list[str]:
    found = []
    # Dozens of configs take a while.
    for step in tqdm(steps, desc="checking the steps", unit="step", delay=1, leave=False, **bar_settings()):
        if step.record.exists():
            continue
        try:
            recipe = _assets.find_recipe(step.recipe)
            check_partner(recipe.path, step.config)
            cfg = load(step.config, step_overrides(step), recipe_schema(step.recipe))
            # What a recipe that cannot resume has left is removed before it starts again.
            if machine and not step.needs and (can_resume(step) or not step.folder.exists()):
                check_machine(cfg, step.config)
        except KDTuneError as error:
            lines = [line.strip() for line in str(error).split("\n")]
            found += [
                f"{step.name}: {line}" for line in (lines[1:] if lines[0].endswith(("problem", "problems")) else lines)
            ]
    return found
