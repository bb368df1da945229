"""`kdtune cat`: prints a recipe or a config, or with --resolved every value a run would use."""

import argparse

from kdtune import _assets
from kdtune._cli.names import find_asset, load_config
from kdtune.errors import ConfigError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `cat` to the command's parsers."""
    parser = subparsers.add_parser("cat", help="print a recipe or config", description=__doc__)
    parser.add_argument("name", metavar="NAME|PATH", help="recipe or config, as `kdtune ls` names it, or a path")
    parser.add_argument(
        "--resolved", action="store_true", help="every key of the config: defaults, overrides, interpolations"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value|~key", help="changes to the config (with --resolved)"
    )
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the file's text, or the config as a run would use it, with every key's docs above it."""
    asset = find_asset(arguments.name)
    if not arguments.resolved:
        if arguments.overrides:
            raise ConfigError(f"cat {arguments.name}: overrides are applied by --resolved; add it")
        print(asset.path.read_text(encoding="utf-8-sig"), end="")
        return
    if isinstance(asset, _assets.Recipe):
        raise ConfigError(f"cat --resolved: {arguments.name!r} is a recipe; name a config (`kdtune ls {asset.name}`)")
    from kdtune.config import field_docs, resolved_yaml

    recipe, cfg = load_config(arguments.name, arguments.overrides)
    docs = field_docs(recipe.path.read_text(encoding="utf-8-sig"))
    print(f"recipe: {asset.recipe}\n\n{resolved_yaml(cfg, docs)}", end="")
