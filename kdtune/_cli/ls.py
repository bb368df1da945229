"""`kdtune ls`: lists recipes and configs, a folder's configs, a recipe's keys, the components of a kind, or a component's arguments."""

import argparse
from collections.abc import Mapping, Sequence

from kdtune import _assets
from kdtune.log import terminal_width, wrap

_WIDTH = 110
# Written out, so that a listing of recipes does not import what lists components.
_KINDS = (
    "adapters", "checkpointers", "datasets", "loggers", "losses", "models", "optimizers", "parallelism", "profilers",
    "rollouts", "schedules", "teachers", "tokenizers",
)  # fmt: skip


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ls` to the command's parsers."""
    parser = subparsers.add_parser("ls", help="list recipes and configs, or a recipe's keys", description=__doc__)
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a recipe: show its summary, aliases, configs and keys; a folder of configs, "
        "or a config: show which recipes they are for; a kind of components (" + ", ".join(_KINDS) + "), or a component by its "
        "dotted path",
    )  # fmt: skip
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the table, a part of it, or a recipe's keys."""
    name = arguments.name
    if name is None:
        print(table(_assets.configs()))
        return
    if text := components_text(name):
        print(text)
        return
    inside = [config for config in _assets.configs() if f"{config.name}/".startswith(f"{name.rstrip('/')}/")]
    print(table(inside, all_recipes=False) if inside else describe(_assets.find_recipe(name)))


def components_text(name: str) -> str | None:
    """List the components of a kind or the arguments of one; None if the name is neither."""
    is_component = (
        name.count(".") > 0 and name.replace(".", "").isidentifier() and not name.endswith((".py", ".yaml", ".yml"))
    )
    if not is_component and name not in _KINDS:
        return None
    from kdtune._cli.components import component_text, kind_text

    return component_text(name) if is_component else kind_text(name)


def table(configs: list[_assets.ConfigFile], *, all_recipes: bool = True) -> str:
    """Format every recipe beside its configs, then the configs that name no recipe, then the recipes' aliases.

    Without `all_recipes`, list only the recipes that these configs are for, without aliases.
    """
    groups: dict[str, list[str]] = {}
    for recipe in _assets.recipes():
        partners = [config.name for config in configs if config.recipe in (recipe.name, *recipe.aliases)]
        if partners or all_recipes:
            groups[recipe.name] = partners or ["-"]
    listed = {name for partners in groups.values() for name in partners}
    if orphans := [config.name for config in configs if config.name not in listed]:
        groups["-"] = orphans
    names = {recipe.name: recipe.aliases for recipe in _assets.recipes() if all_recipes and recipe.aliases}
    blocks = [_rows("RECIPE", "CONFIG", groups), *([_rows("RECIPE", "ITS OTHER NAMES", names)] if names else [])]
    return "\n\n".join(blocks)


def _rows(left: str, right: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Format two columns with a heading: the group's name beside its first member, or above it if the name is too wide."""
    rows = [(left, right)]
    for name, members in groups.items():
        rows += zip((name, *[""] * (len(members) - 1)), members, strict=True)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {member}" for name, member in rows]
    if max(map(len, lines)) <= (terminal_width() or _WIDTH):
        return "\n".join(lines)
    return "\n".join(line for name, member in rows for line in (name, f"  {member}") if line)


def describe(recipe: _assets.Recipe) -> str:
    """Describe a recipe: summary, aliases, configs, and its keys with type, default and meaning."""
    from kdtune.config.schema import field_docs

    names = (recipe.name, *recipe.aliases)
    partners = [config.name for config in _assets.configs() if config.recipe in names]
    width = min(terminal_width() or _WIDTH, _WIDTH)
    lines = [wrap(f"{recipe.name}: {recipe.summary}", width, hang=2), f"file:    {recipe.path}"]
    if recipe.aliases:
        lines.append(wrap(f"aliases: {', '.join(recipe.aliases)}", width, hang=9))
    lines += [wrap(f"configs: {', '.join(partners) or 'none'}", width, hang=9), "", "keys (* must be set):"]
    for key in field_docs(recipe.path.read_text(encoding="utf-8-sig")).values():
        default = "" if key.default is None else f" = {key.default}"
        head = f"{key.name}: {key.type}{default}"
        lines.append(("* " if key.default is None else "  ") + wrap(head, width - 2, hang=8).lstrip())
        lines.append(wrap(f"      {key.doc}", width))
    return "\n".join(lines)
