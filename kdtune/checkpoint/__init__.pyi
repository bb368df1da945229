from .atomic import atomic_file, atomic_folder, atomic_write_text, clean_leftovers, remove_folder, writing
from .checkpointer import Checkpointer, load_model
from .manager import (
    CheckpointManager,
    best_step,
    discard_steps_after,
    newest_step,
    step_folders,
    step_number,
)
from .peft import is_adapter_folder, load_adapter
from .rows import collected_rows, partial_of
from .save import SaveWeights, save_model, write_adapter, write_model
from .save_quantized import write_quantized
from .state import load_state

__all__ = [
    "CheckpointManager",
    "Checkpointer",
    "SaveWeights",
    "atomic_file",
    "atomic_folder",
    "atomic_write_text",
    "best_step",
    "clean_leftovers",
    "collected_rows",
    "discard_steps_after",
    "is_adapter_folder",
    "load_adapter",
    "load_model",
    "load_state",
    "newest_step",
    "partial_of",
    "remove_folder",
    "save_model",
    "step_folders",
    "step_number",
    "write_adapter",
    "write_model",
    "write_quantized",
    "writing",
]
