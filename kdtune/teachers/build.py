"""Build the teacher of a run, wherever it is computed."""

from dataclasses import replace
from typing import Any

import torch

from kdtune import parallel
from kdtune.config import factory, instantiate
from kdtune.config.check import COMPONENT, resolve
from kdtune.data import Dataset
from kdtune.distributed import World
from kdtune.errors import ConfigError, KDTuneError
from kdtune.log import get_logger
from kdtune.losses import check_head
from kdtune.models import Transformer, TransformerConfig, dtype_from_name, has_adapters
from kdtune.models.quantization import SCHEMES, scheme_name
from kdtune.teachers.online import OnlineTeacher
from kdtune.teachers.protocol import ConfiguredTeacher, Teacher
from kdtune.teachers.remote import RemoteTeacher, check_sendable
from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)

# Keys of where a teacher that is a model is computed.
PLACES = ("teacher_device", "teacher_offload", "teacher_overlap")


def build_teacher(cfg: Any, world: World) -> Teacher:
    """Build the frozen teacher, parallelized over this world; with its own processes, the channel to them.

    The component of the key `teacher`, if there is one. See `build_teacher_model` for the other keys and the errors.
    """
    if getattr(cfg, "teacher", None) is not None:
        teacher: Teacher = instantiate(cfg.teacher)
        if isinstance(teacher, ConfiguredTeacher):
            teacher.start(cfg, world)
        return teacher
    if world.channel is None:
        return build_online_teacher(cfg, world)
    log.info("the teacher is on %d of the run's %d processes", world.channel.num_teachers, world.channel.num_processes)
    if cfg.teacher_checkpointer is None:
        # Drawn and dropped: the student's random weights come after the teacher's, as they do where both are together.
        with instantiate(cfg.teacher_parallelism or cfg.parallelism).param_device(world):
            instantiate(cfg.teacher_model)
    return RemoteTeacher(world.channel, world.device)


def configured_teacher(cfg: Any) -> ConfiguredTeacher | None:
    """Return the component of the key `teacher`, not started, if a run checks it and makes it ready; None for another, or none."""
    node = getattr(cfg, "teacher", None)
    if node is None or not hasattr(resolve(node[COMPONENT]), "fit_data"):  # another's constructor may read weights
        return None
    teacher: ConfiguredTeacher = instantiate(node)
    return teacher


def fit_data(
    cfg: Any, tokenizer: Tokenizer, dataset: Dataset, dataset_val: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Return the parts of `dataset` and `dataset_val` that the component of the key `teacher` can teach; all for another teacher.

    Raises:
        ConfigError, DataError: it cannot teach them with the run's `tokenizer`; `cfg` is the recipe's.
    """
    teacher = configured_teacher(cfg)
    if teacher is None:
        return dataset, dataset_val
    dataset, judge = teacher.fit_data("dataset", tokenizer, dataset), teacher.held_out
    if dataset_val is None:
        return dataset, None
    if judge is None:
        log.info(
            "there is no teacher for dataset_val (teacher.validation): the validation measures the cross entropy alone"
        )
    return dataset, judge.fit_data("dataset_val", tokenizer, dataset_val) if isinstance(
        judge, ConfiguredTeacher
    ) else dataset_val


def held_out_teacher(teacher: Teacher) -> Teacher | None:
    """Return the teacher that a validation asks, `teacher` itself unless it names another; None: there is none for held-out data."""
    return teacher.held_out if isinstance(teacher, ConfiguredTeacher) else teacher


def build_online_teacher(cfg: Any, world: World) -> OnlineTeacher:
    """Build the frozen teacher on the student's processes: on their devices, or on `teacher_device`.

    See `build_teacher_model` for the keys (`cfg` may have hidden_loss too), the `world` and the errors.
    """
    hidden_loss, model = instantiate(getattr(cfg, "hidden_loss", None)), build_teacher_model(cfg, world)
    layers = hidden_loss.depths(model.config.num_layers) if hidden_loss else ()
    if cfg.teacher_device is None:
        return OnlineTeacher(model, layers, overlaps=cfg.teacher_overlap)
    from kdtune.teachers.other_device import OtherDeviceTeacher  # few runs have two devices

    return OtherDeviceTeacher(model, layers, device=world.device)


def build_teacher_model(cfg: Any, world: World) -> Transformer:
    """Build the frozen teacher's model, parallelized over this world.

    Args:
        cfg: with the keys of `TeacherConfig`, dtype and parallelism, and maybe compile.
        world: this process's.

    Raises:
        ConfigError: its head cannot be used by the loss.
        CheckpointError: the files cannot be read or do not fit the builder.
    """
    dtype = dtype_from_name(cfg.teacher_dtype or cfg.dtype)
    builder, checkpointer = factory(cfg.teacher_model), instantiate(cfg.teacher_checkpointer)
    if world.is_teacher or cfg.teacher_device:
        # Before its weights are read.
        head = parallel.meta_model(builder, checkpointer, dtype=dtype).output
        check_sendable(head, "teacher_device" if cfg.teacher_device else "teacher_processes")
    parallelism = instantiate(cfg.teacher_parallelism or cfg.parallelism)
    device = torch.device(cfg.teacher_device) if cfg.teacher_device else world.device
    loaded_on = replace(world, device=torch.device("cpu") if cfg.teacher_offload else device)
    teacher = parallel.build_model(
        builder, checkpointer, dtype=dtype, world=loaded_on, parallelism=parallelism, trainable=False,
        quantization=cfg.teacher_quantization, compile=getattr(cfg, "compile", False),
    )  # fmt: skip
    if cfg.teacher_offload:
        from kdtune.teachers.offload import offload_layers  # few teachers are

        offload_layers(teacher, device)
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
            model_config = parallel.model_config(builder, source)
        except KDTuneError:  # said elsewhere
            continue
        if not isinstance(model_config, TransformerConfig):
            found.append(
                f"hidden_loss: the layers of {'the teacher' if key else 'the student'} are computed by transformers, which keeps their "
                "states; ~hidden_loss"
            )
            continue
        try:
            hidden_loss.depths(model_config.num_layers)
        except ConfigError as error:
            found.append(f"{error} ({'the teacher' if key else 'the student'})")
    return found


def place_problems(cfg: Any) -> list[str]:
    """Return problems with where the teacher of a config is computed, one sentence each.

    cfg: with the keys of `TeacherConfig`, and teacher_processes if its recipe has that.
    """
    found, given = [], {key: str(value).lower() for key in PLACES if (value := getattr(cfg, key))}
    if num_processes := getattr(cfg, "teacher_processes", 0):
        found += [
            f"{key}={value}: is for a teacher in the student's processes, and with teacher_processes={num_processes} it has its own; "
            f"~{key}, or teacher_processes=0"
            for key, value in given.items()
        ]
    if cfg.teacher_device and cfg.teacher_overlap:
        found.append(
            f"teacher_overlap=true, teacher_device={cfg.teacher_device}: on a device of its own the teacher computes beside the "
            "student anyway; ~teacher_overlap"
        )
    scheme = SCHEMES.get(scheme_name(cfg.teacher_quantization or ""))
    if cfg.teacher_offload and scheme is not None and scheme.lowest_capability is not None:
        works = ", ".join(name for name, one in SCHEMES.items() if one.lowest_capability is None)
        found.append(
            f"teacher_offload=true, teacher_quantization={cfg.teacher_quantization}: the layers are quantized in the CPU's memory, "
            f"where this scheme does not work; allowed are {works}"
        )
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
        keys = (
            "teacher_model",
            "teacher_checkpointer",
            "teacher_dtype",
            "teacher_quantization",
            "teacher_processes",
            *PLACES,
        )
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
    else:
        found += place_problems(cfg)
    from kdtune.teachers import other_tokenizer  # the tokenizer libraries take a while to import

    return found + other_tokenizer.problems(cfg)
