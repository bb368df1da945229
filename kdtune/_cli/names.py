"""Names on the command line: a shipped recipe, a shipped config, or a path of either."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kdtune import _assets
from kdtune.errors import ConfigError

if TYPE_CHECKING:
    from kdtune.config import EntryPoint


def find_asset(name: str) -> _assets.Recipe | _assets.ConfigFile:
    """The recipe or config of that name or path.

    Raises:
        ConfigError: there is neither; the message names the nearest of both.
    """
    if _assets.is_recipe(name):
        return _assets.find_recipe(name)
    if Path(name).is_file() or any(config.name == name for config in _assets.configs()):
        return _assets.find_config(name)
    known = [recipe.name for recipe in _assets.recipes()] + [config.name for config in _assets.configs()]
    raise ConfigError(
        f"unknown recipe or config {name!r}{_assets.did_you_mean(name, known)}\n  `kdtune ls` lists the names"
    )


def partner_recipe(config: _assets.ConfigFile) -> _assets.Recipe:
    """The recipe that a config's `recipe:` line names.

    Raises:
        ConfigError: there is no such line, or no such recipe.
    """
    if config.recipe is None:
        known = ", ".join(recipe.name for recipe in _assets.recipes())
        raise ConfigError(
            f"{config.path}: has no line `recipe: NAME`, which says what the config is for; recipes: {known}"
        )
    return _assets.find_recipe(config.recipe)


def import_recipe(recipe: _assets.Recipe) -> "EntryPoint":
    """The `main` of a recipe file, imported from its path; it must be made by `kdtune.config.entry_point`.

    Raises:
        ConfigError: the file has no such main, or imports something that is not installed.
    """
    from kdtune.config.recipe import prepare_imports

    prepare_imports(recipe.path)
    module_name = f"kdtune_recipe_{recipe.name}"
    spec = importlib.util.spec_from_file_location(module_name, recipe.path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{recipe.path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickled loader workers look the module up by its name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "kdtune":
            raise
        raise ConfigError(f"{recipe.path}: needs the module {error.name!r}, which is not installed") from error
    main = getattr(module, "main", None)
    if not hasattr(main, "frame"):
        raise ConfigError(f"{recipe.path}: has no main decorated with kdtune.config.entry_point(Config)")
    return cast("EntryPoint", main)
