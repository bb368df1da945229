"""`kdtune validate`: checks a config without running it (syntax, keys, types, components and how they fit together)."""

import argparse
from typing import Any

from kdtune import _assets
from kdtune._cli.names import import_recipe, partner_recipe


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `validate` to the command's parsers."""
    parser = subparsers.add_parser("validate", help="check a config without running it", description=__doc__)
    parser.add_argument("config", metavar="NAME|PATH", help="config, as `kdtune ls` names it, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key=value|~key", help="changes to the config")
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Prints OK, and a note where only the data will say whether the run can start.

    Raises:
        ConfigError: with every finding.
    """
    config = _assets.find_config(arguments.config)
    recipe = partner_recipe(config)
    cfg = validate(recipe, arguments.config, arguments.overrides)
    from kdtune.training import context_note

    if note := context_note(cfg):
        print(f"note: {note}")
    print(f"OK: {arguments.config} is a valid config for {recipe.name} (files and device are looked at when it runs)")


def validate(recipe: _assets.Recipe, source: str, overrides: list[str]) -> Any:
    """The config, after gates 1 to 4 under a recipe; nothing of the machine is looked at.

    Raises:
        ConfigError: with every finding.
    """
    from kdtune.config import load

    return load(source, overrides, import_recipe(recipe).frame)
