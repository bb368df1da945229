"""Load YAML and overrides into a recipe's dataclass, in five validation stages. The only importer of OmegaConf."""

import copy
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdtune._assets import find_config
from kdtune.config.check import MISSING, is_component
from kdtune.config.overrides import apply_overrides
from kdtune.config.schema import (
    KeyDoc,
    check_components,
    check_schema,
    declared_type,
    expand_paths,
    is_component_field,
    plain,
    schema_defaults,
    schema_fields,
)
from kdtune.config.yaml_text import AmbiguousValueError, parse_yaml
from kdtune.errors import ConfigError

T = TypeVar("T")
RECIPE_KEY = "recipe"


def load(source: str | Path, overrides: list[str], schema: type[T]) -> T:
    """Fill the schema from a config (a shipped one's name, or a path) and overrides; component nodes stay plain data.

    A schema may have a class method `inherited(given)`: it derives values for keys that the config omits from those that it
    sets (such as a run's own settings, from the key `run`). Overrides apply to them as if the config had set them.

    Validation stages: the text parses; keys, types and values fit the schema; components import and their arguments bind;
    the schema's own `problems()`, if it has that method. The fifth stage, the machine, is `check_machine`.

    Raises:
        ConfigError: with every error of the stage that failed, one per line.
    """
    config = find_config(source)
    given = read_yaml(config.path)
    if config.recipe is None:
        from kdtune.config.migrate import migration_advice  # few configs ask for it

        if advice := migration_advice(source, given, overrides):
            raise ConfigError(advice)
    given.pop(RECIPE_KEY, None) if RECIPE_KEY not in schema_fields(schema) else None
    defaults = schema_defaults(schema)
    component_keys = {name for name, field in schema_fields(schema).items() if is_component_field(field)}
    # What an argument is, text or a number, its component says, which another override may name.
    draft: dict[str, Any] = {}

    def apply(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        tree = {key: _with_default_component(value, defaults.get(key)) for key, value in tree.items()}
        return apply_overrides(
            tree, overrides, defaults=defaults, component_keys=component_keys, parse_value=parse_value,
            declared=lambda parts: declared_type(parts, {**defaults, **draft}, schema),
        )  # fmt: skip

    draft, _ = apply(given)
    if inherited := getattr(schema, "inherited", None):
        resolved, _ = resolve_interpolations(expand_paths({**defaults, **draft}, schema))
        given = inherited({key: value for key, value in resolved.items() if key in draft}) | given
        draft, _ = apply(given)
    given, problems = apply(given)
    raise_problems(str(source), problems)

    tree, problems = resolve_interpolations(expand_paths({**defaults, **given}, schema))
    values, schema_problems = check_schema(tree, schema)
    # A key whose interpolation failed is already an error; its absence from the tree is not a second one.
    failed = {problem.partition(":")[0].partition(".")[0] for problem in problems}
    problems += [problem for problem in schema_problems if problem.partition(":")[0] not in failed]
    problems += check_components(values, schema)
    raise_problems(str(source), problems)

    cfg = schema(**values)
    own_problems = getattr(cfg, "problems", None)
    if own_problems is not None:
        raise_problems(str(source), list(own_problems()))
    return cfg


def check_machine(cfg: Any, source: str | Path) -> None:
    """Run the fifth stage: the schema's own `machine_problems()`, if any (do the files and the device exist?).

    Raises:
        ConfigError: with every finding, one a line.
    """
    machine_problems = getattr(cfg, "machine_problems", None)
    if machine_problems is not None:
        raise_problems(str(source), list(machine_problems()))


def raise_problems(source: str, problems: list[str]) -> None:
    """Raise if there are errors.

    Raises:
        ConfigError: one line per error, after a line that names the config and counts them.
    """
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [line.replace("\n", " ") for line in problems]
        raise ConfigError("\n  ".join([f"{source}: {count}", *lines]))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file as plain data, with interpolations unresolved; 1e-4 is a float, a repeated key is an error.

    Raises:
        ConfigError: naming file and line.
    """
    try:
        # A copy: what is read again and again (a sweep's cells share their configs) is parsed once, and may be changed.
        return copy.deepcopy(_parse_yaml(path.read_text(encoding="utf-8-sig"), path))
    except AmbiguousValueError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}{context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error


def read_resolved(path: Path) -> dict[str, Any]:
    """Read the values that `to_yaml` has written to a file. Raises as `read_yaml`."""
    return {key: _unescaped(value) for key, value in read_yaml(path).items()}


def resolved_values(text: str) -> dict[str, Any]:
    """Return the values in a text that `to_yaml` made."""
    return {str(key): _unescaped(value) for key, value in parse_yaml(text).items()}


@lru_cache(maxsize=64)
def _parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """Parse YAML text as `read_yaml` does; `path` is used in messages."""
    tree = parse_yaml(text)
    tree = {} if tree is None else tree
    if isinstance(tree, dict | list):
        OmegaConf.create(tree)
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds a {'list' if isinstance(tree, list) else 'value'}; a config is a mapping of keys to values"
        )
    bad_keys = [key for key in tree if not isinstance(key, str)]
    if bad_keys:
        raise ConfigError(f"{path}: key {bad_keys[0]!r} is not a string")
    return {str(key): value for key, value in tree.items()}


def parse_value(text: str) -> Any:
    """Parse an override's value as YAML.

    Raises:
        ConfigError: it is not valid YAML.
    """
    return copy.deepcopy(_parse_value(text))


@lru_cache(maxsize=1024)
def _parse_value(text: str) -> Any:
    try:
        value = parse_yaml(text)
        OmegaConf.create({"value": value})
        return value
    except yaml.MarkedYAMLError as error:
        raise ConfigError(str(error.problem)) from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error


def _with_default_component(value: Any, default: Any) -> Any:
    """Add the default's component to a node that names none: the YAML then states only the arguments that differ."""
    if isinstance(value, dict) and not is_component(value) and is_component(default):
        return {**default, **value}
    return value


def resolve_interpolations(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replace every `${...}` in the tree; also return the errors, whose top-level keys are omitted from the tree."""
    problems: list[str] = []
    unresolved = {key for key, value in tree.items() if not _is_literal(value)}
    # Only what interpolations may refer to: OmegaConf is slow.
    words = {word for key in unresolved for word in re.findall(r"\w+", str(tree[key]))}
    sound = {key: value for key, value in tree.items() if key in words and key not in unresolved}
    for key in [key for key in tree if key in unresolved]:
        try:
            OmegaConf.create({key: tree[key]})
            sound[key] = tree[key]
        except OmegaConfBaseException as error:
            problems.append(f"{error.full_key or key}: {_first_line(error)}")
    container = OmegaConf.create(sound)
    resolved = {}
    for key, value in tree.items():
        before = len(problems)
        if key not in unresolved:
            resolved[key] = copy.deepcopy(value)
        elif key in sound:
            found = _resolved(container, key, str(key), problems)
            if len(problems) == before:
                resolved[key] = found
    return resolved, problems


def _is_literal(value: Any) -> bool:
    """Return whether a value is plain YAML without an interpolation, which OmegaConf would return unchanged."""
    if isinstance(value, dict):
        return all(type(name) is str and _is_literal(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_literal, value))
    return "$" not in value if isinstance(value, str) else value is None or isinstance(value, bool | int | float)


def _resolved(container: Any, name: Any, key: str, problems: list[str]) -> Any:
    if OmegaConf.is_missing(container, name):
        return MISSING
    try:
        value = container[name]
    except OmegaConfBaseException as error:
        text = _first_line(error)
        if access := re.search(r"trying to access (\S+): node `\S+` is not a container", text):
            text = f"Interpolation key '{access[1]}' not found"
        problems.append(f"{key}: {text}" + (f"; give it, or {key}=..." if text.startswith("Interpolation key") else ""))
        return None
    if isinstance(value, DictConfig):
        return {item: _resolved(value, item, f"{key}.{item!s}", problems) for item in value}
    if isinstance(value, ListConfig):
        return [_resolved(value, index, f"{key}.{index}", problems) for index in range(len(value))]
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def to_yaml(values: Mapping[str, Any], docs: Mapping[str, KeyDoc] | None = None) -> str:
    """Format values as YAML that `load` reads back unchanged, with each key's docs as a comment above it."""
    parts = []
    for key, value in values.items():
        if docs and key in docs and docs[key].doc:
            parts += [f"\n# {docs[key].doc}\n"]
        parts.append(OmegaConf.to_yaml({key: _escaped(plain(value))}))
    return "".join(parts).lstrip("\n")


def _escaped(value: Any) -> Any:
    return _with_texts(value, lambda text: text.replace("${", r"\${"))


def _unescaped(value: Any) -> Any:
    return _with_texts(value, lambda text: text.replace(r"\${", "${"))


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to each string inside the value."""
    if isinstance(value, dict):
        return {name: _with_texts(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def as_values(cfg: Any) -> dict[str, Any]:
    """Return a config instance as its keys and values."""
    return {name: getattr(cfg, name) for name in schema_fields(type(cfg))}
