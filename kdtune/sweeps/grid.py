"""Expand axes and grids into assignments: the value of every axis in every cell of a sweep."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from kdtune._assets import did_you_mean

# An axis without overrides of its own: a list of its values. With them: name of a value -> step -> overrides.
Axes = Mapping[str, Any]
Assignment = dict[str, Any]


def grid_problems(axes: Axes, grids: Sequence[Mapping[str, Any]] | None, only: Mapping[str, Any]) -> list[str]:
    """Return problems with the axes, a grid or `only`: empty ones, unknown axes and values, one sentence each."""
    found = []
    for name, axis in axes.items():
        if not isinstance(axis, list | dict):
            found.append(f"axes.{name}={axis!r}: must be a list of values, or a mapping from names to overrides")
        elif not axis:
            found.append(f"axes.{name}: is empty; a sweep over it has no cells: give at least one value")
        elif isinstance(axis, list) and any(isinstance(value, list | dict) for value in axis):
            found.append(
                f"axes.{name}: a value must be a number, a word, true, false or null; name it to give overrides"
            )
        elif len(set(map(repr, axis))) != len(axis):
            found.append(f"axes.{name}={axis!r}: lists a value twice; remove one")
    if grids is not None and not grids:
        found.append("grids: is empty, so there are no cells; leave it out for the product of all axes")
    chosen = [(f"grids.{index}", grid) for index, grid in enumerate(grids or [])] + [("only", only)]
    for key, grid in chosen:
        found += _choice_problems(axes, grid, key) if isinstance(grid, Mapping) else [f"{key}: must map axes to lists"]
    return found


def _choice_problems(axes: Axes, choice: Mapping[str, Any], key: str) -> list[str]:
    found = []
    for name, values in choice.items():
        if name not in axes:
            found.append(f"{key}.{name}: no such axis{did_you_mean(name, axes)}; axes: {', '.join(axes) or 'none'}")
        elif not isinstance(values, list) or not values:
            found.append(f"{key}.{name}={values!r}: must be a list with at least one of the axis's values")
        else:
            allowed = list(axes[name]) if isinstance(axes[name], list | dict) else values
            found += [
                f"{key}.{name}: {value!r} is not a value of axes.{name}; it lists {', '.join(map(str, allowed))}"
                for value in values
                if not is_listed(value, allowed)
            ]
    return found


def assignments(axes: Axes, grids: Sequence[Mapping[str, Any]] | None, only: Mapping[str, Any]) -> list[Assignment]:
    """Return every combination of axis values the sweep asks for, each once, in the order of the grids.

    An axis that a grid does not mention has its first value there. Without grids the result is the product of all axes.
    `only` keeps the combinations whose values it lists.
    """
    whole = {name: list(axis) for name, axis in axes.items()}
    found: list[Assignment] = []
    for grid in [whole] if grids is None else grids:
        choices = [list(grid.get(name, values[:1])) for name, values in whole.items()]
        for combination in itertools.product(*choices):
            assignment = dict(zip(whole, combination, strict=True))
            if is_chosen(assignment, only) and not any(_same(assignment, other) for other in found):
                found.append(assignment)
    return found


def is_chosen(assignment: Assignment, only: Mapping[str, Any]) -> bool:
    """Return whether an assignment has one of the values that `only` lists for each of its axes."""
    return all(is_listed(assignment[name], values) for name, values in only.items())


def is_listed(value: Any, values: Sequence[Any]) -> bool:
    """Return whether a value is listed; true is not 1, but 1 is 1.0."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _same(first: Assignment, second: Assignment) -> bool:
    return all(is_listed(value, [second[name]]) for name, value in first.items())
