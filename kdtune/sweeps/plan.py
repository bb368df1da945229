"""The plan of a sweep: its cells and the steps of each, where equal steps of several cells are one step."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdtune import _assets
from kdtune._assets import did_you_mean
from kdtune.config.check import is_component
from kdtune.config.load import parse_value, read_yaml
from kdtune.errors import ConfigError
from kdtune.paths import user_path
from kdtune.sweeps.grid import Assignment, Axes, assignments, grid_problems, is_chosen

ALL_STEPS = "all"
_STEP_KEYS = ("recipe", "config", "overrides", "when", "discard")
# {lr} is the value of axis lr, {train.dir} the folder of step train; {{lr}} is the text {lr}.
_PLACEHOLDER = re.compile(r"\{\{([A-Za-z_][\w.]*)\}\}|\{([A-Za-z_][\w.]*)\}")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Step:
    """One run of a recipe: the recipe, its overrides, and the folder it writes. Equal ids are equal runs."""

    name: str
    id: str
    recipe: str
    config: str
    overrides: tuple[str, ...]
    folder: Path
    needs: frozenset[str] = frozenset()
    discard: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        """Path of the file that exists once the step is finished; it holds the step's metrics."""
        return self.folder.with_name(f"{self.id}.json")

    @property
    def log(self) -> Path:
        """Path of the file with everything that the step printed."""
        return self.folder.with_name(f"{self.id}.log")

    @property
    def clock(self) -> Path:
        """Path of the file with the seconds that the step has run so far; removed once it is finished."""
        return self.folder.with_name(f"{self.id}.seconds")

    def parts_of(self, other: "Step") -> list[str]:
        """Return the parts of another step's folder that this one uses, relative to it: `final`, or "" for the folder itself."""
        found = re.compile(re.escape(str(other.folder)) + r"""(?![\w-])/?([^\s,;'"\]})]*)""")
        return [part.rstrip("/") for text in self.overrides for part in found.findall(text)]


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: the values of the axes that it uses, and its steps in order."""

    axes: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """Axes and values in one line."""
        return label(self.axes) or "the only cell"


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, in order, and its problems (some cells may then be missing).

    `cells` are those to run, `whole` all cells, including those that `only` excludes.
    """

    cells: list[Cell]
    problems: list[str] = field(default_factory=list)
    whole: list[Cell] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        """Return the distinct steps of the cells to run, in the order they are run."""
        return list({step.id: step for cell in self.cells for step in cell.steps}.values())

    def num_users(self, step: Step) -> int:
        """Return how many of the cells to run use a step."""
        return sum(step in cell.steps for cell in self.cells)


def label(axes: Mapping[str, Any]) -> str:
    """Format axis values in one line, such as `teacher=base lr=0.0003`."""
    return " ".join(f"{name}={shown_value(value)}" for name, value in axes.items())


def shown_value(value: Any) -> str:
    """Format an axis value as in tables, and as `{axis}` inserts it into an override."""
    return value if isinstance(value, str) else json.dumps(value)


def make_plan(
    *,
    steps_dir: str | Path,
    steps: Mapping[str, Any],
    axes: Axes,
    grids: Sequence[Mapping[str, Any]] | None = None,
    only: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Make the plan of a sweep's config; nothing is imported or written.

    An axis that no step of a cell uses (by `{axis}`, by its own overrides or by a `when` that depends on it) is omitted
    from that cell; cells with the same steps are one.

    Args:
        steps_dir: folder in which each step has a folder NAME-HASH.
        steps: name -> recipe, config, overrides, when, discard; in the order they are run.
        axes: name -> values, or name -> {value: {step: overrides}}.
        grids: axis -> values for each grid; None: the product of all axes.
        only: axis -> values of the cells to run.
        settings: step, or `all`, -> overrides as a tree; they come last.
    """
    settings = settings or {}
    problems = grid_problems(axes, grids, only or {})
    problems += template_problems(steps, axes, settings)
    if problems:
        return Plan([], problems)
    cells: dict[tuple[str, ...], Cell] = {}
    chosen: dict[tuple[str, ...], Cell] = {}
    for assignment in assignments(axes, grids, {}):
        try:
            cell = _plan_cell(user_path(steps_dir), steps, axes, assignment, settings)
        except ConfigError as error:
            problems.append(str(error))
            continue
        key = tuple(step.id for step in cell.steps)
        cell = cells.setdefault(key, cell)
        if is_chosen(assignment, only or {}):
            chosen[key] = cell
    if not chosen and not problems:
        problems.append("only: leaves no cell; take a value out of it")
    runs = [cell for key, cell in cells.items() if key in chosen]
    return Plan(runs, list(dict.fromkeys(problems)), list(cells.values()))


def template_problems(steps: Mapping[str, Any], axes: Axes, settings: Mapping[str, Any]) -> list[str]:
    """Return problems with the steps as written: unknown keys, steps and axes, one sentence each."""
    found = [] if steps else ["steps: is empty; name at least one, with a config"]
    for kind, names in (("axes", axes), ("steps", steps)):
        found += [
            f"{kind}.{name}: a name has letters, digits and _ only" for name in names if not _NAME.fullmatch(name)
        ]
    for name, step in steps.items():
        found += _step_problems(name, step, axes)
    for axis, values in axes.items():
        if isinstance(values, dict):
            for value, sets in values.items():
                found += _set_problems(f"axes.{axis}.{value}", sets, steps)
    for name, value in settings.items():
        if name not in steps and name != ALL_STEPS:
            hint = did_you_mean(name, steps)
            found.append(
                f"set.{name}: no such step{hint}; write set.STEP.KEY=value with {', '.join(steps)} or {ALL_STEPS}"
            )
        elif not isinstance(value, dict):
            found.append(f"set.{name}={value!r}: names no key; write set.{name}.KEY=value")
    return found


def _step_problems(name: str, step: Any, axes: Axes) -> list[str]:
    if name == ALL_STEPS:
        return [f"steps.{name}: the name {ALL_STEPS!r} means every step; choose another"]
    if not isinstance(step, dict) or not isinstance(step.get("config"), str):
        return [f"steps.{name}: must be a mapping with a config, the name or path of what to run"]
    found = [
        f"steps.{name}.{key}: unknown key{did_you_mean(key, _STEP_KEYS)}; a step has {', '.join(_STEP_KEYS)}"
        for key in step
        if key not in _STEP_KEYS
    ]
    for key in ("overrides", "discard"):
        value = step.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in flat_list(value)):
            found.append(f"steps.{name}.{key}={value!r}: must be a list of words, such as [optimizer.lr=1e-4]")
    return [*found, *_when_problems(f"steps.{name}.when", step.get("when", {}), axes)]


def _when_problems(key: str, when: Any, axes: Axes) -> list[str]:
    if isinstance(when, list) and when:
        return [problem for index, one in enumerate(when) for problem in _when_problems(f"{key}.{index}", one, axes)]
    if not isinstance(when, dict):
        return [f"{key}={when!r}: must map axes to the values at which the step is run, or list such mappings"]
    found = []
    for axis, wanted in when.items():
        if axis not in axes:
            found.append(f"{key}.{axis}: no such axis{did_you_mean(axis, axes)}")
            continue
        allowed = list(axes[axis]) if isinstance(axes[axis], list | dict) else []
        found += [
            f"{key}.{axis}: {value!r} is not a value of axes.{axis}; it lists {', '.join(map(str, allowed))}"
            for value in _as_list(wanted)
            if value not in allowed
        ]
    return found


def _set_problems(key: str, sets: Any, steps: Mapping[str, Any]) -> list[str]:
    if sets is not None and not isinstance(sets, dict):
        return [f"{key}={sets!r}: must map steps to lists of overrides ({{}} for none)"]
    found = []
    for step, overrides in (sets or {}).items():
        if step not in steps:
            found.append(f"{key}.{step}: no such step{did_you_mean(step, steps)}; steps: {', '.join(steps)}")
        elif not isinstance(overrides, list) or not all(isinstance(item, str) for item in flat_list(overrides)):
            found.append(f"{key}.{step}={overrides!r}: must be a list of overrides, such as [optimizer.lr=1e-4]")
    return found


def _plan_cell(
    steps_dir: Path, steps: Mapping[str, Any], axes: Axes, assignment: Assignment, settings: Mapping[str, Any]
) -> Cell:
    planned: dict[str, Step] = {}
    used = set()
    for name, template in steps.items():
        used |= _decided_by(template.get("when", {}), assignment, axes)
        if not _is_wanted(template.get("when", {}), assignment):
            continue
        raw = flat_list(template.get("overrides", []))
        for axis, values in axes.items():
            if isinstance(values, dict):
                raw += flat_list((values[assignment[axis]] or {}).get(name, []))
                if any(name in (sets or {}) for sets in values.values()):
                    used.add(axis)
        raw = last_ones([*raw, *flat_overrides(settings.get(ALL_STEPS, {})), *flat_overrides(settings.get(name, {}))])
        used |= {axis for text in (*raw, template["config"]) for axis in _placeholders(text) if axis in axes}
        planned[name] = _plan_step(steps_dir, name, template, raw, assignment, planned, list(steps))
    return Cell({axis: value for axis, value in assignment.items() if axis in used}, tuple(planned.values()))


def _plan_step(
    steps_dir: Path,
    name: str,
    template: Mapping[str, Any],
    overrides: list[str],
    assignment: Assignment,
    planned: Mapping[str, Step],
    all_steps: list[str],
) -> Step:
    def fill(text: str, folders: Mapping[str, str]) -> str:
        return _PLACEHOLDER.sub(lambda match: _value_of(match, name, assignment, folders, all_steps), text)

    folders = {other: str(step.folder) for other, step in planned.items()}
    config = fill(template["config"], {})
    recipe = template.get("recipe") or _assets.find_config(config).recipe
    if recipe is None:
        raise ConfigError(f"steps.{name}: {config} has no `recipe:` line; give the step a recipe")
    known = _assets.find_recipe(recipe)
    expanded = tuple(fill(text, folders) for text in overrides)
    for text in expanded:
        if text.partition("=")[0].lstrip("~") in ("output_dir", "resume_from_checkpoint"):
            raise ConfigError(f"steps.{name}: {text}: is set by the sweep; remove it")
    # The identity does not depend on where the sweep's folder lies: other steps stand in it by their own identity.
    portable = [fill(text, {other: f"{{{step.id}}}" for other, step in planned.items()}) for text in overrides]
    content = json.dumps([known.name, read_yaml(_assets.find_config(config).path), portable], sort_keys=True)
    step_id = f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
    needs = frozenset(step.id for other, step in planned.items() if any(f"{{{step.id}}}" in text for text in portable))
    shipped = _assets.recipe_named(recipe) is not None
    return Step(
        name, step_id, known.name if shipped else recipe, config, expanded, steps_dir / step_id, needs,
        tuple(template.get("discard", ())),
    )  # fmt: skip


def _value_of(
    match: "re.Match[str]", step: str, assignment: Assignment, folders: Mapping[str, str], all_steps: list[str]
) -> str:
    literal, name = match.groups()
    if literal:
        return f"{{{literal}}}"
    head, dot, attribute = name.partition(".")
    if not dot and head in assignment:
        return shown_value(assignment[head])
    if attribute == "dir" and head in folders:
        return folders[head]
    choices = [*assignment, *(f"{other}.dir" for other in folders)]
    if attribute == "dir" and head in all_steps:
        reason = "that step comes later" if all_steps.index(head) >= all_steps.index(step) else "that step is not run"
        raise ConfigError(f"steps.{step}: {{{name}}}: {reason} in the cell {label(assignment)}; see its `when`")
    raise ConfigError(
        f"steps.{step}: {{{name}}}: is no axis and no step's folder{did_you_mean(name, choices)}; "
        f"there are {', '.join(f'{{{choice}}}' for choice in choices) or 'none'}; for the text itself write {{{{{name}}}}}"
    )


def _placeholders(text: str) -> list[str]:
    return [name for _, name in _PLACEHOLDER.findall(text) if name]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def flat_list(values: Sequence[Any]) -> list[Any]:
    """Flatten the lists inside a list, which is how a YAML anchor puts a list into another."""
    return [item for value in values for item in (flat_list(value) if isinstance(value, list) else [value])]


def _is_wanted(when: Any, assignment: Assignment) -> bool:
    """Return whether all of a mapping's conditions hold, or those of one mapping of a list."""
    if isinstance(when, list):
        return any(_is_wanted(one, assignment) for one in when)
    return all(assignment[axis] in _as_list(wanted) for axis, wanted in when.items())


def _decided_by(when: Any, assignment: Assignment, axes: Axes) -> set[str]:
    """Return the axes on which a `when` depends here: with another value of such an axis alone the outcome would differ."""
    mentioned = {axis for one in _as_list(when) for axis in one}
    wanted = _is_wanted(when, assignment)
    return {
        axis
        for axis in mentioned
        if any(_is_wanted(when, {**assignment, axis: value}) != wanted for value in axes[axis])
    }


def last_ones(overrides: Sequence[str]) -> list[str]:
    """Drop the overrides whose key is set again by a later one."""
    keys = [text.partition("=")[0] for text in overrides]
    return [text for index, text in enumerate(overrides) if keys[index] not in keys[index + 1 :]]


def flat_overrides(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Flatten a tree of settings into overrides: {dataset: {source: x}} gives ["dataset.source=x"]; a component is one value."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value and not is_component(value):
            found += flat_overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={_override_text(value)}")
    return found


def _override_text(value: Any) -> str:
    if isinstance(value, str):
        try:
            if parse_value(value) == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value)
