"""Run a recipe under torchrun: its command line, restarts that resume, and one clear message for each way it can end."""

import argparse
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kdtune import _assets
from kdtune.errors import ConfigError

_ADVICE = "where the run has saved a checkpoint, resume_from_checkpoint=true resumes from it"
# Each of these selects a rendezvous; without one, torchrun gets --standalone.
_RENDEZVOUS = ("--standalone", "--rdzv", "--nnodes", "--node-rank", "--master-addr", "--master-port")
_BACKEND = "kdtune_c10d"
_RESUME = "resume_from_checkpoint"
# Their log of a failed process would follow the error that the process or this command has printed.
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def torchrun_arguments(options: list[str], recipe: _assets.Recipe, rest: list[str]) -> list[str]:
    """Build torchrun's arguments: the user's torchrun options, then this command without them, which each process runs."""
    spelled = [option.replace("_", "-") for option in options]
    standalone = [] if any(option.startswith(_RENDEZVOUS) for option in spelled) else ["--standalone"]
    return [*standalone, *options, "-m", "kdtune", "run", str(recipe.path.resolve()), *rest]


def launch(options: list[str], recipe: _assets.Recipe, rest: list[str]) -> int:
    """Run the recipe under torchrun and return its exit code: that of the process that failed first, 0 if none did.

    Raises:
        ConfigError: the config is not valid, restarts are asked for where they cannot work, or torchrun refuses its options.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from kdtune.config.load import load
    from kdtune.config.recipe import check_partner, import_recipe, parse_arguments

    arguments, overrides = parse_arguments(rest, recipe.summary, recipe.name)
    parsed = parse_args(torchrun_arguments(options, recipe, rest))
    # Once here, not in every process.
    check_partner(recipe.path, arguments.config)
    schema = import_recipe(recipe).schema
    added = restart_overrides(parsed, overrides, can_resume=hasattr(schema, _RESUME))
    with _at_level(logging.ERROR, "kdtune"):  # the first process gives the warnings
        cfg = load(arguments.config, [*overrides, *added], schema)
        check_first_process(cfg, arguments.config, parsed)
    parsed.training_script_args += added
    # Slurm sends it to the whole job step; it would otherwise kill torchrun before its processes have saved.
    parsed.signals_to_handle = ",".join(dict.fromkeys([*parsed.signals_to_handle.split(","), "SIGUSR1"]))
    if parsed.max_restarts > 0:
        # Shared, the store keeps the addresses of the processes before the restart, and new ones would call those.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if parsed.rdzv_backend == "c10d" and not parsed.standalone:
        parsed.rdzv_backend = _bounded_backend()
    # What ended a process that is started again, torchrun alone says.
    is_quiet = parsed.max_restarts == 0 and not arguments.traceback and "LOGLEVEL" not in os.environ
    try:
        with _at_level(logging.CRITICAL, *(_LOGGERS if is_quiet else ())):
            run(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:  # which the rank has explained in a line
            where = f"on {socket.gethostname()} " if parsed.nnodes not in ("1", "1:1") else ""
            print(f"error: {where}rank {rank} failed first: {_ending(failure.exitcode)}; {_ADVICE}", file=sys.stderr)
        return failure.exitcode if failure.exitcode in (1, 2) else 1
    except SignalException:
        # The processes were passed the signal and have ended; what they saved is complete.
        return 1
    except (RendezvousError, DistError) as error:
        if arguments.traceback:
            raise
        print(f"error: {lost_text(error, parsed)}; {_ADVICE}", file=sys.stderr)
        return 1
    except (ValueError, AssertionError) as error:
        # Some of torchrun's checks are assertions without a text.
        why = str(error) or "--nproc_per_node and --nnodes must be above 0"
        raise ConfigError(f"run: torchrun refuses its options ({' '.join(options)}): {why}") from error
    return 0


def check_first_process(cfg: Any, source: str, parsed: argparse.Namespace) -> None:
    """Raise the errors about machine, output folder and number of processes that the first process of this host would raise.

    With --nnodes MIN:MAX the number of processes is not known yet, and a host that rejoins a run finds its folder in use: there
    the processes check for themselves.

    Raises:
        ConfigError: with every finding.
    """
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    from kdtune.config.load import check_machine

    try:
        fewest, most = parse_min_max_nnodes(parsed.nnodes)
        here = determine_local_world_size(parsed.nproc_per_node)
    except (ValueError, RuntimeError):
        return  # torchrun refuses them
    if fewest == most > 0 and here > 0 and (most == 1 or parsed.max_restarts == 0):
        with _environment({"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": most * here, "LOCAL_WORLD_SIZE": here}):
            check_machine(cfg, source)


@contextmanager
def _environment(values: dict[str, int]) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in values if name in before})


@contextmanager
def _at_level(level: int, *loggers: str) -> Iterator[None]:
    """Raise the loggers' level inside the block."""
    before = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in before:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in before.items():
            logger.setLevel(old)


def restart_overrides(parsed: argparse.Namespace, overrides: list[str], *, can_resume: bool) -> list[str]:
    """Return overrides to add to the user's, so that torchrun's restarts resume the run.

    The overrides are the same for every start, including the first: each host counts the restarts by itself.

    Args:
        parsed: torchrun's options.
        overrides: the user's.
        can_resume: whether the recipe has the key resume_from_checkpoint.

    Raises:
        ConfigError: restarts with a rendezvous that cannot repeat itself, or with a run that may not be resumed.
    """
    restarts = parsed.max_restarts
    if restarts < 1:
        return []
    is_static = parsed.rdzv_backend == "static" and not parsed.standalone
    if is_static and (parsed.nnodes not in ("1", "1:1") or parsed.rdzv_endpoint or parsed.master_port is not None):
        raise ConfigError(
            f"run: --max-restarts {restarts}: the processes of a static rendezvous (--node_rank, --master_addr, --master_port) do "
            "not find each other again; use, the same on every host, --rdzv_backend c10d --rdzv_endpoint HOST:PORT --rdzv_id "
            "NAME instead, or leave them out on a single host"
        )
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"{_RESUME}=")]
    if given and given[-1].lower() != "true":
        raise ConfigError(
            f"run: --max-restarts {restarts} with {_RESUME}={given[-1]}: a restart would find its own run in output_dir; leave "
            "one of the two out"
        )
    if given or not can_resume:
        return []
    text = f"{_RESUME}=true is set: every start resumes from the newest whole step_N of output_dir"
    print(f"--max-restarts {restarts}: {text}", file=sys.stderr)
    return [f"{_RESUME}=true"]


def lost_text(error: Exception, parsed: argparse.Namespace) -> str:
    """Describe a lost rendezvous for the user: which host reports it, and what to do."""
    from torch.distributed.elastic import rendezvous

    endpoint = parsed.rdzv_endpoint or f"{parsed.master_addr}:{parsed.master_port}"
    here = f"on {socket.gethostname()}: "
    if isinstance(error, rendezvous.RendezvousClosedError):
        return f"{here}the rendezvous {parsed.rdzv_id!r} at {endpoint} is closed: another host has ended; start all hosts again"
    if isinstance(error, rendezvous.RendezvousTimeoutError):
        return f"{here}not all of {parsed.nnodes} hosts came to the rendezvous {parsed.rdzv_id!r} at {endpoint} in time; start it on all"
    cause = error.__cause__ or error
    return (
        f"{here}no answer from the rendezvous at {endpoint}: its host has ended, or the network is cut "
        f"({' '.join(str(cause).split())[:200]})"
    )


def _ending(exit_code: int) -> str:
    """Describe how a process ended: its exit code, or the signal that a negative one stands for."""
    if exit_code >= 0:
        return f"exit code {exit_code}, its error is above"
    hint = " (the system was out of memory, perhaps)" if exit_code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-exit_code).name}{hint}"


def _bounded_backend() -> str:
    """Return the name of torchrun's c10d rendezvous, changed so that connections fail after `read_timeout` without an answer.

    Unchanged, some of its calls wait for an unreachable host until the system drops the connection, after 15 minutes.
    """
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    rendezvous_handler_registry.register(_BACKEND, _bounded_handler)
    return _BACKEND


def _bounded_handler(parameters: Any) -> Any:
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    parameters.backend = "c10d"
    handler = rendezvous_handler_registry.create_handler(parameters)
    _end_silent_connections(1000 * int(parameters.get("read_timeout", 60)))
    return handler


def _end_silent_connections(milliseconds: int) -> None:
    """Make every TCP connection of this process fail once sent data stays unacknowledged for this long."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux only
        return
    # In torch 2.13 the timeout of a TCPStore limits its wait for a key, not for an answer of the server, and neither an option of
    # torchrun nor an environment variable limits that. Torch does not hand out its sockets.
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # no TCP, or closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
