"""Configs: load YAML and overrides into a recipe's typed dataclass, and instantiate component nodes."""

from kdtune.config.check import MISSING, Factory, is_component, resolve
from kdtune.config.component import bind, component, factory, instantiate, key
from kdtune.config.load import as_values, check_machine, load, to_yaml
from kdtune.config.recipe import EntryPoint, Origin, entry_point, origin, resolved_yaml, run_record
from kdtune.config.schema import KeyDoc, field_docs
from kdtune.errors import ConfigError
from kdtune.paths import PathText

__all__ = [
    "MISSING",
    "ConfigError",
    "EntryPoint",
    "Factory",
    "KeyDoc",
    "Origin",
    "PathText",
    "as_values",
    "bind",
    "check_machine",
    "component",
    "entry_point",
    "factory",
    "field_docs",
    "instantiate",
    "is_component",
    "key",
    "load",
    "origin",
    "resolve",
    "resolved_yaml",
    "run_record",
    "to_yaml",
]
