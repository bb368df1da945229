"""Distil a teacher into a student: cross entropy on the data plus forward KL to the teacher.

    kdtune run knowledge_distillation_single_device --config quickstart
    kdtune run knowledge_distillation_single_device --config llama3_2/knowledge_distillation_single_device kd_ratio=0.75

The loss of a token is (1 - kd_ratio) * cross entropy + kd_ratio * KL(teacher || student), in nats. A step's gradient is
the sum over its valid tokens divided by their number, counted before the first backward: it does not depend on how the
step is cut into micro-batches. The full [tokens, vocabulary] logits of either model never exist (kdtune/losses).
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kdtune import checkpoint, config, data, distributed, evaluation, losses, teachers, tokenizers, training
from kdtune.log import get_logger
from kdtune.models import Transformer, has_adapters

ALIASES = ("knowledge_distillation_single_device", "knowledge_distillation_distributed")


@dataclass(kw_only=True)
class Config:
    """Every key this recipe reads."""

    output_dir: config.PathText
    """Folder of the run: config.yaml, run.json, metrics.jsonl, samples.jsonl, loss.png, step_N/ and final/."""
    models_dir: config.PathText = "/tmp"
    """Where downloaded models lie, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""
    resume_from_checkpoint: bool = False
    """Go on from the newest whole step_N in output_dir (from the start where there is none)."""
    resume_changes: list[str] = field(default_factory=list)
    """Keys that a resumed run has otherwise than before: optimizer.lr or another of its arguments, lr_scheduler, kd_ratio,
    clip_grad_norm."""

    # Models
    checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The student's weights (kdtune.checkpoint.Checkpointer); null: random weights, with a builder in `model`."""
    model: Any = config.component(default=None, returns=Transformer)
    """The student's builder, checked against its checkpoint; null: built from the checkpoint's own config."""
    adapter: Any = config.component("model", default=None)
    """Adapters for the student, such as kdtune.models.apply_lora; null: as the builder says, else all parameters are trained."""
    teacher_checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The teacher's weights (adapter_dir: with a finetuned adapter merged into them); null: random weights, with a builder
    in `teacher_model`."""
    teacher_model: Any = config.component(default=None, returns=Transformer)
    """The teacher's builder; null: built from the checkpoint's own config."""
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The tokenizer of both models, such as kdtune.tokenizers.load; max_seq_len is the longest example, in tokens."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of the student's weights, gradients and optimizer state."""
    teacher_dtype: Literal["fp32", "bf16"] | None = None
    """Teacher weight dtype; null: same as dtype."""
    parallelism: Any = config.component(default={"_component_": "kdtune.distributed.Parallelism"})
    """How the student is spread over the processes that torchrun starts; with one process it does nothing."""
    teacher_parallelism: Any = config.component(default=None)
    """The same for the teacher, such as dp_shard 1 and dp_replicate -1 for a whole copy on each; null: as parallelism."""
    teacher_processes: int = 0
    """Number of torchrun's processes, the last ones, that hold the teacher alone; the others hold the student;
    `parallelism` is about these, `teacher_parallelism` about those. 0: every process holds its part of both."""
    compile: bool = False
    """torch.compile each layer of both models."""
    enable_activation_checkpointing: bool = False
    """Recompute the student's activations in backward: less memory, about a third more time."""

    # Data
    dataset: Any = config.component("tokenizer", returns=data.Dataset)
    """What is trained on, such as kdtune.data.alpaca_cleaned_dataset."""
    dataset_val: Any = config.component("tokenizer", default=None, returns=data.Dataset)
    """Held-out examples for the validation and the table at the end."""
    batch_size: int = 4
    """Examples a micro-batch."""
    batch_size_val: int | None = None
    """Examples a batch in validation; null: as batch_size."""
    shuffle: bool = True
    """A new order every epoch, from the seed alone."""
    num_workers: int = 0
    """Processes that prepare batches."""

    # Loss
    kd_loss: Any = config.component(default={"_component_": "kdtune.losses.ForwardKL"})
    """The divergence between teacher and student."""
    kd_ratio: float = 0.5
    """Weight of the divergence; cross entropy has 1 - kd_ratio."""
    loss_chunk_size: int | None = None
    """Tokens whose logits exist at a time; null: chosen by the size of the vocabulary."""

    # Optimization
    optimizer: Any = config.component("params", returns=torch.optim.Optimizer)
    """Any torch optimizer, or kdtune.training.Muon."""
    lr_scheduler: Any = config.component(
        "optimizer", optional=("num_training_steps",), default=None, returns=torch.optim.lr_scheduler.LRScheduler
    )
    """Such as kdtune.training.get_cosine_schedule_with_warmup; null: a constant learning rate."""
    epochs: int = 1
    """Passes over the data."""
    max_steps_per_epoch: int | None = None
    """Steps after which an epoch is cut; needed when the dataset is streamed."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a step."""
    clip_grad_norm: float | None = None
    """Largest norm of a step's gradient; null: no clipping."""
    seed: int = 0
    """Seed of the data order and of random weights."""
    cudnn_deterministic_mode: Literal["default", "warn", "error"] | None = None
    """torch.use_deterministic_algorithms and cuDNN's counterpart: default (off), warn or error."""

    # Validation, samples, checkpoints
    run_val_every_n_steps: int | None = None
    """Steps between validations; null: before the first step and after the last one only."""
    sample_prompts: list[str] = field(default_factory=list)
    """Questions put to the student before and after, and to the teacher."""
    sample_every_n_steps: int | None = None
    """Steps between samples in between."""
    sample_max_new_tokens: int = 64
    """Longest answer, in tokens."""
    save_every_n_steps: int | None = None
    """Steps between checkpoints; null: a checkpoint only when the run is interrupted, and final/ at the end."""
    keep_last_n_checkpoints: int | None = None
    """Older step_N folders are deleted (never the best); null: all are kept."""
    enable_async_checkpointing: bool = False
    """Go on training while a step_N is written, from a copy in the CPU's memory; false: wait for it."""
    best_metric: Literal["val_class_loss", "val_kd_loss", "val_agreement"] | None = None
    """The validation metric whose best step_N is kept and named at the end."""
    save_weights: Literal["both", "merged", "adapter"] = "both"
    """Content of final/ for a student with adapters: the merged model with the adapter in final/adapter/, or one of them."""

    # Logging
    metric_logger: Any = config.component(optional=("log_dir",), default=None)
    """A second logger beside metrics.jsonl: kdtune.training.TensorBoardLogger or WandBLogger."""
    log_every_n_steps: int = 1
    """Steps between lines of the second logger (metrics.jsonl has every step)."""
    log_peak_memory_stats: bool = True
    """Log the peak memory so far."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """What is printed beside the progress bar."""
    profiler: Any = config.component(optional=("output_dir",), default=None)
    """kdtune.training.Profiler for a torch profiler trace."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = [*training.loop_problems(self), *training.divergence_problems(self.kd_loss)]
        if not 0 <= self.kd_ratio <= 1:
            found.append(f"kd_ratio={self.kd_ratio}: must lie between 0 (cross entropy only) and 1 (divergence only)")
        if self.teacher_processes < 0:
            found.append(f"teacher_processes={self.teacher_processes}: must be at least 0")
        if self.teacher_processes > 0 and self.kd_ratio == 0:
            found.append(f"teacher_processes={self.teacher_processes}: with kd_ratio=0 no step asks the teacher; set 0")
        for builder, weights in (("model", "checkpointer"), ("teacher_model", "teacher_checkpointer")):
            if getattr(self, builder) is None and getattr(self, weights) is None:
                found.append(f"{weights}: missing, and no {builder} to start from random weights; give one of them")
        return found

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading a weight."""
        found = training.device_problems(self.device, self.dtype, distributed=True)
        found += distributed.parallelism_problems(
            self.parallelism, self.teacher_parallelism, teacher_processes=self.teacher_processes
        )
        found += training.output_dir_problems(self.output_dir, resume=self.resume_from_checkpoint)
        for key in ("checkpointer", "teacher_checkpointer"):
            if node := config.instantiate(getattr(self, key)):
                found += [f"{key}: {problem}" for problem in node.problems()]
        return found


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Runs the recipe."""
    device = training.resolve_device(cfg.device)
    with config.instantiate(cfg.parallelism).start_world(device, teacher_processes=cfg.teacher_processes) as world:
        get_logger().setLevel(cfg.log_level if world.is_main else "ERROR")
        training.set_seed(cfg.seed, cfg.cudnn_deterministic_mode)
        with training.Progress(silent=not world.is_main) as progress:
            training.print_plan(cfg, world)
            if world.is_teacher:
                return teachers.serve(lambda: build_teacher(cfg, world), world, training.InterruptFlag())
            run(cfg, world, progress)


def run(cfg: Config, world: distributed.World, progress: training.Progress) -> None:
    """Data, models, optimization, loop: from the config to final/."""
    output_dir = Path(cfg.output_dir)
    batches_per_step = cfg.gradient_accumulation_steps * world.dp_size
    tokenizer, cfg = training.load_tokenizer(cfg)
    newest = None
    if cfg.resume_from_checkpoint:
        newest = checkpoint.from_main(training.step_to_resume(
            output_dir, config.as_values(cfg), may_change=training.MAY_CHANGE, batches_per_step=batches_per_step))  # fmt: skip

    # Data. It comes first: no weight is read for examples that cannot be trained on.
    progress.phase("reading the data")
    loader, held_out, inputs = load_data(cfg, tokenizer, world)
    steps_per_epoch, num_steps = training.plan_steps(cfg, loader.batches_per_epoch, batches_per_step)
    get_logger().info(training.step_text(cfg.batch_size, cfg.gradient_accumulation_steps, world.dp_size))
    if cfg.resume_from_checkpoint and checkpoint.from_main(training.is_finished(output_dir, num_steps)):
        world.print(f"{output_dir}: all {num_steps} steps are done")
        return finish(cfg, world)

    divergence = config.instantiate(cfg.kd_loss)
    progress.phase("loading the models")
    student, teacher = build_models(cfg, tokenizer, world, newest, divergence)

    # Optimization.
    kd_loss = losses.KDLoss(divergence, kd_ratio=cfg.kd_ratio, chunk_size=cfg.loss_chunk_size)
    # Validation measures the divergence whatever kd_ratio is.
    val_loss = losses.KDLoss(divergence, kd_ratio=1.0, chunk_size=cfg.loss_chunk_size)
    optimizer = config.instantiate(cfg.optimizer, params=training.trainable_parameters(student))
    scheduler = config.instantiate(cfg.lr_scheduler, optimizer=optimizer, optional={"num_training_steps": num_steps})
    schedulers = [] if scheduler is None else [scheduler]
    training.warn_of_lost_updates(optimizer)
    step = 0
    if newest is not None:
        saved = training.load_training_state(
            newest / "state", cfg, model=student, optimizer=optimizer, schedulers=schedulers
        )
        step = saved["step"]
        loader.seek(saved["position"])

    # Loop. Only from here on is anything written: what the profiler or the logger refuses is refused before.
    profiler, second_logger = training.profiler_and_logger(cfg)
    divergence_name = losses.divergence_name(divergence)
    record = {**config.run_record(cfg), "batches_per_step": batches_per_step, "adapters": has_adapters(student),
              "divergence": divergence_name, **inputs}  # fmt: skip
    training.start_run(output_dir, step=step, resolved_config=config.resolved_yaml(cfg), record=record)
    manager = checkpoint.CheckpointManager(output_dir, keep_last_n=cfg.keep_last_n_checkpoints,
                                           best_metric=cfg.best_metric, async_save=cfg.enable_async_checkpointing)  # fmt: skip
    beside: dict[str, Any] = {"base": base_folder(cfg), "tokenizer": tokenizer, "is_chat": loader.dataset.is_chat}
    metrics = training.Metrics(world.sum)
    with (
        training.StepLog(output_dir / "metrics.jsonl" if world.is_main else None, second_logger, progress,
                         every=cfg.log_every_n_steps, divergence=divergence_name) as log,
        training.InterruptFlag(progress.write) as interrupt, profiler or nullcontext(), manager,
    ):  # fmt: skip
        if step == 0:
            log.log(validate(student, teacher, val_loss, held_out, world, progress, with_teacher_loss=True), step)
            record_samples(cfg, {"student": student, "teacher": teacher.model}, tokenizer, step, progress)
        progress.start(num_steps, step)
        stopping = world.any(interrupt.requested)
        while step < num_steps and not stopping:
            metrics.restart_clock()
            # Counted over all processes before the first backward: every gradient is normalized as it is computed.
            training.enter_epoch(loader, step // steps_per_epoch)
            position = loader.position
            micro_batches = training.take_micro_batches(loader, cfg.gradient_accumulation_steps)
            teacher.expect(micro_batches)
            (num_valid_tokens,) = world.sum([sum(batch.num_valid_tokens for batch in micro_batches)])
            for index, batch in enumerate(progress.micro_batches(micro_batches)):
                training.set_step_seed(cfg.seed, step, index * world.dp_size + world.dp_rank)
                loss, parts = kd_step(student, teacher, kd_loss, batch.to(world.device))
                (loss / num_valid_tokens).backward()
                metrics.add({"loss": loss, **parts}, batch)
            grad_norm = training.clip_grad_norm_(student.parameters(), cfg.clip_grad_norm)
            row = {**metrics.pop(), "grad_norm": grad_norm.item(), "lr": optimizer.param_groups[0]["lr"]}
            training.check_finite(row["loss"], row["grad_norm"], step + 1, position)
            optimizer.step()
            for one in schedulers:
                one.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            row |= metrics.speed(world.device)
            if cfg.log_peak_memory_stats:
                row |= training.memory_stats(world.device)
            if training.is_due(step, cfg.run_val_every_n_steps) or step == num_steps:
                row |= validate(student, teacher, val_loss, held_out, world, progress)
            log.log({"epoch": position[0], **row}, step)
            if training.is_due(step, cfg.sample_every_n_steps) or step == num_steps:
                record_samples(cfg, {"student": student}, tokenizer, step, progress)
            # Read once a step: a signal that comes later than this stops the run after the next step, and is saved there.
            stopping = world.any(interrupt.requested) and step < num_steps
            if training.is_due(step, cfg.save_every_n_steps) or stopping:
                progress.phase(f"saving step_{step}")
                manager.save(step, model=student, optimizers=optimizer, schedulers=schedulers, metrics=row,
                             extra=training.resume_extra(cfg, loader.position), **beside)  # fmt: skip
            if profiler:
                profiler.step()

    if stopping:
        return world.print(training.stopped_text(output_dir, interrupt.signal_name, step, num_steps))
    progress.phase("saving final/")
    training.write_final(output_dir, student, save_weights=cfg.save_weights, **beside)
    finish(cfg, world)


def load_data(
    cfg: Config, tokenizer: Any, world: distributed.World
) -> tuple[data.Loader, list[data.Batch] | None, dict[str, Any]]:
    """Return this process's share of the training data and the held-out batches, and the input fingerprints for run.json."""
    dataset, dataset_val = (data.load_dataset(key, getattr(cfg, key), tokenizer) for key in ("dataset", "dataset_val"))
    inputs = training.check_inputs(cfg, tokenizer, {"dataset": dataset, "dataset_val": dataset_val}, world)
    for key in ("checkpointer", "teacher_checkpointer"):
        teachers.check_tokenizer(
            tokenizer, getattr(cfg, key), key, path=cfg.tokenizer.get("path"), is_chat=dataset.is_chat
        )
    loader = data.Loader(dataset, batch_size=cfg.batch_size, shuffle=cfg.shuffle, seed=cfg.seed, pad_id=tokenizer.pad_id,
                         num_workers=cfg.num_workers, rank=world.dp_rank, num_ranks=world.dp_size)  # fmt: skip
    if dataset_val is None:
        return loader, None, inputs
    batch_size = cfg.batch_size_val or cfg.batch_size
    held_out = data.batches(dataset_val, batch_size, tokenizer.pad_id, rank=world.dp_rank, num_ranks=world.dp_size)
    return loader, list(held_out), inputs


def build_models(
    cfg: Config, tokenizer: Any, world: distributed.World, newest: Path | None, divergence: Any
) -> tuple[Transformer, teachers.OnlineTeacher]:
    """The student, from the step folder where a run is resumed, and the teacher."""
    parallelism = config.instantiate(cfg.parallelism)
    # The teacher first: random weights of it must be the same ones in a resumed run, where the student draws none.
    teacher = build_teacher(cfg, world)
    student = distributed.build_model(
        cfg.model, cfg.checkpointer, adapter=cfg.adapter, dtype=training.dtype_from_name(cfg.dtype), weights=newest,
        device=parallelism.home(world), prepare=lambda model: distributed.parallelize(
            model, parallelism, world, compile=cfg.compile, activation_checkpointing=cfg.enable_activation_checkpointing))  # fmt: skip
    training.check_save_weights(student, cfg.save_weights)
    teachers.check_vocabularies(tokenizer, student.config.vocab_size, teacher.config.vocab_size, divergence)
    losses.check_head("student", student.output)
    return student, teachers.OnlineTeacher(teacher)


def build_teacher(cfg: Config, world: distributed.World) -> Transformer | teachers.RemoteModel:
    """The teacher: this process's part of it, or what a process of the student sees of one that is apart."""
    return teachers.build_teacher(
        cfg.teacher_model, cfg.teacher_checkpointer, world, dtype=training.dtype_from_name(cfg.teacher_dtype or cfg.dtype),
        parallelism=config.instantiate(cfg.teacher_parallelism or cfg.parallelism), compile=cfg.compile)  # fmt: skip


def kd_step(
    student: Transformer, teacher: teachers.OnlineTeacher, kd_loss: losses.KDLoss, batch: data.Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over the micro-batch's valid tokens of the loss, and its named parts."""
    signal = teacher(batch) if kd_loss.kd_ratio > 0 else None
    hidden_BSD = student(**batch.inputs, return_hidden=True)
    return kd_loss(hidden_BSD, student.output, signal, batch.targets)


def validate(
    student: Transformer,
    teacher: teachers.OnlineTeacher,
    loss: losses.KDLoss,
    held_out: list[data.Batch] | None,
    world: distributed.World,
    progress: training.Progress,
    *,
    with_teacher_loss: bool = False,
) -> dict[str, float]:
    """Held-out cross entropy and divergence in nats a token, and top-1 agreement; {} without held-out data."""
    if held_out is None:
        return {}
    teacher.expect(held_out)
    found = evaluation.evaluate_kd(
        student, teacher, loss, held_out, device=world.device, progress=progress.validating, total=world.sum
    )
    values = {f"val_{name}": value for name, value in found.items() if name != "tokens"}
    if with_teacher_loss:
        ce_loss = losses.KDLoss(kd_ratio=0.0, chunk_size=loss.chunk_size)
        found = evaluation.evaluate_ce(teacher.model, held_out, device=world.device, progress=progress.validating,
                                       loss=ce_loss, total=world.sum)  # fmt: skip
        values["val_teacher_class_loss"] = found["class_loss"]
    return values


def record_samples(
    cfg: Config, models: dict[str, Transformer], tokenizer: Any, step: int, progress: training.Progress
) -> None:
    """Appends each model's answer to each of sample_prompts to samples.jsonl."""
    training.record_samples(Path(cfg.output_dir), models, tokenizer, cfg.sample_prompts, step, progress,
                            max_new_tokens=cfg.sample_max_new_tokens)  # fmt: skip


def finish(cfg: Config, world: distributed.World) -> None:
    """Draws loss.png and prints the answers, the table of before, after and teacher, and where everything is."""
    if world.is_main:
        name = losses.divergence_name(config.instantiate(cfg.kd_loss))
        training.print_results(Path(cfg.output_dir), trained="student", best_metric=cfg.best_metric, divergence=name)


def base_folder(cfg: Config) -> str | None:
    """Folder the student came from, whose licence and generation config go with it."""
    return cfg.checkpointer["checkpoint_dir"] if cfg.checkpointer else None


if __name__ == "__main__":
    main()
