"""The teacher in a plan: colocated with the student, or on its own processes (kdtune/teachers/remote.py)."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtune.config import factory, instantiate
from kdtune.config.check import COMPONENT, resolve
from kdtune.distributed import Parallelism, World
from kdtune.losses import Signal
from kdtune.models import dtype_from_name
from kdtune.models.quantization import linear_quantizer, scheme_name, target_linears
from kdtune.parallel import meta_model, model_config
from kdtune.planner.costs import MicroBatch, fixed_bytes, hidden_bytes, layer_cost, longest_batch, micro_batches
from kdtune.planner.meta_device import Cost
from kdtune.planner.phases import Phase, TeacherCost, teacher_gather, teacher_held, teacher_phases
from kdtune.planner.sizes import ModelSizes, model_sizes
from kdtune.planner.writing import writers, writing

# Schemes that torchao applies on a CUDA device only, and those counted in their place: equal bytes, and 3 % fewer.
_STAND_INS = {"float8_dynamic": "float8_weight_only", "int4_weight_only": "nf4"}


@dataclass(frozen=True)
class TeacherEstimate:
    """Estimate for a rank that holds only the teacher."""

    teacher: TeacherCost
    phases: tuple[Phase, ...]
    flops: int
    """Floating-point operations of a step."""
    gather: int
    """Bytes received of its weights in a step."""
    device: str | None = None
    """The `teacher_device`, for a teacher of the student's process."""

    @property
    def peak(self) -> Phase:
        """The phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.total)


def make_teacher_estimate(
    cfg: Any, world: World, num_students: int, *, device_type: str | None = None, seq_len: int | None = None
) -> TeacherEstimate:
    """Estimate a rank of `world` that holds only the teacher (`teacher_processes`), for `num_students` ranks of the student.

    With `teacher_device`, that device is such a rank. The other arguments, and the errors, are those of `make_estimate`.
    """
    context = model_config(factory(cfg.model), instantiate(cfg.checkpointer)).max_seq_len
    batch, _ = longest_batch(cfg, context, device_type or world.device.type, seq_len)
    share, rounds = _share(batch, num_students, world.size)
    teacher = replace(
        _teacher_cost(cfg, _sizes(cfg, _parallelism(cfg), world), share), num_ranks=world.size, rounds=rounds
    )
    # The answer before is kept until it has been fetched.
    found = [*teacher_phases(teacher, teacher_held(teacher), unfetched=teacher.hidden)]
    if "teacher" in writers(cfg):
        own = writing(cfg, teacher.sizes, batch)
        found.append(
            Phase("the writing of the texts", **teacher_held(teacher), activations=own.working, cache=own.cache)
        )
    steps = micro_batches(cfg, batch)
    return TeacherEstimate(
        teacher, tuple(found), steps * teacher.flops, steps * teacher_gather(teacher), cfg.teacher_device
    )


def colocated_teacher(cfg: Any, world: World, batch: MicroBatch) -> TeacherCost:
    """Return the teacher colocated with the student. With kd_ratio 0 it is loaded all the same, for validation."""
    runs = cfg.kd_ratio > 0 or bool(cfg.hidden_loss)
    return replace(
        _teacher_cost(cfg, _sizes(cfg, _parallelism(cfg), world), batch, runs=runs),
        is_elsewhere=has_own_device(cfg, batch.device_type),
        overlaps=cfg.teacher_overlap,
    )


def stored_signal(cfg: Any, batch: MicroBatch) -> Signal | None:
    """Return a micro-batch's signal, without numbers, from a teacher that reads it from files; None for another teacher."""
    node = getattr(cfg, "teacher", None)
    if node is None or not hasattr(resolve(node[COMPONENT]), "meta_signal"):
        return None
    signal: Signal = instantiate(node).meta_signal((batch.batch_size, batch.seq_len))
    return signal


def has_own_device(cfg: Any, device_type: str) -> bool:
    """Return whether the teacher of a process computes on another device than the student's, which is of that type."""
    if cfg.teacher_device is None:
        return False
    theirs, own = torch.device(cfg.teacher_device), torch.device(cfg.device or device_type)
    return theirs.type != device_type or (theirs.index or 0) != (own.index or 0)


def remote_teacher(cfg: Any, num_students: int, batch: MicroBatch) -> TeacherCost:
    """Return the disaggregated teacher as a student rank sees it; its sizes are those of the full model."""
    share, rounds = _share(batch, num_students, cfg.teacher_processes)
    # Head and hidden states come in the dtype that it computes in.
    dtype = _parallelism(cfg).param_dtype or cfg.teacher_dtype or cfg.dtype
    sizes = _sizes(cfg, Parallelism(), World(torch.device("cpu")), dtype=dtype)
    answer = hidden_bytes(sizes.pieces, batch)
    cost = _teacher_cost(cfg, sizes, share)
    return replace(cost, hidden=answer, num_ranks=cfg.teacher_processes, rounds=rounds, is_elsewhere=True)


def _teacher_cost(cfg: Any, sizes: ModelSizes, batch: MicroBatch, *, runs: bool = True) -> TeacherCost:
    cost = layer_cost(sizes.pieces, batch, backward=False) if runs else Cost(0, 0, 0, 0, 0)
    hidden, fixed = hidden_bytes(sizes.pieces, batch), fixed_bytes(sizes.pieces, batch)
    return TeacherCost(sizes, cost, hidden, fixed, is_offloaded=cfg.teacher_offload)


def _parallelism(cfg: Any) -> Parallelism:
    parallelism: Parallelism = instantiate(cfg.teacher_parallelism) or instantiate(cfg.parallelism)
    return parallelism


def _sizes(cfg: Any, parallelism: Parallelism, world: World, *, dtype: str | None = None) -> ModelSizes:
    own = dtype_from_name(dtype or cfg.teacher_dtype or cfg.dtype)
    model = meta_model(factory(cfg.teacher_model), instantiate(cfg.teacher_checkpointer), dtype=own)
    if cfg.teacher_quantization:
        quantize_linear = linear_quantizer(_STAND_INS.get(scheme := scheme_name(cfg.teacher_quantization), scheme))
        for name, linear in target_linears(model).items():
            quantize_linear(name, linear)
    return model_sizes(model.requires_grad_(False), parallelism, world)


def _share(batch: MicroBatch, num_students: int, num_teachers: int) -> tuple[MicroBatch, int]:
    """Return the largest batch that a teacher rank computes at once, and how many per micro-batch of all student ranks."""
    sharers = max(1, num_teachers // num_students)
    return replace(batch, batch_size=-(-batch.batch_size // sharers)), -(-num_students // num_teachers)
