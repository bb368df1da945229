"""Makes the teacher of a run, wherever it is computed."""

from typing import Any

import torch

from kdtune.config import instantiate
from kdtune.distributed import Parallelism, World, build_model, meta_model, model_config, parallelize
from kdtune.log import get_logger
from kdtune.losses import check_head
from kdtune.models import Transformer
from kdtune.teachers.remote import RemoteModel, check_sendable

log = get_logger(__name__)


def build_teacher(
    builder: Any,
    checkpointer: Any,
    world: World,
    *,
    dtype: torch.dtype,
    parallelism: Parallelism,
    compile: bool = False,
) -> Transformer | RemoteModel:
    """The frozen teacher, spread over the processes of this world; where it has its own, what the student's see of it.

    Args:
        builder: component node of a builder, or None for the checkpoint's own config.
        checkpointer: component node, or None for random weights.
        world: this process's.
        dtype: of the weights.
        parallelism: how they are spread over the processes that hold them.
        compile: torch.compile each layer.

    Raises:
        ConfigError: its head cannot be used by the loss.
        CheckpointError: the files cannot be read or do not fit the builder.
    """
    if world.bridge is not None and not world.is_teacher:
        bridge = world.bridge
        log.info("the teacher is on %d of the run's %d processes", bridge.num_teachers, bridge.num_processes)
        if checkpointer is None:
            # Drawn and dropped: the student's random weights come after the teacher's, as they do where both are together.
            with parallelism.home(world):
                instantiate(builder)
        return RemoteModel(model_config(builder, checkpointer), bridge, world.device)

    if world.is_teacher:
        # Before its weights are read.
        check_sendable(meta_model(builder, checkpointer, dtype=dtype).output)

    def prepare(model: Transformer) -> Transformer:
        return parallelize(model.requires_grad_(False), parallelism, world, compile=compile)

    home = parallelism.home(world)
    teacher = build_model(builder, checkpointer, dtype=dtype, device=home, prepare=prepare)
    check_head("teacher", teacher.output)
    return teacher
