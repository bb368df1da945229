"""`kdtune validate`: checks a config without running it (syntax, keys, types, components and how they fit together)."""

import argparse

from kdtune import _assets
from kdtune._cli.names import load_config
from kdtune.errors import ConfigError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `validate` to the command's parsers."""
    parser = subparsers.add_parser("validate", help="check a config without running it", description=__doc__)
    parser.add_argument("config", nargs="?", metavar="NAME|PATH", help="config, as `kdtune ls` names it, or a path")
    parser.add_argument("--config", dest="named", metavar="NAME|PATH", help="the same, as `kdtune run` takes it")
    parser.add_argument("overrides", nargs="*", metavar="key=value|~key", help="changes to the config")
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print OK, with a note if only the data can tell whether the run can start, or if the held-out examples come from other data.

    Raises:
        ConfigError: with every finding.
    """
    source, overrides = config_and_overrides(arguments)
    recipe, cfg = load_config(source, overrides)

    from kdtune.config.overrides import held_out_note

    notes = [held_out_note(cfg, overrides)]
    if getattr(cfg, "tokenizer", None) is not None:  # what has none (compare, report, sweep) is checked without torch
        from kdtune.training import context_note

        notes.insert(0, context_note(cfg))
    for note in filter(None, notes):
        print(f"note: {note}")
    print(f"OK: {source} is a valid config for {recipe.name} (files and device are looked at when it runs)")


def config_and_overrides(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Return config and overrides of `validate CONFIG ...`, `validate --config CONFIG ...` or `validate RECIPE --config CONFIG ...`.

    Raises:
        ConfigError: no config is named, or the config belongs to another recipe than the one named.
    """
    first, source, overrides = arguments.config, arguments.named, list(arguments.overrides)
    if source is None:
        if first is None or (_assets.is_recipe(first) and (first.endswith(".py") or not _assets.is_config(first))):
            raise ConfigError("validate: no config is named; write kdtune validate NAME|PATH [key=value | ~key]...")
        return first, overrides
    if first is not None and _assets.is_recipe(first):
        from kdtune.config.recipe import check_partner

        check_partner(_assets.find_recipe(first).path, source)
    elif first is not None:
        overrides.insert(0, first)
    return source, overrides
