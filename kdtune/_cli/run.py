"""`kdtune run`: runs a recipe, here or under torchrun.

The command line is split at the recipe: options before it go to torchrun unchanged, arguments after it go to the recipe.
"""

import argparse
import os
import re
import shlex

from kdtune import _assets
from kdtune._cli.launch import launch
from kdtune.errors import ConfigError

_USAGE = "kdtune run [torchrun options] RECIPE --config NAME|PATH [key=value | ~key]..."


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `run` to the command's parsers."""
    parser = subparsers.add_parser(
        "run",
        help="run a recipe, on one process or under torchrun",
        usage=_USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`kdtune run RECIPE --help` shows a recipe's own options, `kdtune ls RECIPE` its keys.",
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="torchrun options, recipe, its arguments"
    )
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the recipe and return the run's exit code.

    Raises:
        ConfigError: no recipe is named, its name does not fit the way it is started, or under torchrun the config is not
            valid.
    """
    torchrun_options, recipe, rest = split_arguments(arguments.arguments)
    name = arguments.arguments[len(torchrun_options)]
    check_order(name, torchrun_options, rest)
    check_launch(name, torchrun_options)
    if not torchrun_options:
        from kdtune.config.recipe import import_recipe

        main = import_recipe(recipe)
        main.function(main.read(rest))
        return 0
    return launch(torchrun_options, recipe, rest)


def split_arguments(argv: list[str]) -> tuple[list[str], _assets.Recipe, list[str]]:
    """Split the arguments into torchrun options, the recipe, and the arguments after it.

    Raises:
        ConfigError: no argument is a recipe's name, an alias or a .py file.
    """
    for index, argument in enumerate(argv):
        if argument == "--config":
            break
        if _assets.is_recipe(argument):
            return argv[:index], _assets.find_recipe(argument), argv[index + 1 :]
    # Torchrun's values (`--nproc_per_node 4`) look like names too: the last word before --config is meant.
    before = argv[: argv.index("--config")] if "--config" in argv else argv
    words = [argument for argument in before if not argument.startswith("-") and "=" not in argument]
    if not words:
        names = ", ".join(recipe.name for recipe in _assets.recipes())
        raise ConfigError(f"run: no recipe is named; usage: {_USAGE}\n  recipes: {names}")
    candidate = words[-1]
    _assets.find_recipe(candidate)
    raise AssertionError(f"{candidate} was not recognized as a recipe, but found as one")


def check_order(name: str, torchrun_options: list[str], rest: list[str]) -> None:
    """Raise if an option of torchrun stands after the recipe of this name, which takes none.

    Raises:
        ConfigError: with the command line in the right order.
    """
    own = ("--config", "--traceback", "--help")
    if all(word.partition("=")[0] in own for word in rest if word.startswith("--")):
        return

    from torch.distributed.run import get_args_parser

    known = {option.replace("_", "-") for option in re.findall(r"--[\w-]+", get_args_parser().format_help())} - {*own}
    moved: list[str] = []
    kept: list[str] = []
    for before, word in zip(["", *rest], rest, strict=False):
        is_value = moved[-1:] == [before] and "=" not in before + word and not word.startswith(("-", "~"))
        is_option = word.startswith("--") and word.partition("=")[0].replace("_", "-") in known
        (moved if is_option or is_value else kept).append(word)
    if moved:
        raise ConfigError(
            f"run: {moved[0]} is an option of torchrun, found after the recipe; options of torchrun stand before it: "
            f"kdtune run {shlex.join([*torchrun_options, *moved, name, *kept])}"
        )


def check_launch(name: str, torchrun_options: list[str]) -> None:
    """Raise if the recipe's name, by its ending, does not allow this number of processes.

    Raises:
        ConfigError: `..._single_device` under torchrun, or `..._distributed` without.
    """
    under_torchrun = bool(torchrun_options) or "RANK" in os.environ
    base, _, ending = name.rpartition("_")
    if name.endswith("_single_device") and under_torchrun:
        raise ConfigError(
            f"run: {name} runs on one process, found torchrun ({' '.join(torchrun_options) or 'RANK is set'}); use "
            f"{base.removesuffix('_single')}_distributed, or leave the torchrun options out"
        )
    if ending == "distributed" and not under_torchrun:
        single = f"{base}_single_device"
        raise ConfigError(
            f"run: {name} runs under torchrun, found no torchrun option; say on how many processes: kdtune run "
            f"--nproc_per_node 2 {name} ..., or use {single if _assets.recipe_named(single) else base}"
        )
