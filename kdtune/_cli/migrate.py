"""`kdtune migrate`: turns a torchtune config into one of kdtune, and says what changes, what is dropped and what does not carry over."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from kdtune import _assets
from kdtune._cli.names import load_config
from kdtune.errors import ConfigError
from kdtune.paths import user_path

if TYPE_CHECKING:
    from kdtune.config.migrate import Migrated

_HEADINGS = {"changed": "changed", "added": "added", "dropped": "dropped", "lost": "does not carry over"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `migrate` to the command's parsers."""
    parser = subparsers.add_parser("migrate", help="turn a torchtune config into one of kdtune", description=__doc__)
    parser.add_argument("source", metavar="FILE", help="torchtune's config, a path")
    parser.add_argument(
        "-o", "--output", metavar="NEW.yaml", help="file to write; without it the config goes to stdout"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value|~key", help="changes to torchtune's config, with its own keys"
    )
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Write or print the config, and the notes: on stderr if the config is on stdout.

    Raises:
        ConfigError: the file cannot be migrated, what it becomes is not valid here, or NEW.yaml exists or cannot be written.
    """
    from kdtune.config.migrate import migrate

    source = user_path(arguments.source)
    if not source.is_file():
        raise ConfigError(f"{arguments.source}: no such file; give the path of a torchtune config")
    target = None if arguments.output is None else user_path(arguments.output)
    if target is not None and target.exists() and not arguments.force:
        raise ConfigError(f"{target}: exists; give --force to overwrite it, or another name")
    made = migrate(source, arguments.overrides, target=str(target or "NEW.yaml"))
    check(made, source)
    if target is None:
        print(made.text, end="")
        report(made, "NEW.yaml", sys.stderr)
        return
    try:
        target.write_text(made.text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"wrote {target}")
    report(made, str(target), sys.stdout)


def check(made: "Migrated", source: Path) -> None:
    """Raise ConfigError with what `kdtune validate` would find in the config."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / source.name
        file.write_text(made.text, encoding="utf-8")
        try:
            load_config(str(file), [])
        except ConfigError as error:
            found = str(error).replace(str(file), "what it becomes")
            raise ConfigError(
                f"{source}: cannot be migrated as it is; change it by key=value, with torchtune's keys\n{found}"
            ) from error


def report(made: "Migrated", target: str, out: TextIO) -> None:
    """Print the notes, and the commands to go on with."""
    for kind, heading in _HEADINGS.items():
        lines = [f"  {note.key}: {note.text}" for note in made.notes if note.kind == kind]
        if lines:
            print("\n".join([f"{heading}:", *lines]), file=out)
    recipe = _assets.find_recipe(made.recipe)
    print(f"next: kdtune validate {target}; kdtune run {recipe.name} --config {target}", file=out)
