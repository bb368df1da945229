"""Build the teacher of a run, wherever it is computed."""

from typing import Any

import torch

from kdtune import parallel
from kdtune.config import factory, instantiate
from kdtune.distributed import World
from kdtune.errors import ConfigError, KDTuneError
from kdtune.log import get_logger
from kdtune.losses import check_head
from kdtune.models import Transformer, dtype_from_name, has_adapters
from kdtune.teachers.online import OnlineTeacher
from kdtune.teachers.remote import RemoteTeacher, check_sendable

log = get_logger(__name__)


def build_teacher(cfg: Any, world: World) -> OnlineTeacher | RemoteTeacher:
    """Build the frozen teacher, parallelized over this world; with its own processes, the channel to them.

    See `build_teacher_model` for the keys and the errors.
    """
    if world.channel is None:
        hidden_loss, model = instantiate(cfg.hidden_loss), build_teacher_model(cfg, world)
        return OnlineTeacher(model, hidden_loss.depths(model.config.num_layers) if hidden_loss else ())
    log.info("the teacher is on %d of the run's %d processes", world.channel.num_teachers, world.channel.num_processes)
    if cfg.teacher_checkpointer is None:
        # Drawn and dropped: the student's random weights come after the teacher's, as they do where both are together.
        with instantiate(cfg.teacher_parallelism or cfg.parallelism).param_device(world):
            instantiate(cfg.teacher_model)
    return RemoteTeacher(world.channel, world.device)


def build_teacher_model(cfg: Any, world: World) -> Transformer:
    """Build the frozen teacher's model, parallelized over this world.

    Args:
        cfg: with the keys of `TeacherConfig`, and dtype, parallelism, compile.
        world: this process's.

    Raises:
        ConfigError: its head cannot be used by the loss.
        CheckpointError: the files cannot be read or do not fit the builder.
    """
    dtype = dtype_from_name(cfg.teacher_dtype or cfg.dtype)
    builder, checkpointer = factory(cfg.teacher_model), instantiate(cfg.teacher_checkpointer)
    if world.is_teacher:
        # Before its weights are read.
        check_sendable(parallel.meta_model(builder, checkpointer, dtype=dtype).output)
    parallelism = instantiate(cfg.teacher_parallelism or cfg.parallelism)
    teacher = parallel.build_model(
        builder, checkpointer, dtype=dtype, world=world, parallelism=parallelism, trainable=False,
        quantization=cfg.teacher_quantization, compile=cfg.compile,
    )  # fmt: skip
    check_head("teacher", teacher.output)
    return teacher


def _adds_adapters(cfg: Any) -> bool:
    """Return whether the trained model has adapters; reads no weights."""
    return cfg.adapter is not None or (
        cfg.model is not None and has_adapters(parallel.meta_model(factory(cfg.model), None, dtype=torch.float32))
    )


def layer_problems(cfg: Any) -> list[str]:
    """Return why the layers of a config's `hidden_loss` do not fit one of its models, one sentence each; read no weights."""
    hidden_loss, found = instantiate(cfg.hidden_loss), []
    for key in ("", "teacher_"):
        builder, source = factory(getattr(cfg, f"{key}model")), instantiate(getattr(cfg, f"{key}checkpointer"))
        try:
            num_layers = parallel.model_config(builder, source).num_layers
        except KDTuneError:  # said elsewhere
            continue
        try:
            hidden_loss.depths(num_layers)
        except ConfigError as error:
            found.append(f"{error} ({'the teacher' if key else 'the student'})")
    return found


def problems(cfg: Any) -> list[str]:
    """Return problems with a distillation config's teacher, one sentence each."""
    found = []
    if cfg.teacher_processes > 0 and cfg.kd_ratio == 0:
        found.append(f"teacher_processes={cfg.teacher_processes}: with kd_ratio=0 no step asks the teacher; set 0")
    found += [
        f"hidden_loss: needs the hidden states of a teacher in the same processes, which {key} does not give; ~{key}, or ~hidden_loss"
        for key in ("teacher", "teacher_processes")
        if cfg.hidden_loss and getattr(cfg, key)
    ]
    try:
        instantiate(cfg.hidden_loss)
    except KDTuneError as error:
        found.append(str(error))
    if cfg.teacher is not None:
        keys = ("teacher_model", "teacher_checkpointer", "teacher_quantization", "teacher_processes")
        given = [key for key in keys if getattr(cfg, key)]
        found += [
            f"{key}: has no effect beside teacher, which stands in place of a model; ~{key}, or ~teacher"
            for key in given
        ]
        if cfg.teacher["_component_"].endswith(".BaseOfStudent") and not _adds_adapters(cfg):
            found.append(
                f"teacher: {cfg.teacher['_component_']} is the student without its adapters, and it has none; give `adapter`, such as "
                "kdtune.models.apply_lora, or another teacher"
            )
    elif cfg.teacher_model is None and cfg.teacher_checkpointer is None:
        found.append(
            "teacher_checkpointer: missing, and no teacher_model to start from random weights; give one of them"
        )
    from kdtune.teachers import other_tokenizer  # the tokenizer libraries take a while to import

    return found + other_tokenizer.problems(cfg)
