"""``adapter_config.json`` as PEFT writes it: which settings are supported, and which modules they adapt."""

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from kdtune.errors import CheckpointError

_LONGEST_MATCH_S = 1.0

# Fields that are read here, that say nothing about the arithmetic, and those that must have one of some plain values.
_READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_SILENT = {
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # The others start from base weights that they have changed.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# Settings that say which modules are adapted, and how: the types that PEFT writes, and those of their members.
_MODULES = "names of modules or a regular expression"
_TARGETS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("target_modules", (str, list), _MODULES),
    ("exclude_modules", (str, list), _MODULES),
    ("layers_to_transform", (int, list), "numbers of layers"),
    ("rank_pattern", (dict,), "whole numbers by regular expressions"),
    ("alpha_pattern", (dict,), "numbers by regular expressions"),
)
_MEMBERS: dict[str, tuple[type, ...]] = {
    "target_modules": (str,), "exclude_modules": (str,), "layers_to_transform": (int,), "rank_pattern": (int,),
    "alpha_pattern": (int, float),
}  # fmt: skip


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every setting of the config read from that file is supported."""
    for key, value in config.items():
        if key in _PLAIN_VALUES:
            if value not in _PLAIN_VALUES[key]:
                wanted = " or ".join(repr(one) for one in _PLAIN_VALUES[key])
                raise CheckpointError(f"{path}: {key}={reprlib.repr(value)} is not supported; want {wanted}")
        elif key not in _READ | _SILENT and value:
            raise CheckpointError(
                f"{path}: {key}={reprlib.repr(value)} is not supported; want it unset (null, false or empty)"
            )
    if config.get("peft_type") is None:
        raise CheckpointError(f"{path}: peft_type is missing; 'LORA' expected: this is no adapter config of PEFT")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r={reprlib.repr(rank)}; a whole number of 1 or more expected")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha={reprlib.repr(alpha)}; a number expected")
    for key, kinds, wanted in _TARGETS:
        value = config.get(key)
        each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        is_known = isinstance(value, kinds) and all(type(one) in _MEMBERS[key] for one in each)
        if value is not None and not (is_known and all(map(_is_pattern, _patterns(value)))):
            raise CheckpointError(f"{path}: {key}={reprlib.repr(value)}; {wanted} expected")


def _patterns(value: Any) -> list[str]:
    """Return the regular expressions of a setting; a list has names."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []


def _is_pattern(pattern: str) -> bool:
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError):
        return False
    return True


def _is_match(pattern: str, module: str, path: Path) -> bool:
    """Return whether the expression matches the module's whole name; CheckpointError if that takes over a second."""
    try:
        return regex.fullmatch(pattern, module, timeout=_LONGEST_MATCH_S) is not None
    except TimeoutError:
        raise CheckpointError(
            f"{path}: the regular expression {reprlib.repr(pattern)} takes more than {_LONGEST_MATCH_S:g} s on "
            f"{module!r}; list the modules' names instead"
        ) from None


def value_for(patterns: Mapping[str, Any] | None, module: str, default: Any, path: Path) -> Any:
    """Return the value of the first pattern of the config at `path` that matches the end of the module's name in PEFT, or the default."""
    for pattern, value in (patterns or {}).items():
        if _is_match(rf"(.*\.)?({pattern})$", module, path):
            return value
    return default


def is_target(module: str, config: Mapping[str, Any], path: Path) -> bool:
    """Return whether PEFT adapts the module of that name (PEFT's own) under the config read from `path`."""
    layers = config.get("layers_to_transform")
    number = re.search(r"\.(\d+)\.", module)
    if layers is not None and not (number and int(number[1]) in ([layers] if isinstance(layers, int) else layers)):
        return False
    if _matches(module, config.get("exclude_modules"), path):
        return False
    targets = config.get("target_modules")
    return module != "lm_head" if targets == "all-linear" else _matches(module, targets, path)


def _matches(module: str, targets: Any, path: Path) -> bool:
    if isinstance(targets, str):
        return _is_match(targets, module, path)
    return any(module == target or module.endswith(f".{target}") for target in targets or ())
