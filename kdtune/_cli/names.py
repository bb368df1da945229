"""Names on the command line: a shipped recipe, a shipped config, or a path of either."""

import sys
from typing import Any

from kdtune import _assets
from kdtune.errors import ConfigError


def find_asset(name: str) -> _assets.Recipe | _assets.ConfigFile:
    """Return the recipe or config of that name or path.

    Raises:
        ConfigError: there is neither; the message names the nearest of both.
    """
    if _assets.is_recipe(name):
        return _assets.find_recipe(name)
    if _assets.is_config(name):
        return _assets.find_config(name)
    known = [recipe.name for recipe in _assets.recipes()] + [config.name for config in _assets.configs()]
    raise ConfigError(f"unknown recipe or config {name!r}{_assets.advice(name, known)}\n  `kdtune ls` lists the names")


def partner_recipe(config: _assets.ConfigFile) -> _assets.Recipe:
    """Return the recipe that a config's `recipe:` line names.

    Prints a notice on stderr if it is not a shipped recipe, because the caller imports it and thereby runs its code.

    Raises:
        ConfigError: there is no such line, or no such recipe.
    """
    if config.recipe is None:
        from kdtune.config.load import read_yaml
        from kdtune.config.migrate import migration_advice

        tree = read_yaml(config.path)  # what is not YAML is told as such
        if advice := migration_advice(config.path, tree):
            raise ConfigError(advice)
        known = ", ".join(recipe.name for recipe in _assets.recipes())
        raise ConfigError(
            f"{config.path}: has no line `recipe: NAME`, which says what the config is for; recipes: {known}"
        )
    recipe = _assets.find_recipe(config.recipe)
    if _assets.recipe_named(config.recipe) is None:
        print(
            f"{config.path}: its recipe line names {recipe.path}; importing that file, to know its keys",
            file=sys.stderr,
        )
    return recipe


def load_config(source: str, overrides: list[str]) -> tuple[_assets.Recipe, Any]:
    """Load a config through the first four validation stages of the recipe that its `recipe:` line names; return both.

    Raises:
        ConfigError: with every finding.
    """
    from kdtune.config import load
    from kdtune.config.recipe import import_recipe

    recipe = partner_recipe(_assets.find_config(source))
    return recipe, load(source, overrides, import_recipe(recipe).schema)
