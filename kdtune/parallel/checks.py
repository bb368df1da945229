"""Check that a config's models can be divided among the processes that were started; no weights are read."""

from typing import Any

import torch

from kdtune.config import factory, instantiate
from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, parallelism_problems, world_size
from kdtune.parallel.fsdp import model_problem
from kdtune.parallel.meta import meta_model


def problems(cfg: Any) -> list[str]:
    """Return why a config's models cannot be divided among the processes that were started, one sentence each; read no weights.

    cfg: with the key parallelism, and those of model, checkpointer, adapter, teacher_parallelism, teacher_processes,
    teacher_model and teacher_checkpointer that its recipe has.
    """
    parallelism: Parallelism = instantiate(cfg.parallelism)
    teacher: Parallelism | None = instantiate(getattr(cfg, "teacher_parallelism", None))
    num_teachers = getattr(cfg, "teacher_processes", 0)
    if found := parallelism_problems(parallelism, teacher, teacher_processes=num_teachers):
        return found
    teacher_name = "teacher_parallelism" if teacher else "parallelism, for the teacher"
    for name, prefix, settings, num_processes in (
        ("parallelism", "", parallelism, world_size() - num_teachers),
        (teacher_name, "teacher_", teacher or parallelism, num_teachers or world_size()),
    ):
        builder = factory(getattr(cfg, f"{prefix}model", None))
        source = instantiate(getattr(cfg, f"{prefix}checkpointer", None))
        # These alone ask for something of the model. A checkpoint that cannot be read is told elsewhere.
        is_asked = settings.sizes(num_processes)[TP_DIM] > 1 or settings.cpu_offload
        if is_asked and (builder or source) and not (source and source.problems()):
            adapter = None if prefix else factory(getattr(cfg, "adapter", None))
            model = meta_model(builder, source, adapter=adapter, dtype=torch.float32)
            if problem := model_problem(model, settings, num_processes):
                found.append(f"{name}: {problem}")
    return found
