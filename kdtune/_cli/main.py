"""The `kdtune` command line: its commands, and what the user sees when one fails."""

import argparse
import os
import sys

import kdtune
from kdtune._cli import cache, cat, completion, cp, data, download, ls, migrate, plan, run, validate
from kdtune.errors import exit_on_error
from kdtune.log import outlive_readers

_DESCRIPTION = "Distil large language models into small ones: recipes, configs and a command line in pure PyTorch."
_EPILOG = """\
examples:
  kdtune ls                                     recipes and their configs
  kdtune ls knowledge_distillation              the keys of a recipe's config
  kdtune ls llama3_2                            the configs of a folder
  kdtune ls datasets                            components of a kind
  kdtune ls kdtune.data.instruct_dataset        what a component takes
  kdtune cp tiny/knowledge_distillation my.yaml
  kdtune validate my.yaml kd_ratio=0.75
  kdtune data my.yaml --rows 5                  its examples, with what is trained on marked
  kdtune plan my.yaml --world-size 8            memory and time of a run, before it runs
  kdtune run knowledge_distillation --config my.yaml kd_ratio=0.75 optimizer.lr=1e-4
  kdtune migrate torchtune.yaml -o my.yaml      a torchtune config as one of kdtune
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; every subcommand stores its function in `func`."""
    parser = argparse.ArgumentParser(
        prog="kdtune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kdtune {kdtune.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback for errors too")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in (ls, cp, cat, validate, data, plan, run, cache, download, migrate, completion):
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 when it worked, 1 when a run failed, 2 when the user can fix it."""
    outlive_readers()
    _fit_progress_bars()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    with exit_on_error(show_traceback=arguments.traceback):
        sys.exit(arguments.func(arguments) or 0)


def _fit_progress_bars() -> None:
    """Make tqdm bars as wide as the terminal; in a log file, print them every 15 seconds instead of ten times a second.

    tqdm reads these settings at import, also in the processes that a sweep starts.
    """
    os.environ.setdefault("TQDM_DYNAMIC_NCOLS", "1")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "15")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line for its command's function."""
    before = argv[: argv.index("run")] if "run" in argv else argv
    if (
        len(before) < len(argv)
        and set(before) <= {"--traceback"}
        and argv[len(before) + 1 :] not in ([], ["-h"], ["--help"])
    ):
        # Arguments after `run` belong to torchrun and the recipe; argparse would parse their options as its own.
        words = [*argv[len(before) + 1 :], *before]
        return argparse.Namespace(func=run.execute, arguments=words, traceback="--traceback" in words)
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unknown:
        # Overrides after an option, which argparse does not collect, and --key=value, which the config's validation stages explain.
        arguments.overrides += unknown
    return arguments
