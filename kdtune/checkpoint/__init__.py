"""Models and resume state, to and from files."""

from kdtune.checkpoint.atomic import atomic_folder, atomic_write_text, clean_leftovers
from kdtune.checkpoint.checkpointer import Checkpointer, load_model
from kdtune.checkpoint.manager import CheckpointManager
from kdtune.checkpoint.save import save_model, write_model
from kdtune.checkpoint.state import load_state, save_state

__all__ = [
    "CheckpointManager",
    "Checkpointer",
    "atomic_folder",
    "atomic_write_text",
    "clean_leftovers",
    "load_model",
    "load_state",
    "save_model",
    "save_state",
    "write_model",
]
