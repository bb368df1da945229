"""Start of a training run: the processes, and the data, which is checked before weights are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from kdtune import config, parallel, teachers
from kdtune.config import factory, instantiate
from kdtune.data import Batch, Dataset, Loader, PackedDataset, PackedStream, batches, load_dataset
from kdtune.data.micro_batches import is_padding_free
from kdtune.distributed import World
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.losses import KDLoss, check_head
from kdtune.models import Transformer, dtype_from_name, family_of
from kdtune.runs.progress import Progress
from kdtune.runs.resume import is_finished, step_to_resume
from kdtune.tokenizers import Tokenizer
from kdtune.training.checks import check_save_weights, may_change, needs_same_template
from kdtune.training.fp32_updates import update_in_fp32
from kdtune.training.in_backward import step_in_backward
from kdtune.training.inputs import check_inputs, shortest_context
from kdtune.training.optim import trainable_parameters
from kdtune.training.out_of_memory import explained_out_of_memory
from kdtune.training.precision import resolve_device
from kdtune.training.rounding import warn_of_lost_updates
from kdtune.training.seed import set_seed
from kdtune.training.steps import plan_steps, step_text, take_micro_batches
from kdtune.training.tokenizer import load_tokenizer, pair_tokenizers

log = get_logger(__name__)


@contextmanager
def start(cfg: Any) -> Iterator[tuple[World, Progress]]:
    """Start the processes of a training recipe with their device, seed and log level.

    cfg: the recipe's, a `TrainingConfig`.
    """
    device, teacher_processes = resolve_device(cfg.device), getattr(cfg, "teacher_processes", 0)
    with instantiate(cfg.parallelism).start_world(device, teacher_processes=teacher_processes) as world:
        get_logger().setLevel(cfg.log_level if world.is_main else "ERROR")
        set_seed(cfg.seed, cfg.cudnn_deterministic_mode)
        with Progress(silent=not world.is_main) as progress, explained_out_of_memory(cfg, world):
            yield world, progress


@dataclass(frozen=True)
class Inputs:
    """Inputs of a training run: data and the step it begins at; known before weights are read."""

    cfg: Any
    """The recipe's config, with the date that the chat template prints fixed."""
    tokenizer: Tokenizer
    loader: Loader
    """This process's share of the training data."""
    held_out: list[Batch] | None
    """This process's share of dataset_val."""
    fingerprints: dict[str, Any]
    """Fingerprints of rows, weights and tokenizer, for run.json."""
    batches_per_step: int
    """Micro-batches of a step, over all processes."""
    steps_per_epoch: int
    num_steps: int
    resume_from: Path | None
    """The step folder that the run continues from; None: it starts from scratch."""
    is_finished: bool
    """The run in output_dir has made all its steps and written final/."""


def load_inputs(cfg: Any, world: World, progress: Progress) -> Inputs:
    """Read and check the tokenizer and the data and, for a resumed run, compare them with those it was started with.

    All processes of `world` call it with `cfg`, a `TrainingConfig`; `progress` shows its phases. ConfigError if the run
    in output_dir was started with another config, weights or tokenizer; DataError if the data cannot be read, or
    nothing in it can be trained on.
    """
    output_dir, batches_per_step = Path(cfg.output_dir), cfg.gradient_accumulation_steps * world.dp_size
    tokenizer, cfg = load_tokenizer(cfg)
    resume_from = None
    if cfg.resume_from_checkpoint:
        values = config.as_values(cfg)
        resume_from = world.broadcast(
            step_to_resume(output_dir, values, may_change=may_change(cfg), batches_per_step=batches_per_step)
        )
    progress.phase("reading the data")
    tokenizer = pair_tokenizers(cfg, tokenizer)
    dataset, dataset_val = (
        load_dataset(key, getattr(cfg, key), tokenizer, cache_dir=cfg.tokenized_cache_dir)
        for key in ("dataset", "dataset_val")
    )
    dataset, dataset_val = teachers.fit_data(cfg, tokenizer, dataset, dataset_val)
    _check_examples(cfg, dataset)
    fingerprints = check_inputs(cfg, tokenizer, {"dataset": dataset, "dataset_val": dataset_val}, world)
    teachers.log_aligned_share(tokenizer, dataset)
    _check_tokenizers(cfg, tokenizer, dataset)
    share: dict[str, Any] = {
        "rank": world.dp_rank,
        "num_ranks": world.dp_size,
        "padding_free": is_padding_free(cfg),
        "tokens_per_micro_batch": cfg.tokens_per_micro_batch,
    }
    loader = Loader(
        dataset,
        batch_size=cfg.batch_size,
        shuffle=cfg.shuffle,
        seed=cfg.seed,
        pad_id=tokenizer.pad_id,
        num_workers=cfg.num_workers,
        batches_per_step=cfg.gradient_accumulation_steps,
        **share,
    )
    held_out = None
    if dataset_val is not None:
        held_out = list(batches(dataset_val, cfg.batch_size_val or cfg.batch_size, tokenizer.pad_id, **share))
    steps_per_epoch, num_steps = plan_steps(cfg, loader.batches_per_epoch, batches_per_step)
    log.info(step_text(cfg.batch_size, cfg.gradient_accumulation_steps, world.dp_size))
    finished = cfg.resume_from_checkpoint and world.broadcast(is_finished(output_dir, num_steps))
    if finished:
        world.print(f"{output_dir}: all {num_steps} steps are done")
    return Inputs(
        cfg,
        tokenizer,
        loader,
        held_out,
        fingerprints,
        batches_per_step=batches_per_step,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        resume_from=resume_from,
        is_finished=finished,
    )


def _check_tokenizers(cfg: Any, tokenizer: Tokenizer, dataset: Dataset) -> None:
    for key in ("checkpointer", "teacher_checkpointer"):
        if tokenizer.pair and key == "teacher_checkpointer":
            continue  # the teacher has its own
        source = instantiate(getattr(cfg, key, None))
        teachers.check_tokenizer(tokenizer, source, key, path=cfg.tokenizer.get("path"), is_chat=dataset.is_chat,
                                 same_template=needs_same_template(cfg))  # fmt: skip


def _check_examples(cfg: Any, dataset: Dataset) -> None:
    if getattr(cfg, "rollouts", None) is not None:
        from kdtune.rollouts.record import check_prompts  # few runs have prompts

        check_prompts(dataset)
    if not is_padding_free(cfg) and isinstance(dataset, PackedDataset | PackedStream):
        raise ConfigError(
            "dataset.packed=true: padding its documents to the longest would take many times the memory; padding_free=true, or "
            "~dataset.packed"
        )


def steps_of(cfg: Any) -> tuple[Iterator[list[Batch]], torch.device]:
    """Return the micro-batches of each step of a training config, `cfg`, in one process, and its device; errors as in `load_inputs`."""
    device = resolve_device(cfg.device)
    loader = load_inputs(cfg, World(device), Progress(silent=True)).loader
    return iter(lambda: take_micro_batches(loader, cfg.gradient_accumulation_steps), []), device


def build_trained_model(cfg: Any, world: World, inputs: Inputs, name: str) -> Transformer:
    """Build the trained model over the processes, with the weights of the step folder if the run is resumed.

    `cfg` is the recipe's, a `TrainingConfig`; the `world`'s processes share the model; `inputs` are from `load_inputs`;
    `name` is its name in messages, such as "student". CheckpointError if the files cannot be read or do not fit builder
    or adapter; ConfigError if the adapter does not fit, there is none for save_weights, or the loss cannot use the
    output head.
    """
    model = parallel.build_model(
        factory(cfg.model),
        instantiate(cfg.checkpointer),
        dtype=dtype_from_name(cfg.dtype),
        world=world,
        parallelism=instantiate(cfg.parallelism),
        adapter=factory(cfg.adapter),
        weights=inputs.resume_from,
        compile=cfg.compile,
        float8_training=cfg.float8_training,
        activation_checkpointing=cfg.checkpointed,
        activation_offloading=cfg.activation_offloading,
    )
    check_save_weights(model, cfg.save_weights)
    family_of(model.config)  # before it is trained: a model without one cannot be saved
    check_head(name, model.output)
    return model


def build_kd_loss(cfg: Any, divergence: Any, student: Transformer, teacher: Any, world: World) -> KDLoss:
    """Build the loss of a distillation config; the gradient of a hidden-state term's maps is summed over the world's shares.

    `cfg` has kd_ratio, teacher_targets, hidden_loss and the keys of every training recipe; `divergence` is of its kd_loss;
    `student` and `teacher` give the widths for hidden_loss.
    """
    hidden_loss = instantiate(cfg.hidden_loss)
    if hidden_loss is not None:
        widths = (student.config.embed_dim, teacher.model.config.embed_dim)
        dtype = torch.promote_types(student.dtype, torch.float32)
        hidden_loss.attach(student.config.num_layers, widths, seed=cfg.seed, dtype=dtype, device=world.device)
        for parameter in hidden_loss.parameters():
            parameter.register_hook(world.sum_gradient)
    return KDLoss(divergence, kd_ratio=cfg.kd_ratio, hidden_loss=hidden_loss,
                  teacher_targets=instantiate(cfg.teacher_targets), **cfg.loss_settings())  # fmt: skip


def start_rollouts(cfg: Any, inputs: Inputs, student: Transformer, teacher: Any, world: World) -> Any:
    """Return the `rollouts` of a distillation config `cfg`, ready to write; None without them.

    `inputs` are from `load_inputs`; `student` and `teacher` write, or are learned from, on the processes of the `world`.
    """
    rollouts = instantiate(cfg.rollouts)
    if rollouts is not None:
        rollouts.start(inputs, student, teacher, world, context=shortest_context(cfg, student))
    return rollouts


def build_optimizer(cfg: Any, model: Transformer, num_steps: int, loss: KDLoss | None = None) -> tuple[Optimizer, Any]:
    """Build the optimizer of the trainable parameters, and its schedule for `num_steps`: None without `lr_scheduler`.

    `cfg`: optimizer, lr_scheduler, optimizer_in_backward, weight_update, seed. The model's parameters are one group, those of a
    `loss` another.
    """
    optimizer: Optimizer = instantiate(cfg.optimizer, params=trainable_parameters(model))
    if loss is not None and loss.parameters():
        named = [(f"loss.{name}", parameter) for name, parameter in loss.module.named_parameters()]
        optimizer.add_param_group({"params": named, "lr": loss.module.projection_lr, "weight_decay": 0.0})
    if cfg.weight_update == "nearest":
        warn_of_lost_updates(optimizer)
    else:
        update_in_fp32(optimizer, cfg.weight_update, seed=cfg.seed)
    scheduler = instantiate(cfg.lr_scheduler, optimizer=optimizer, optional={"num_training_steps": num_steps})
    if cfg.optimizer_in_backward:
        step_in_backward(optimizer)
    return optimizer, scheduler
