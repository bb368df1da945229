"""Estimate what a run takes on each rank, from the config alone: memory, communication, operations, time.

Sizes of parameters, gradients and optimizer state are exact: the real model is sharded, on the meta device. The costs of a
layer and the loss are measured by running them there; `phases` determines what exists at which point of a step.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kdtune.config import factory, instantiate
from kdtune.distributed import Parallelism, World
from kdtune.errors import ConfigError
from kdtune.losses import Divergence, HiddenSignal, HiddenStateLoss, Signal, divergence_name, divergence_of, is_of_text
from kdtune.models import Transformer, dtype_from_name, has_adapters
from kdtune.models.float8 import apply_float8
from kdtune.parallel import meta_model
from kdtune.parallel.activations import SMALLEST_BYTES
from kdtune.planner.costs import (
    MicroBatch,
    fixed_bytes,
    hidden_bytes,
    hidden_loss_cost,
    layer_cost,
    longest_batch,
    loss_cost,
    micro_batches,
    norm_kept,
    offloaded_bytes,
    saved_products,
)
from kdtune.planner.hardware import GPU, GPUS_PER_HOST, UTILIZATION
from kdtune.planner.meta_device import Cost
from kdtune.planner.phases import (
    CommVolume,
    Phase,
    SavedActivations,
    StudentCost,
    TeacherCost,
    phases,
    volume,
    writing_phases,
)
from kdtune.planner.sizes import FSDPUnit, ModelSizes, model_sizes, update_bytes
from kdtune.planner.teacher import TeacherEstimate, colocated_teacher, remote_teacher, stored_signal
from kdtune.planner.writing import kept_cache, writers, writing

# What the configs of recipes that train have.
_NEEDED = ("optimizer", "parallelism", "model", "checkpointer", "adapter", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Estimate:
    """Estimate for one rank of a run."""

    world_size: int
    """Number of all processes, including those of a disaggregated teacher."""
    batch: MicroBatch
    seq_len_source: str
    accumulation: int
    student: StudentCost
    teacher: TeacherCost | None
    loss: Cost
    phases: tuple[Phase, ...]
    volume: CommVolume
    dtype: str
    """Dtype of the computation."""
    save_weights: str
    teacher_estimate: TeacherEstimate | None = None
    """Estimate for a rank of a disaggregated teacher, or for `teacher_device`, if known."""
    maps: int = 0
    """Bytes of the learned maps of `hidden_loss` and their optimizer state, which every rank holds whole."""
    stored_head: int = 0
    """Bytes of the head of a teacher that is read from files, on every rank."""

    @property
    def held(self) -> FSDPUnit:
        """The rank's shares of the trained model: exact."""
        return self.student.sizes.total

    @property
    def layout(self) -> tuple[int, ...]:
        """Sizes of the mesh: dp_replicate, dp_shard, and any further dimension."""
        return self.student.sizes.layout

    @property
    def peak(self) -> Phase:
        """The phase of a step with the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def tokens(self) -> int:
        """Number of tokens of a step, over all ranks."""
        return self.batch.num_tokens * self.accumulation * self.layout[0] * self.layout[1]

    @property
    def flops(self) -> int:
        """Floating-point operations of a step on one rank, including recomputed layers."""
        student = self.student
        # What is recomputed selectively has no products.
        is_selective = student.saved.checkpointed == "selective"
        again = 0 if is_selective else student.saved.num_recomputed(student.sizes.num_layers)
        forwards = (student.sizes.num_layers + again) * student.layer.forward_flops
        total = forwards + student.sizes.num_layers * student.layer.backward_flops + self.loss.forward_flops
        if self.teacher is not None and not self.teacher.is_elsewhere:
            total += self.teacher.flops
        return self.accumulation * total

    @property
    def step_checkpoint(self) -> int:
        """Bytes of a `step_N`, over all ranks: weights (of a model with adapters only these) and resume state."""
        weights = self.held.all_trained if has_adapters(self.student.sizes.pieces) else self.held.all_stored
        return weights + self.held.all_state + self.maps

    @property
    def final_checkpoint(self) -> int:
        """Bytes of `final/`: the model with merged adapters, the adapters, or both."""
        if not has_adapters(self.student.sizes.pieces):
            return self.held.all_stored
        base = self.held.all_stored - self.held.all_trained
        return {"both": self.held.all_stored, "merged": base, "adapter": self.held.all_trained}[self.save_weights]

    @property
    def host_bytes(self) -> int:
        """Bytes that a rank holds in CPU memory instead (cpu_offload, activation_offloading, teacher_offload)."""
        own = self.held.stored + self.held.gradients + self.held.state if self.student.sizes.is_offloaded else 0
        if self.teacher is not None and not self.teacher.is_elsewhere:
            own += self.teacher.on_host
        return own + self.student.saved.on_host(self.student.sizes.num_layers)

    def computing(self, gpu: GPU) -> float:
        """Seconds of computation per step, from stated figures; with a teacher elsewhere the slower side's time and one wait."""
        # The optimizer reads weights, gradients and state, and writes weights and state.
        updated = 3 * self.held.gradients + 2 * self.held.state
        speed = UTILIZATION * gpu.flops(is_bf16=self.dtype == "bf16")
        own = self.flops / speed
        if self.teacher is not None and self.teacher.is_elsewhere:
            # It is asked for all micro-batches at the step's start: the first is waited for, or the student's last one follows.
            answer = self.teacher.flops / speed
            own = max(answer + own, self.accumulation * answer + own / self.accumulation)
        return own + updated / (1e9 * gpu.memory_gb_s)

    def communicating(self, gpu: GPU) -> float:
        """Seconds of communication per step, from stated figures. Its overlap with computation is unknown."""
        inner_gb_s, outer_gb_s, bridge_gb_s = (
            gpu.host_link_gb_s if ranks <= GPUS_PER_HOST else gpu.network_gb_s
            for ranks in (math.prod(self.layout[1:]), math.prod(self.layout), self.world_size)
        )
        shared = self.volume.gather + self.volume.reduce_scatter + self.volume.tensor_parallel
        summed, answers = self.volume.all_reduce, self.volume.answers
        return (shared / inner_gb_s + summed / outer_gb_s + answers / bridge_gb_s) / 1e9


def make_estimate(cfg: Any, world: World, *, device_type: str | None = None, seq_len: int | None = None) -> Estimate:
    """Estimate a training recipe's config for one rank. Loads no weights; all ranks of a real world call it.

    Args:
        cfg: config of a recipe that trains.
        world: the rank to estimate, among those that hold the student; rank 0 of `fake_world(size)` for a world that does not
            exist.
        device_type: device type of the ranks, such as "cuda"; None: the world's.
        seq_len: tokens per example; None: the tokenizer's max_seq_len, the upper limit.

    Raises:
        ConfigError: the recipe does not train, or its sizes do not fit the number of processes.
        CheckpointError: only the checkpoint describes a model, and it cannot be read.
    """
    check_trains(cfg)
    parallelism: Parallelism = instantiate(cfg.parallelism)
    parallelism.sizes(world.size)
    source, dtype = instantiate(cfg.checkpointer), dtype_from_name(cfg.dtype)
    model = meta_model(factory(cfg.model), source, adapter=factory(cfg.adapter), dtype=dtype)
    ours = model_sizes(model, parallelism, world, cfg.optimizer, cfg.weight_update)
    if cfg.float8_training is not None:
        apply_float8(ours.pieces, cfg.float8_training)
    kd_ratio, num_teachers = getattr(cfg, "kd_ratio", 0.0), getattr(cfg, "teacher_processes", 0)
    batch, source = longest_batch(cfg, ours.pieces.config.max_seq_len, device_type or world.device.type, seq_len)
    accumulation = micro_batches(cfg, batch)
    student = _student_cost(cfg, ours, batch)
    teacher: TeacherCost | None = None
    if hasattr(cfg, "teacher_model") and getattr(cfg, "teacher", None) is None:
        teacher = remote_teacher(cfg, world.size, batch) if num_teachers else colocated_teacher(cfg, world, batch)
    stored = stored_signal(cfg, batch)
    asked = teacher if kd_ratio > 0 else None
    loss, chunk_bytes = loss_cost(
        ours.pieces,
        asked.sizes.pieces if asked else stored if kd_ratio > 0 else None,
        batch,
        divergence=_no_divergence if teacher is None and stored is None else _divergence(cfg),
        kd_ratio=kd_ratio,
        chunk_size=cfg.loss_chunk_size,
        logits_dtype=None if cfg.loss_logits_dtype is None else dtype_from_name(cfg.loss_logits_dtype),
    )
    maps = (0, 0)
    if teacher is not None and cfg.hidden_loss:
        teacher, loss, maps = _with_hidden_loss(instantiate(cfg.hidden_loss), ours, teacher, loss, batch)
    update = update_bytes(
        cfg.optimizer, ours, batch.device_type, cfg.weight_update, in_backward=cfg.optimizer_in_backward
    )
    found = phases(
        student, teacher, loss, accumulation, update, kept_by_loss=chunk_bytes if batch.device_type == "cpu" else 0
    )
    here = {"student": student.sizes} | ({"teacher": teacher.sizes} if teacher and not teacher.is_elsewhere else {})
    written = {name: writing(cfg, here[name], batch) for name in here if name in writers(cfg)}
    kept = kept_cache(cfg, written, batch)
    return Estimate(
        world_size=world.size + num_teachers,
        batch=batch,
        seq_len_source=source,
        accumulation=accumulation,
        student=student,
        teacher=teacher,
        loss=loss,
        phases=tuple(
            _with_stored(_with_maps(replace(one, cache=max(one.cache, kept)), *maps), stored)
            for one in (*found, *writing_phases(student, teacher, written))
        ),
        volume=volume(
            ours, asked, accumulation, batch, recomputed=student.saved.num_recomputed(ours.num_layers) / ours.num_layers
        ),
        dtype=(parallelism.param_dtype if world.size > 1 else None) or cfg.dtype,
        save_weights=cfg.save_weights,
        maps=sum(maps),
        stored_head=_head_bytes(stored),
    )


def _divergence(cfg: Any) -> Divergence:
    divergence = divergence_of(instantiate(cfg.kd_loss))
    is_cross = getattr(divergence, "is_cross_tokenizer", False)
    if is_cross or is_of_text(divergence):
        what = "a cross-tokenizer kd_loss" if is_cross else "a kd_loss of the text's likelihood"
        raise ConfigError(
            f"plan: the cost of {what} ({divergence_name(divergence)}) is not estimated; plan with kd_loss=kdtune.losses.ForwardKL, which "
            "gives the cost of all but the loss"
        )
    return divergence


def _with_hidden_loss(
    hidden_loss: HiddenStateLoss, ours: ModelSizes, teacher: TeacherCost, loss: Cost, batch: MicroBatch
) -> tuple[TeacherCost, Cost, tuple[int, int]]:
    """Return the teacher with the hidden states that it keeps, the loss with the term on them, and the bytes of its maps.

    These are of the maps and of their optimizer state, taken for as large as the model's in proportion.
    """
    term, maps = hidden_loss_cost(hidden_loss, ours.pieces, ours.num_layers, teacher.sizes.pieces, batch)
    # That after the last layer is what the head reads.
    num_kept = 1 + sum(depth < teacher.sizes.num_layers for depth in hidden_loss.depths(teacher.sizes.num_layers))
    whole = Cost(
        kept=loss.kept + term.kept,
        forward_peak=max(loss.forward_peak, loss.kept + term.forward_peak),
        backward_peak=loss.backward_peak + term.backward_peak,
        forward_flops=loss.forward_flops + term.forward_flops + term.backward_flops,
        backward_flops=loss.backward_flops,
    )
    state = maps * ours.total.all_state // max(1, ours.total.all_trained)
    return replace(teacher, hidden=num_kept * teacher.hidden), whole, (maps, state)


def _with_maps(phase: Phase, maps: int, state: int) -> Phase:
    """Return the phase with learned maps, their gradients and optimizer state, which every rank holds whole."""
    held = {"weights": maps, "gradients": maps, "optimizer": state}
    return replace(phase, **{name: getattr(phase, name) + size for name, size in held.items()})


def _with_stored(phase: Phase, signal: Signal | None) -> Phase:
    """Return the phase with the head of a teacher that is read from files, and a micro-batch's rows until the loss has read them."""
    if signal is None:
        return phase
    rows = sum(one.nbytes for one in vars(signal).values() if isinstance(one, Tensor))
    is_used = phase.name in ("the student's first use", "the student's forward", "the loss")
    return replace(
        phase, weights=phase.weights + _head_bytes(signal), activations=phase.activations + (rows if is_used else 0)
    )


def _head_bytes(signal: Signal | None) -> int:
    return signal.output.weight.nbytes if isinstance(signal, HiddenSignal) else 0


def check_trains(cfg: Any) -> None:
    """Raise ConfigError if the config is not one of a recipe that trains."""
    if missing := [key for key in _NEEDED if not hasattr(cfg, key)]:
        raise ConfigError(
            f"plan: the config has no {missing[0]}, so its recipe does not train; allowed are configs of finetune and "
            "knowledge_distillation (`kdtune ls` lists them)"
        )


def _no_divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    raise AssertionError("there is no teacher")


def _student_cost(cfg: Any, ours: ModelSizes, batch: MicroBatch) -> StudentCost:
    return StudentCost(
        ours,
        layer_cost(ours.pieces, batch, backward=True),
        norm_kept(ours.pieces, batch),
        hidden_bytes(ours.pieces, batch),
        fixed_bytes(ours.pieces, batch),
        saved=_saved_activations(cfg, ours.pieces, batch),
        updates_in_backward=cfg.optimizer_in_backward,
    )


def _saved_activations(cfg: Any, pieces: Transformer, batch: MicroBatch) -> SavedActivations:
    recomputed = hidden = hidden_bytes(pieces, batch)
    moved = None
    if cfg.checkpointed == "selective":
        recomputed += saved_products(pieces, batch)
    if not cfg.activation_offloading:
        return SavedActivations(cfg.checkpointed, recomputed)
    if not isinstance(cfg.checkpointed, str):
        moved = offloaded_bytes(pieces, batch)
    # Only the input is moved: the outputs of products are kept by the recomputation itself, not by autograd.
    moved_input = hidden if hidden >= SMALLEST_BYTES else 0
    return SavedActivations(cfg.checkpointed, recomputed - moved_input, moved, moved_input)
