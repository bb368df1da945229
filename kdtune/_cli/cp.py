"""`kdtune cp`: copies a shipped recipe or config so that you can change it."""

import argparse
import shutil
from pathlib import Path

from kdtune import _assets
from kdtune._cli.names import find_asset
from kdtune.errors import ConfigError
from kdtune.paths import user_path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `cp` to the command's parsers."""
    parser = subparsers.add_parser("cp", help="copy a recipe or config to own it", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="recipe or config, as `kdtune ls` names it")
    parser.add_argument("destination", metavar="DEST", type=Path, help="file or folder; the suffix is added if missing")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="overwrite an existing file")
    existing.add_argument(
        "-n", "--no-clobber", action="store_true", help="leave an existing file alone, without an error"
    )
    parser.add_argument("--make-parents", action="store_true", help="make the folders of DEST that do not exist")
    parser.set_defaults(func=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Copy the file and print where to.

    Raises:
        ConfigError: DEST exists, its folder does not, or it cannot be written.
    """
    source = find_asset(arguments.name).path
    destination = target_path(source, user_path(arguments.destination))
    if destination.exists() and arguments.no_clobber:
        print(f"{destination} exists, not copied")
        return
    if destination.exists() and not arguments.force:
        raise ConfigError(f"{destination}: exists; give --force to overwrite it, or another name")
    try:
        if arguments.make_parents:
            destination.parent.mkdir(parents=True, exist_ok=True)
        elif not destination.parent.is_dir():
            raise ConfigError(f"{destination.parent}: no such folder; give --make-parents to make it")
        # Contents only: an installed file may be read-only, the copy is to be edited.
        shutil.copyfile(source, destination)
    except OSError as error:
        raise ConfigError(f"{destination}: cannot be written: {error.strerror or error}") from error
    print(f"copied to {destination}")


def target_path(source: Path, destination: Path) -> Path:
    """Return the path of the copy: in an existing folder under the file's own name, else the given path with the file's suffix."""
    if destination.is_dir():
        return destination / source.name
    suffixes = _assets.CONFIG_SUFFIXES if source.suffix in _assets.CONFIG_SUFFIXES else (source.suffix,)
    if destination.suffix in suffixes:
        return destination
    return destination.with_name(destination.name + source.suffix)
