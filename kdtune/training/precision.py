"""Check devices and dtypes before anything is loaded."""

import os
from typing import Any

import torch

from kdtune import parallel
from kdtune.distributed import is_under_torchrun, world_size
from kdtune.errors import ConfigError
from kdtune.models import dtype_from_name


def device_name_problems(name: str | None, key: str = "device") -> list[str]:
    """Return a sentence if no machine can have a device of that name, the value of a config's `key`."""
    kind, _, index = ("cpu" if name is None else name).partition(":")
    if kind not in {"cpu", "cuda", "mps"} or (index and (kind != "cuda" or not index.isdecimal())):
        default = "the best one here" if key == "device" else "the student's"
        return [f"{key}={name}: unknown; use cpu, cuda, cuda:N, mps, or null for {default}"]
    return []


def resolve_device(name: str | None, key: str = "device") -> torch.device:
    """Return the device for a config's `key`: cpu, cuda, cuda:N or mps; as `name` None picks the first available of cuda, mps, cpu.

    ConfigError if the name is unknown, or this machine has no such device.
    """
    if name is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if problems := device_name_problems(name, key):
        raise ConfigError(*problems)
    kind, _, index = name.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(f"{key}={name}: torch {torch.__version__} sees no CUDA device; use {key}=cpu")
        if index and int(index) >= count:
            raise ConfigError(
                f"{key}={name}: this machine has {count} CUDA devices, numbered from 0; use a lower number"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{key}={name}: no Apple GPU here; use {key}=cpu")
    return torch.device(name)


def device_problems(
    device: str | None, dtype: str = "fp32", *, distributed: bool = False, key: str = "device"
) -> list[str]:
    """Return why this machine and process cannot use a config's `device` and `dtype`; empty if they can. Loads nothing.

    `distributed`: true if the recipe runs on several processes. `key`: the device's, for the messages.
    """
    problems = []
    if not distributed and (num_processes := world_size()) > 1:
        problems.append(f"nproc_per_node: {num_processes} processes found, this recipe runs on one; leave it out")
    resolved = None
    try:
        resolved = resolve_device(device, key)
    except ConfigError as error:
        problems.append(str(error))
    if distributed and resolved is not None and resolved.index is not None and is_under_torchrun():
        problems.append(
            f"{key}={device}: under torchrun each process takes the device of its own number; use {key}=cuda"
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


def placement_problems(cfg: Any) -> list[str]:
    """Return why this machine's devices and processes cannot hold or compute the models of a config, one sentence each.

    cfg: with device, dtype and the keys of `kdtune.parallel.problems`; with a teacher those of `TeacherConfig` too. Reads no weights.
    """
    found = device_problems(cfg.device, cfg.dtype, distributed=True)
    name = getattr(cfg, "teacher_device", None)
    if name is not None:
        found += device_problems(name, cfg.teacher_dtype or cfg.dtype, distributed=True, key="teacher_device")
    device = None if found else resolve_device(cfg.device)
    of_teacher = device if found or name is None else resolve_device(name, "teacher_device")
    if of_teacher is not None and of_teacher.type != "cuda":
        reasons = {
            "teacher_offload": f"needs a CUDA device for the teacher, from whose memory its layers are kept, and it is on {of_teacher}",
            "teacher_overlap": f"needs a CUDA device, whose streams compute side by side, and the teacher is on {of_teacher}",
        }
        found += [
            f"{key}=true: {reason}; set it to false" for key, reason in reasons.items() if getattr(cfg, key, False)
        ]
    return found + parallel.problems(cfg, device, of_teacher)
