"""The entry point of a recipe: parse its command line, validate the config, report errors."""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import inspect
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import kdtune
from kdtune import _assets
from kdtune.config.load import RECIPE_KEY, as_values, check_machine, load, to_yaml
from kdtune.config.overrides import held_out_note
from kdtune.config.schema import KeyDoc
from kdtune.errors import ConfigError, KDTuneError, exit_on_error
from kdtune.log import get_logger, outlive_readers

T = TypeVar("T")
_ORIGIN = "_kdtune_origin"
_log = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Source of a recipe's config: recipe name, config name or path, overrides, and the command line."""

    recipe: str
    config: str
    overrides: tuple[str, ...]
    command: tuple[str, ...]


class EntryPoint(Protocol):
    """A recipe's main as `entry_point` wraps it: takes the command line, returns nothing, exits the process on an error."""

    schema: type[Any]
    function: Callable[[Any], Any]
    default_config: str | None

    def read(self, argv: list[str] | None = None) -> Any:
        """Return the config of a command line, fully validated; raise ConfigError with every finding."""

    def __call__(self, argv: list[str] | None = None) -> None:
        """Run the recipe on these command-line arguments (None: the process's own)."""


def entry_point(schema: type[T], *, default_config: str | None = None) -> Callable[[Callable[[T], Any]], EntryPoint]:
    """Decorate a recipe's `main(cfg)`: it becomes `main(argv=None)` with `--config NAME|PATH [key=value|~key]...`.

    `default_config` is used if the command line omits --config; None: --config is required.

    All five validation stages pass before the function receives the config. A KDTuneError is printed without a traceback and ends the
    process with its exit code (2: the user can fix it, 1: the run failed); any other exception ends it with its
    traceback and 1. The result keeps `.schema`, `.default_config`, and its two halves: `.read(argv)` returns the config and
    `.function(cfg)` is the function itself; both raise instead of exiting.
    """
    if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
        raise TypeError(f"entry_point({schema!r}): must be a dataclass")

    def decorate(function: Callable[[T], Any]) -> EntryPoint:
        def read(argv: list[str] | None = None) -> T:
            path = Path(inspect.getfile(function))
            arguments, overrides = parse_arguments(argv, _summary(function), path.stem, default_config)
            prepare_imports(path)
            return _checked_config(schema, path, arguments.config, overrides)

        @functools.wraps(function)
        def main(argv: list[str] | None = None) -> None:
            outlive_readers()
            with exit_on_error(show_traceback="--traceback" in (sys.argv if argv is None else argv)):
                function(read(argv))

        wrapped = cast(Any, main)
        wrapped.schema, wrapped.function, wrapped.read, wrapped.default_config = schema, function, read, default_config
        # functools.wraps would otherwise show the undecorated signature.
        del wrapped.__wrapped__
        return cast(EntryPoint, wrapped)

    return decorate


def parse_arguments(
    argv: list[str] | None, summary: str, prog: str, default_config: str | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a recipe's command line: its options, and the overrides; unknown options are kept for validation to explain."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=summary,
        epilog="overrides: key=value, a.b=value, ~a.b (remove), node=dotted.Component (replace)",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=default_config is None,
        default=default_config,
        metavar="NAME|PATH",
        help="shipped config or path of a YAML file" + (f" (default: {default_config})" if default_config else ""),
    )
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback for errors too")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value|~key", help="changes to the config, the last one wins"
    )
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    return arguments, [*unknown, *arguments.overrides]


def _summary(function: Callable[..., Any]) -> str:
    module = inspect.getmodule(function)
    return ((module and module.__doc__) or function.__doc__ or "").strip().partition("\n")[0]


def prepare_imports(recipe: Path) -> None:
    """Make the user's components importable from the working directory, and keep shipped recipes from shadowing modules."""
    shipped = str(_assets.assets_dir("recipes").resolve())
    if sys.path and str(Path(sys.path[0] or ".").resolve()) == shipped and str(recipe.resolve().parent) == shipped:
        del sys.path[0]
    folders = [os.getcwd()] if str(recipe.resolve().parent) == shipped else [os.getcwd(), str(recipe.resolve().parent)]
    present = {os.path.abspath(folder) for folder in sys.path}
    sys.path += [folder for folder in folders if folder not in present]


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """A context for imports. What they make stays: looking through torch for garbage, again and again, takes a tenth of a start."""
    was_enabled, brings_torch = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if brings_torch:
            gc.freeze()  # nor do later collections look through it
        if was_enabled:
            gc.enable()


def import_recipe(recipe: _assets.Recipe) -> EntryPoint:
    """Import a recipe file from its path and return its `main`, which must be made by `entry_point`.

    Raises:
        ConfigError: the file has no such main, or imports something that is not installed.
    """
    prepare_imports(recipe.path)
    module_name = f"kdtune_recipe_{recipe.name}"
    spec = importlib.util.spec_from_file_location(module_name, recipe.path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{recipe.path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickled loader workers look the module up by its name.
    sys.modules[module_name] = module
    try:
        with _garbage_collection_paused():
            spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "kdtune":
            raise
        raise ConfigError(f"{recipe.path}: needs the module {error.name!r}, which is not installed") from error
    main = getattr(module, "main", None)
    if not hasattr(main, "schema"):
        raise ConfigError(f"{recipe.path}: has no main decorated with kdtune.config.entry_point(Config)")
    return cast(EntryPoint, main)


def _checked_config(schema: type[T], recipe: Path, source: str, overrides: list[str]) -> T:
    """Return the config after all five validation stages; the first process of each host prints what they find."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        check_partner(recipe, source)
        cfg = load(source, overrides, schema)
        if is_first and (note := held_out_note(cfg, overrides)):
            _log.warning(note)
        check_machine(cfg, source)
    except KDTuneError as error:
        error.is_repeated = not is_first
        raise
    name = _assets.find_config(source).recipe or recipe.stem
    object.__setattr__(cfg, _ORIGIN, Origin(name, source, tuple(overrides), _command(sys.argv)))
    return cfg


def _command(argv: list[str]) -> tuple[str, ...]:
    """Return the command line as the user would type it; `python -m kdtune` is shown as `kdtune`."""
    program = Path(argv[0])
    if program.name == "kdtune" or program.name == "__main__.py":
        return ("kdtune", *argv[1:])
    return ("python", *argv)


def check_partner(recipe: Path, source: str | Path) -> None:
    """Raise if the config's `recipe:` line names another recipe; a missing line and a user's own recipe file pass.

    Raises:
        ConfigError: the config belongs to another recipe.
    """
    partner = _assets.find_config(source).recipe
    shipped = next((known for known in _assets.recipes() if known.path.resolve() == recipe.resolve()), None)
    if partner is None or shipped is None or partner in (shipped.name, *shipped.aliases):
        return
    raise ConfigError(
        f"{source}: {RECIPE_KEY}: is a config for {partner!r}, not for {shipped.name!r}; "
        f"run `kdtune run {partner} --config {source}`"
    )


def origin(cfg: Any) -> Origin | None:
    """Return the source of this config, or None if no entry point read it."""
    return getattr(cfg, _ORIGIN, None)


def resolved_yaml(cfg: Any, docs: Mapping[str, KeyDoc] | None = None) -> str:
    """Return every key of the config with its resolved value, as YAML that loads back to the same config."""
    source = origin(cfg)
    head = f"{RECIPE_KEY}: {source.recipe}\n" if source and RECIPE_KEY not in as_values(cfg) else ""
    return head + to_yaml(as_values(cfg), docs)


def run_record(cfg: Any) -> dict[str, Any]:
    """Return this start's entry of `run.json`: time, command line, the config's source, versions, and the checkout's commit if any."""
    source = origin(cfg)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(source.command) if source else None,
        "recipe": source.recipe if source else None,
        "config": source.config if source else None,
        "overrides": list(source.overrides) if source else [],
        "versions": {
            "kdtune": kdtune.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "torchao", "tokenizers", "safetensors", "datasets")},
        },
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of kdtune's checkout, with `+changes` if files differ from it; None outside a checkout."""
    root = Path(kdtune.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return result.stdout.strip()
