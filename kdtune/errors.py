"""Errors a user can cause. The CLI prints them without a traceback and exits with their code."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from kdtune.escape import printable

# What the machine, not the program, is to blame for: the disk is full, read-only or failing, a folder is gone.
FILE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE,
)  # fmt: skip


class KDTuneError(Exception):
    """Base of every error whose message is meant for the user: what is wrong, the value found, what is allowed, what to do."""

    exit_code = 2
    is_repeated = False
    """True if another process of this host has the same error, and prints it."""


class ConfigError(KDTuneError):
    """A config, an override or a command line that cannot be used. The message names the key."""


class ParallelismError(ConfigError):
    """A model that cannot be parallelized as the config asks."""


class CheckpointError(KDTuneError):
    """Weights, a tokenizer or a saved state that cannot be read or written. The message names the file, and the tensor if there is one."""


class DataError(KDTuneError):
    """A dataset that cannot be read or trained on. The message names the source."""


class TrainingError(KDTuneError):
    """A run that had to stop while training, such as at a non-finite loss. The message names the step."""

    exit_code = 1


@contextmanager
def exit_on_error(*, show_traceback: bool) -> Iterator[None]:
    """End the process on an error of the block that is meant for the user: its message on stderr, and its exit code.

    Ctrl-C and errors of the machine (a full disk) end it with 1; any other exception passes.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    except (KDTuneError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in FILE_ERRORS:
            raise
        if show_traceback:
            traceback.print_exception(error)
        elif not getattr(error, "is_repeated", False):
            rank = os.environ.get("RANK")
            print(f"{f'[rank {rank}] ' if rank else ''}{error_text(error)}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, or its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def error_text(error: Exception) -> str:
    """Return one readable message for an error that needs no traceback."""
    if isinstance(error, OSError):
        return printable(f"error: {error.filename or 'output'}: {error.strerror or error}")
    return printable(f"error: {error}")
