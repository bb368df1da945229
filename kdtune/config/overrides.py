"""Command-line overrides (`a.b=value`, `~a.b`, `node=dotted.Component`), applied to a plain config tree."""

import copy
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.config.check import COMPONENT, accepts, is_component, is_text, names_component, shown
from kdtune.config.yaml_text import AmbiguousValueError
from kdtune.errors import ConfigError

FORMS = "overrides are key=value, a.b=value, ~key or node=dotted.Component"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


# Arguments that determine the source of a dataset's rows; the others select rows or say how to read them.
_ROWS = (COMPONENT, "source", "data_files", "data_dir", "datasets")


def held_out_note(cfg: Any, overrides: Sequence[str]) -> str | None:
    """Return a notice if overrides replace the training data but not the config's held-out examples; else None.

    cfg: the config of any recipe. overrides: those that it was loaded with.
    """
    dataset: Any = getattr(cfg, "dataset", None)
    dataset_val: Any = getattr(cfg, "dataset_val", None)
    keys = [override.partition("=")[0].removeprefix("~").split(".") for override in overrides]
    is_replaced = any(key[0] == "dataset" and (len(key) == 1 or set(key[1:]) & set(_ROWS)) for key in keys)
    if not (is_replaced and is_component(dataset_val)) or any(key[0] == "dataset_val" for key in keys):
        return None
    if _rows(dataset) == _rows(dataset_val):
        return None
    rows = ", ".join(f"{name}={shown(value)}" for name, value in _rows(dataset_val).items() if name != COMPONENT)
    return (
        f"dataset was replaced on the command line; dataset_val is still {dataset_val[COMPONENT]}{f' with {rows}' if rows else ''}; "
        "give dataset_val=..., or leave it out: ~dataset_val"
    )


def _rows(node: Any) -> Any:
    """Return the settings that say where a dataset's rows come from, including those of a mixture's parts."""
    if isinstance(node, list):
        return [_rows(part) for part in node]
    return {name: _rows(node[name]) for name in _ROWS if name in node} if is_component(node) else node


def apply_overrides(
    tree: dict[str, Any],
    overrides: list[str],
    *,
    defaults: dict[str, Any],
    component_keys: Collection[str],
    parse_value: Callable[[str], Any],
    declared: Callable[[list[str]], Any] = lambda parts: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Apply the overrides to a copy of the tree, in order (the last one wins); return it and the errors.

    `defaults` has the initial value of a key that the tree does not set. `component_keys` are the top-level keys that hold
    components. `parse_value` parses a value as YAML and raises ConfigError. `declared` returns the annotation of a key.
    """
    tree = copy.deepcopy(tree)
    problems = []
    for override in overrides:
        try:
            if override.startswith("~"):
                _remove(tree, override[1:])
            else:
                parts, text = _split(override)
                annotation = declared(parts)
                value = read_value(text, annotation, parse_value, key=".".join(parts))
                if len(parts) > 1 and names_component(value, annotation):
                    value = {COMPONENT: value}
                _assign(tree, parts, value, defaults, component_keys)
        except ConfigError as error:
            problems.append(str(error))
    return tree, problems


def _split(override: str) -> tuple[list[str], str]:
    key, equals, text = override.partition("=")
    if key.startswith("-"):
        raise ConfigError(f"{override}: overrides have no leading dashes; write {key.lstrip('-')}={text or 'value'}")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r} cannot be read; {FORMS}")
    return key.split("."), text


def read_value(text: str, annotation: Any, parse_value: Callable[[str], Any], *, key: str = "value") -> Any:
    """Convert an override's text to a value, by the annotation of its key.

    If the key accepts any text, the value is the text as typed. Exceptions are parsed as YAML: text entirely in quotes, null,
    and text that YAML reads as another type that the key accepts, such as a number, [a list] or {a: mapping}. For any other
    key the text is YAML. Without an annotation, text that YAML reads as an unquoted string also stays as typed.

    Raises:
        ConfigError: it must be YAML and is not, or it holds a `${` that begins no interpolation.
    """
    is_quoted = len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]
    try:
        value = parse_value(text)
    except ConfigError as error:
        if not is_text(annotation) or is_broken_interpolation(text, parse_value):
            raise _unreadable(key, text, error) from None
        return text
    if is_quoted and isinstance(value, str):
        return value
    if is_text(annotation):
        is_yaml = text == "null" or (not isinstance(value, str | None) and accepts(annotation, value))
        return value if is_yaml and not (isinstance(value, dict | list) and text.lstrip()[:1] not in "{[") else text
    is_plain = isinstance(value, str) and annotation is Any and text.strip()[:1] not in ("|", ">", "!", "&", '"', "'")
    return text if is_plain and not _DOTTED.fullmatch(value) else value


def is_broken_interpolation(text: str, parse_value: Callable[[str], Any]) -> bool:
    """Return whether the text has a `${` that neither begins an interpolation nor is escaped."""
    try:
        parse_value(json.dumps(text))
    except ConfigError:
        return True
    return False


def _unreadable(key: str, text: str, error: ConfigError) -> ConfigError:
    if isinstance(error.__cause__, AmbiguousValueError):
        return ConfigError(f"{key}: {error}")
    if "${" in text:
        advice = "${ begins an interpolation, such as ${output_dir}/x; for the characters themselves write \\${"
    else:
        advice = f"quote it, such as {key}='\"text\"'"
    return ConfigError(f"{key}: {text!r} is not a YAML value: {error}; {advice}")


def _assign(
    tree: dict[str, Any], parts: list[str], value: Any, defaults: dict[str, Any], component_keys: Collection[str]
) -> None:
    if len(parts) > 1 and tree.get(parts[0]) is None and defaults.get(parts[0]) is not None:
        tree[parts[0]] = copy.deepcopy(defaults[parts[0]])
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        where = ".".join(parts[: depth + 1])
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = _child(node, part, where)
        if not isinstance(node, dict | list):
            raise ConfigError(f"{'.'.join(parts)}: {where} is {shown(node)}, which has no keys to set")
    last = parts[-1]
    current = _child(node, last, ".".join(parts)) if isinstance(node, list) else node.get(last)
    holds_component = is_component(current) or (len(parts) == 1 and last in component_keys)
    if holds_component and isinstance(value, str) and _DOTTED.fullmatch(value):
        value = {COMPONENT: value}
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(f"{where}: is a list of {len(node)}; give an index from 0 to {len(node) - 1}")
        return node[int(part)]
    return node[part]


def _remove(tree: dict[str, Any], key: str) -> None:
    parts = key.split(".")
    if not all(parts):
        raise ConfigError(f"override '~{key}' cannot be read; {FORMS}")
    if "=" in key:
        raise ConfigError(f"~{key}: a removal takes no value; write ~{key.partition('=')[0]}")
    node: Any = tree
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        if isinstance(node, list):
            _child(node, part, where)
        elif not isinstance(node, dict) or part not in node:
            hint = did_you_mean(part, node) if isinstance(node, dict) else ""
            raise ConfigError(f"~{key}: nothing to remove, the config does not set {where!r}{hint}")
        if depth == len(parts) - 1:
            del node[int(part) if isinstance(node, list) else part]
        else:
            node = _child(node, part, where)
