"""Check that a config's models can be spread over the processes that were started; no weights are read."""

from typing import Any

import torch

from kdtune.config import instantiate
from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, layout_problems, world_size
from kdtune.distributed.world import teacher_processes_problems
from kdtune.parallel.fsdp import model_problem
from kdtune.parallel.meta import meta_model


def spread_problems(cfg: Any) -> list[str]:
    """Return why a config's models cannot be spread over the processes that were started, one sentence each; read no weights.

    cfg: with the key parallelism, and those of model, checkpointer, adapter, teacher_parallelism, teacher_processes,
    teacher_model and teacher_checkpointer that its recipe has.
    """
    teacher_node, apart = getattr(cfg, "teacher_parallelism", None), getattr(cfg, "teacher_processes", 0)
    if found := parallelism_problems(cfg.parallelism, teacher_node, teacher_processes=apart):
        return found
    teacher_name = "teacher_parallelism" if teacher_node else "parallelism, for the teacher"
    for name, prefix, node, num_processes in (
        ("parallelism", "", cfg.parallelism, world_size() - apart),
        (teacher_name, "teacher_", teacher_node or cfg.parallelism, apart or world_size()),
    ):
        parallelism: Parallelism = instantiate(node)
        builder, checkpointer = (getattr(cfg, f"{prefix}{key}", None) for key in ("model", "checkpointer"))
        source = instantiate(checkpointer)
        # These alone ask for something of the model. A checkpoint that cannot be read is told elsewhere.
        is_asked = parallelism.sizes(num_processes)[TP_DIM] > 1 or parallelism.cpu_offload
        if is_asked and (builder or source) and not (source and source.problems()):
            adapter = None if prefix else getattr(cfg, "adapter", None)
            model = meta_model(builder, checkpointer, adapter=adapter, dtype=torch.float32)
            if problem := model_problem(model, parallelism, num_processes):
                found.append(f"{name}: {problem}")
    return found


def parallelism_problems(node: Any, teacher_node: Any = None, *, teacher_processes: int = 0) -> list[str]:
    """Return why these config nodes do not fit the number of processes, or each other, one sentence each.

    Args:
        node: the model's, or the student's.
        teacher_node: the teacher's; None: the same as the student's.
        teacher_processes: number of the started processes that hold only the teacher.
    """
    parallelism, teacher = instantiate(node), instantiate(teacher_node)
    if parallelism is None:
        return ["parallelism=null: kdtune.distributed.Parallelism expected; leave the key out for its default"]
    if problems := teacher_processes_problems(teacher_processes):
        return problems
    found = layout_problems(parallelism, teacher, world_size(), teacher_processes=teacher_processes)
    for name, one in (("parallelism", parallelism), ("teacher_parallelism", teacher)):
        found += [f"{name}: {problem}" for problem in (one.problems() if one else [])]
    for name in ("reduce_dtype", "timeout_minutes"):
        if teacher and getattr(teacher, name) not in (getattr(Parallelism(), name), getattr(parallelism, name)):
            why = (
                "a teacher has no gradients" if name == "reduce_dtype" else "a run has one, parallelism.timeout_minutes"
            )
            found.append(f"teacher_parallelism.{name}={getattr(teacher, name)}: not used, for {why}; leave it out")
    return found
