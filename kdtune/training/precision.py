"""Check devices and dtypes before anything is loaded."""

import os

import torch

from kdtune.distributed import is_under_torchrun, world_size
from kdtune.errors import ConfigError
from kdtune.models import dtype_from_name


def device_name_problems(name: str | None) -> list[str]:
    """Return a sentence if no machine can have a device of that name."""
    kind, _, index = ("cpu" if name is None else name).partition(":")
    if kind not in {"cpu", "cuda", "mps"} or (index and (kind != "cuda" or not index.isdecimal())):
        return [f"device={name}: unknown; use cpu, cuda, cuda:N, mps, or null for the best one here"]
    return []


def resolve_device(name: str | None) -> torch.device:
    """Return the device for a config's `device`: cpu, cuda, cuda:N or mps; None picks the first available of cuda, mps, cpu.

    ConfigError if the name is unknown, or this machine has no such device.
    """
    if name is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if problems := device_name_problems(name):
        raise ConfigError(*problems)
    kind, _, index = name.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(f"device={name}: torch {torch.__version__} sees no CUDA device; use device=cpu")
        if index and int(index) >= count:
            raise ConfigError(
                f"device={name}: this machine has {count} CUDA devices, numbered from 0; use a lower number"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name}: no Apple GPU here; use device=cpu")
    return torch.device(name)


def device_problems(device: str | None, dtype: str = "fp32", *, distributed: bool = False) -> list[str]:
    """Return why this machine and process cannot use a config's `device` and `dtype`; empty if they can. Loads nothing.

    `distributed`: true if the recipe runs on several processes.
    """
    problems = []
    if not distributed and (num_processes := world_size()) > 1:
        problems.append(f"nproc_per_node: {num_processes} processes found, this recipe runs on one; leave it out")
    resolved = None
    try:
        resolved = resolve_device(device)
    except ConfigError as error:
        problems.append(str(error))
    if distributed and resolved is not None and resolved.index is not None and is_under_torchrun():
        problems.append(
            f"device={device}: under torchrun each process takes the device of its own number; use device=cuda"
        )
    if resolved is not None and resolved.type == "cuda":
        here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > count:
            problems.append(
                f"nproc_per_node: {here} processes found, this machine has {count} CUDA devices; start {count}"
            )
    try:
        number_format = dtype_from_name(dtype)
    except ConfigError as error:
        return [*problems, str(error)]
    if resolved is not None and resolved.type == "cuda" and number_format is torch.bfloat16:
        major, minor = torch.cuda.get_device_capability(resolved)
        if major < 8:
            problems.append(
                f"dtype={dtype}: {torch.cuda.get_device_name(resolved)} (compute capability {major}.{minor}) has no "
                "bf16 arithmetic; 8.0 or newer does; use dtype=fp32"
            )
    return problems
