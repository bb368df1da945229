"""Expand paths as users write them."""

import os
from pathlib import Path
from typing import Annotated

from kdtune.errors import ConfigError


class _PathMark:
    """Marks a str as a path."""


PATH_MARK = _PathMark()
PathText = Annotated[str, PATH_MARK]
"""A config key's type: the text of a path, in which a leading ~ is the home folder."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return the path with a leading `~` or `~USER` expanded to that user's home folder.

    Every path from outside (a config, a command line, a caller of the library) passes through here, so that `~` means the
    same everywhere.

    Raises:
        ConfigError: there is no such user, or the user has no home folder.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        return Path(text)
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ConfigError(
            f"{text}: no home folder of {text.partition('/')[0]!r}; give the full path of a file of that name"
        )
    return Path(home)


def cache_folder(name: str) -> str | None:
    """Return the folder `name` for files that can be made again: kdtune/NAME in XDG_CACHE_HOME, else in ~/.cache; None without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if root.startswith("~") else os.path.join(root, "kdtune", name)
