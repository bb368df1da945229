"""One logger for the whole package, to stderr."""

import logging
import sys


def get_logger(name: str = "kdtune") -> logging.Logger:
    """The package's logger or a child of it; messages go to stderr as plain lines."""
    root = logging.getLogger("kdtune")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name)
