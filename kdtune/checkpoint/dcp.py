"""Read and write tensors by torch.distributed.checkpoint, with or without a process group; reading never executes code."""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from kdtune.checkpoint.state import TENSORS_FILE
from kdtune.distributed import is_distributed
from kdtune.errors import CheckpointError, first_line

# Types in the metadata of plain tensors. It is a pickle, and torch reads it with the unrestricted unpickler.
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout")}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Write tensors into a folder, all of `group` (None: the run's) together; CheckpointError if it cannot be written."""
    with _as_checkpoint_error(folder, "written", "free some space or choose another output_dir, then start again"):
        save(dict(tensors), checkpoint_id=folder, process_group=group, no_dist=not is_distributed())


def read_tensors(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill the targets from the folder, in their dtypes; CheckpointError if it is damaged or does not fit them."""
    advice = "it is damaged or was saved for another model or optimizer: resume from another step folder"
    with _as_checkpoint_error(folder, "read", advice):
        load(dict(targets), storage_reader=_TensorReader(folder), no_dist=not is_distributed())


class _TensorReader(FileSystemReader):
    """Reads tensors, and refuses metadata that names anything else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / TENSORS_FILE
        with path.open("rb") as file:
            entries = _MetadataUnpickler(file).load().state_dict_metadata
        for name, entry in entries.items():
            # Any other kind would be unpickled without restriction.
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{path}: {name!r} is a {type(entry).__name__}; only tensors are loaded")
        return super().read_metadata(*args, **kwargs)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_record = module in _MODULES and isinstance(found := super().find_class(module, name), type)
        if is_record and found.__module__ == module:
            return found
        if is_dtype or (module, name) in _NAMES or (module.startswith("pathlib") and name in _PATHS):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which loading could run")


@contextmanager
def _as_checkpoint_error(folder: Path, verb: str, advice: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # It warns that there is no process group, which no_dist=True asks for.
            warnings.filterwarnings("ignore", message=".*torch.distributed.*", category=UserWarning)
            yield
    except CheckpointException as error:  # a BaseException, not an Exception
        # Each failure is an exception with its stack.
        causes = [failure[0] for failure in error.failures.values()]
        own = next((one for one in causes if isinstance(one, CheckpointError)), None)
        if own is not None:
            raise own from error
        reason = first_line(causes[0] if causes else error)
        raise CheckpointError(f"{folder}: resume state cannot be {verb}: {reason}; {advice}") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and is_distributed():
            raise  # another process has ended, and this one's folder is not to blame
        raise CheckpointError(f"{folder}: resume state cannot be {verb}: {first_line(error)}; {advice}") from error
