"""`kdtune plan`: estimates a run's memory, communication and time on each process, from its config alone."""

import argparse

from kdtune._cli.names import load_config
from kdtune.errors import ConfigError
from kdtune.log import terminal_width, wrap


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan` to the command's parsers."""
    parser = subparsers.add_parser("plan", help="what a run will take in memory and time", description=__doc__)
    parser.add_argument("config", metavar="NAME|PATH", help="config, as `kdtune ls` names it, or a path")
    parser.add_argument("--world-size", default="1", metavar="N[,N]", help="numbers of processes (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="card whose stated figures are used (default: a100-80gb)")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens an example (default: tokenizer.max_seq_len)")
    parser.add_argument(
        "--calibrate", action="store_true", help="time a step here, with the config's data and random weights (20 s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value|~key", help="changes to the config")
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the plan, a column for each number of processes.

    Raises:
        ConfigError: the config is not valid, its recipe does not train, or it does not fit a number of processes.
    """
    sizes = world_sizes(arguments.world_size)
    if arguments.seq_len is not None and arguments.seq_len < 1:
        raise ConfigError(f"--seq-len {arguments.seq_len}: must be at least 1")
    if arguments.calibrate and sizes != [1]:
        raise ConfigError(
            f"--calibrate: it times one process, --world-size is {arguments.world_size}; leave one of them out"
        )
    _, cfg = load_config(arguments.config, arguments.overrides)

    from kdtune.planner import estimate_text
    from kdtune.training import context_note

    print(estimate_text(cfg, sizes, gpu_name=arguments.gpu, seq_len=arguments.seq_len))
    if note := context_note(cfg):
        print(f"note: {note}")
    if arguments.calibrate:
        from kdtune.planner.calibration import calibrate, check_calibrated
        from kdtune.training import steps_of

        check_calibrated(cfg)
        print(wrap(calibrate(cfg, *steps_of(cfg)).text(), terminal_width()))


def world_sizes(text: str) -> list[int]:
    """Parse the numbers in "8,64,512".

    Raises:
        ConfigError: one of them is not a number of processes.
    """
    words = text.split(",")
    if bad := [word for word in words if not word.strip().isdecimal() or int(word) < 1]:
        raise ConfigError(f"--world-size {text}: {bad[0]!r} is not a number of processes; such as 8, or 8,64,512")
    return [int(word) for word in words]
