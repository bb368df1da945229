"""`kdtune run`: runs a recipe, here or under torchrun.

The command line is split at the recipe: what stands before it goes to torchrun as it is, what stands after it to the
recipe.
"""

import argparse
import os
import signal
import sys

from kdtune import _assets
from kdtune._cli.names import import_recipe
from kdtune._cli.validate import validate
from kdtune.errors import ConfigError

_USAGE = "kdtune run [torchrun options] RECIPE --config NAME|PATH [key=value | ~key]..."
_ADVICE = "where the run has saved a checkpoint, resume_from_checkpoint=true goes on from it"
# Any of these says how the processes meet; without one, torchrun is told that this is a single machine.
_RENDEZVOUS = ("--standalone", "--rdzv", "--nnodes", "--node-rank", "--master-addr", "--master-port")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `run` to the command's parsers."""
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
    """Runs the recipe; the exit code is the run's.

    Raises:
        ConfigError: no recipe is named, its name does not fit the way it is started, or under torchrun the config is not
            valid.
    """
    torchrun_options, recipe, rest = split_arguments(arguments.arguments)
    check_launch(arguments.arguments[len(torchrun_options)], torchrun_options)
    if not torchrun_options:
        import_recipe(recipe)(rest)
        return 0
    return launch(torchrun_options, recipe, rest)


def split_arguments(argv: list[str]) -> tuple[list[str], _assets.Recipe, list[str]]:
    """The torchrun options before the recipe, the recipe, and the arguments after it.

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


def _ending(exit_code: int) -> str:
    """How a process ended, in words: its exit code, or the signal that a negative one stands for."""
    if exit_code >= 0:
        return f"exit code {exit_code}, its error is above"
    hint = " (the system was out of memory, perhaps)" if exit_code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-exit_code).name}{hint}"


def check_launch(name: str, torchrun_options: list[str]) -> None:
    """Nothing, where a recipe of this name may be started like this: the endings of its names say on how many processes.

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
        raise ConfigError(
            f"run: {name} runs under torchrun, found no torchrun option; say on how many processes: kdtune run "
            f"--nproc_per_node 2 {name} ..., or use {base}_single_device"
        )


def torchrun_arguments(options: list[str], recipe: _assets.Recipe, rest: list[str]) -> list[str]:
    """Torchrun's command line: the user's options, then this same command without them, which each process runs."""
    spelled = [option.replace("_", "-") for option in options]
    standalone = [] if any(option.startswith(_RENDEZVOUS) for option in spelled) else ["--standalone"]
    return [*standalone, *options, "-m", "kdtune", "run", str(recipe.path.resolve()), *rest]


def launch(options: list[str], recipe: _assets.Recipe, rest: list[str]) -> int:
    """The exit code of the recipe under torchrun: that of the process that failed first, 0 if none did."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from kdtune.config.recipe import check_partner, parse_arguments

    arguments, overrides = parse_arguments(rest, recipe.summary, recipe.name)
    # Once here, rather than by every process at once.
    check_partner(recipe.path, arguments.config)
    validate(recipe, arguments.config, overrides)
    try:
        run(parse_args(torchrun_arguments(options, recipe, rest)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:  # which the rank has explained in a line
            print(f"error: rank {rank} failed first: {_ending(failure.exitcode)}; {_ADVICE}", file=sys.stderr)
        return failure.exitcode if failure.exitcode in (1, 2) else 1
    except SignalException:
        # The processes were passed the signal and have ended; what they saved is complete.
        return 1
    return 0
