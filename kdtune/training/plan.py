"""What a run will take on each rank, before it runs: memory, communication, operations, time; from the config alone.

Sizes of parameters, gradients and optimizer state are exact: the real model is sharded, on the meta device. What a layer and
the loss take is found by running them there; what exists when, by `plan_moments`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdtune.config import instantiate
from kdtune.distributed import Parallelism, World, meta_model
from kdtune.errors import ConfigError
from kdtune.models import has_adapters
from kdtune.training.hardware import GPU, GPUS_PER_HOST, UTILIZATION
from kdtune.training.meta_run import Cost
from kdtune.training.plan_costs import MicroBatch, hidden_bytes, layer_cost, loss_cost, norm_kept, rope_bytes
from kdtune.training.plan_moments import Moment, Taught, Trained, Volume, moments, volume
from kdtune.training.plan_sizes import ModelSizes, Unit, model_sizes, update_bytes
from kdtune.training.precision import dtype_from_name

DEFAULT_SEQ_LEN = 2048
# What the configs of recipes that train have.
_NEEDED = ("optimizer", "parallelism", "model", "checkpointer", "adapter", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Plan:
    """What a rank of a run takes."""

    world_size: int
    batch: MicroBatch
    seq_len_source: str
    accumulation: int
    student: Trained
    teacher: Taught | None
    loss: Cost
    moments: tuple[Moment, ...]
    volume: Volume
    dtype: str
    save_weights: str

    @property
    def held(self) -> Unit:
        """The trained model's shares: exact."""
        return self.student.sizes.total

    @property
    def layout(self) -> tuple[int, ...]:
        """Sizes of the mesh: dp_replicate, dp_shard, and what there is more."""
        return self.student.sizes.layout

    @property
    def peak(self) -> Moment:
        """The moment at which most exists."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.batch.num_tokens * self.accumulation * self.layout[0] * self.layout[1]

    @property
    def flops(self) -> int:
        """Floating-point operations of a step on one rank, those of recomputed layers too."""
        student = self.student
        forwards = 2 if student.recomputes else 1
        layer = forwards * student.layer.forward_flops + student.layer.backward_flops
        total = student.sizes.num_layers * layer + self.loss.forward_flops
        if self.teacher is not None:
            total += self.teacher.sizes.num_layers * self.teacher.layer.forward_flops
        return self.accumulation * total

    @property
    def step_checkpoint(self) -> int:
        """Bytes of a `step_N`, of all ranks: weights (of a model with adapters only these) and resume state."""
        weights = self.held.all_trained if has_adapters(self.student.sizes.pieces) else self.held.all_stored
        return weights + self.held.all_state

    @property
    def final_checkpoint(self) -> int:
        """Bytes of `final/`: the model with the adapters merged into it, the adapters, or both."""
        if not has_adapters(self.student.sizes.pieces):
            return self.held.all_stored
        base = self.held.all_stored - self.held.all_trained
        return {"both": self.held.all_stored, "merged": base, "adapter": self.held.all_trained}[self.save_weights]

    @property
    def host_bytes(self) -> int:
        """What a rank holds in the CPU's memory instead (cpu_offload)."""
        own = self.held.stored + self.held.gradients + self.held.state if self.student.sizes.is_offloaded else 0
        if self.teacher is not None and self.teacher.sizes.is_offloaded:
            own += self.teacher.sizes.total.stored
        return own

    def computing(self, gpu: GPU) -> float:
        """Seconds a step, from stated figures."""
        # The optimizer reads weights, gradients and state, and writes weights and state.
        updated = 3 * self.held.gradients + 2 * self.held.state
        return self.flops / (UTILIZATION * gpu.flops(is_bf16=self.dtype == "bf16")) + updated / (1e9 * gpu.memory_gb_s)

    def communicating(self, gpu: GPU) -> float:
        """Seconds a step, from stated figures. How far it overlaps with computing is not known."""
        inner = self.world_size // self.layout[0]
        inner_gb_s, outer_gb_s = (
            gpu.host_link_gb_s if ranks <= GPUS_PER_HOST else gpu.network_gb_s for ranks in (inner, self.world_size)
        )
        shared = self.volume.gather + self.volume.reduce_scatter + self.volume.tensor_parallel
        return shared / (1e9 * inner_gb_s) + self.volume.all_reduce / (1e9 * outer_gb_s)


def make_plan(cfg: Any, world: World, *, device_type: str | None = None, seq_len: int | None = None) -> Plan:
    """The plan of a training recipe's config, for one rank. Loads no weights; all ranks of a real world call it.

    Args:
        cfg: of a recipe that trains.
        world: the rank, whose share it is; rank 0 of `fake_world(size)` for a world that is not there.
        device_type: what the ranks compute on, such as "cuda"; None: as the world.
        seq_len: tokens an example; None: the tokenizer's max_seq_len, the longest there can be.

    Raises:
        ConfigError: the recipe does not train, or its sizes do not fit the number of processes.
        CheckpointError: a model is described by its checkpoint alone, and that cannot be read.
    """
    check_trains(cfg)
    parallelism: Parallelism = instantiate(cfg.parallelism)
    parallelism.sizes(world.size)
    model = meta_model(cfg.model, cfg.checkpointer, adapter=cfg.adapter, dtype=dtype_from_name(cfg.dtype))
    ours = model_sizes(model, parallelism, world, cfg.optimizer)
    kd_ratio = getattr(cfg, "kd_ratio", 0.0)
    # A teacher whose divergence has no weight is there all the same, for validation.
    theirs = _teacher_sizes(cfg, parallelism, world) if hasattr(cfg, "teacher_model") else None
    length, source = _seq_len(cfg, ours, seq_len)
    batch = MicroBatch(cfg.batch_size, length, device_type or world.device.type)
    student = Trained(
        ours,
        layer_cost(ours.pieces, batch, backward=True),
        norm_kept(ours.pieces, batch),
        hidden_bytes(ours.pieces, batch),
        _fixed(ours, batch),
        recomputes=cfg.enable_activation_checkpointing,
    )
    teacher = None if theirs is None else _taught(theirs, batch, runs=kd_ratio > 0)
    loss = loss_cost(
        ours.pieces,
        theirs.pieces if theirs and kd_ratio > 0 else None,
        batch,
        divergence=instantiate(cfg.kd_loss).divergence if theirs else _no_divergence,
        kd_ratio=kd_ratio,
        chunk_size=cfg.loss_chunk_size,
    )
    update = update_bytes(cfg.optimizer, ours, batch.device_type)
    return Plan(
        world_size=world.size,
        batch=batch,
        seq_len_source=source,
        accumulation=cfg.gradient_accumulation_steps,
        student=student,
        teacher=teacher,
        loss=loss,
        moments=tuple(moments(student, teacher, loss, cfg.gradient_accumulation_steps, update)),
        volume=volume(
            ours,
            theirs if kd_ratio > 0 else None,
            cfg.gradient_accumulation_steps,
            batch,
            recomputes=cfg.enable_activation_checkpointing,
        ),
        dtype=cfg.dtype,
        save_weights=cfg.save_weights,
    )


def check_trains(cfg: Any) -> None:
    """Nothing, where the config is one of a recipe that trains.

    Raises:
        ConfigError: it is not.
    """
    if missing := [key for key in _NEEDED if not hasattr(cfg, key)]:
        raise ConfigError(
            f"plan: the config has no {missing[0]}, so its recipe does not train; allowed are configs of finetune and "
            "knowledge_distillation (`kdtune ls` lists them)"
        )
    if getattr(cfg, "teacher_processes", 0):
        raise ConfigError(
            f"plan: teacher_processes={cfg.teacher_processes}: a teacher apart is not planned; teacher_processes=0 plans both "
            "models on the same processes"
        )


def _taught(sizes: ModelSizes, batch: MicroBatch, *, runs: bool) -> Taught:
    cost = layer_cost(sizes.pieces, batch, backward=False) if runs else Cost(0, 0, 0, 0, 0)
    return Taught(sizes, cost, hidden_bytes(sizes.pieces, batch), _fixed(sizes, batch))


def _teacher_sizes(cfg: Any, parallelism: Parallelism, world: World) -> ModelSizes:
    model = meta_model(
        cfg.teacher_model, cfg.teacher_checkpointer, dtype=dtype_from_name(cfg.teacher_dtype or cfg.dtype)
    )
    own = instantiate(cfg.teacher_parallelism) or parallelism
    return model_sizes(model.requires_grad_(False), own, world)


def _fixed(sizes: ModelSizes, batch: MicroBatch) -> int:
    tokens_and_labels = 2 * batch.num_tokens * torch.int64.itemsize
    return hidden_bytes(sizes.pieces, batch) + rope_bytes(sizes.pieces, batch) + tokens_and_labels


def _seq_len(cfg: Any, sizes: ModelSizes, given: int | None) -> tuple[int, str]:
    """Tokens an example, and where that is from."""
    if given is not None:
        return given, "as asked for"
    longest = cfg.tokenizer.get("max_seq_len")
    if longest is not None:
        return longest, "tokenizer.max_seq_len, the longest there can be"
    context = sizes.pieces.config.max_seq_len
    return min(context, DEFAULT_SEQ_LEN), "assumed: tokenizer.max_seq_len is not set; --seq-len gives another"


def _no_divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    raise AssertionError("there is no teacher")
