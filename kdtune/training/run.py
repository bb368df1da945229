"""A run's bookkeeping around the training step: resume, epochs, seeds, metrics, samples, checkpoints, signals.

It never calls the recipe. The recipe iterates over `Run.steps()` and makes each step itself; without `Run` its loop would train
the same weights, without any record.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from kdtune import config
from kdtune.checkpoint import CheckpointManager
from kdtune.data import Batch
from kdtune.distributed import World
from kdtune.distributed.allocator import Room
from kdtune.errors import CheckpointError
from kdtune.generation import Generator, answer
from kdtune.losses import KDLoss
from kdtune.models import Transformer, has_adapters
from kdtune.models.flops import ModelFlops
from kdtune.runs.interrupt import InterruptFlag
from kdtune.runs.metrics_file import JSONLLogger
from kdtune.runs.progress import Progress
from kdtune.runs.summary import print_results, stopped_text
from kdtune.runs.write import start_run, write_final
from kdtune.training.checks import is_due, profiler_and_logger
from kdtune.training.clip import check_finite
from kdtune.training.in_backward import is_in_backward, pop_grad_norm
from kdtune.training.loggers import StepLog
from kdtune.training.metrics import Metrics, memory_stats
from kdtune.training.resume import load_training_state, resume_extra
from kdtune.training.seed import set_step_seed
from kdtune.training.start import Inputs
from kdtune.training.steps import enter_epoch, take_micro_batches


class Step:
    """One optimizer step: its micro-batches, and the metrics that it records.

    `is_validated` says whether a validation is due after it; `number` is the number of steps made before. The recipe may replace
    `batches`, by the same number on all processes, until it asks for the first of them.

    Args:
        run: the run that yields it.
        number: number of steps made before.
        batches: this process's micro-batches, on the CPU.
        position: position of the first of them in the data, (epoch, batch).
    """

    def __init__(self, run: "Run", number: int, batches: list[Batch], position: tuple[int, int]) -> None:
        self.batches, self.position = batches, position
        self.row: dict[str, float] = {}
        self._run, self.number = run, number
        self.is_validated = is_due(number + 1, run.cfg.run_val_every_n_steps) or number + 1 == run.inputs.num_steps

    @cached_property
    def num_valid_tokens(self) -> float:
        """Labels of the whole step, over all processes, by which each gradient is divided as it is computed."""
        (total,) = self._run.world.sum([sum(batch.num_valid_tokens for batch in self.batches)])
        return total

    def writing(self, num_texts: int) -> Callable[[int], None]:
        """Show how many texts this process has written, and return what is to be told of each one, a number."""
        return self._run.progress.counting(num_texts, "texts written")

    def micro_batches(self) -> Iterator[Batch]:
        """Yield each micro-batch on the device, with torch seeded for it: dropout draws the same on any number of processes."""
        run, world = self._run, self._run.world
        _ = self.num_valid_tokens  # counted before the first backward, by all processes at the same time
        for index, batch in enumerate(run.progress.micro_batches(self.batches)):
            set_step_seed(run.cfg.seed, self.number, index * world.dp_size + world.dp_rank)
            run.room.make(batch.tokens.numel())
            yield batch.to(world.device)

    def add(self, loss: Tensor, parts: Mapping[str, Tensor], batch: Batch) -> None:
        """Record a micro-batch's loss and its parts, sums over its valid tokens, without waiting for the device."""
        self._run.metrics.add({"loss": loss, **parts}, batch, flops=self._run.flops_of(batch))

    def check_finite(self, grad_norm: Tensor) -> None:
        """Fetch the step's metrics from the device, the only wait for it in a step, and raise if loss or norm is not finite.

        Raises:
            TrainingError: loss or gradient norm is not finite; no weight has been changed by it, except with
                optimizer_in_backward.
        """
        optimizer = self._run.optimizer
        is_updated = is_in_backward(optimizer)
        self.row = self._run.metrics.pop(grad_norm=pop_grad_norm(optimizer) if is_updated else grad_norm)
        check_finite(self.row["loss"], self.row["grad_norm"], self.number + 1, self.position, is_updated=is_updated)

    def log(self, values: Mapping[str, float]) -> None:
        """Add a validation's values to the step's row of metrics.jsonl."""
        self.row |= values
        self._run.tell(values)


class Run:
    """The context of a training loop; all processes make the same calls in the same order.

    On entry the resume state is loaded and the output folder prepared; nothing is written before. For a run that is already
    finished nothing is written, and there are no steps.

    Args:
        inputs: from `load_inputs`.
        world: the processes.
        progress: display of the run's progress.
        model: the trained model, with the weights of `inputs.resume_from`.
        optimizer: optimizer of its parameters.
        scheduler: learning-rate schedule; None: a constant rate.
        loss: the loss, if it may have state (`kdtune.losses.StatefulLoss`), such as `kdtune.losses.KDLoss`.
        teacher: the teacher, if its waits are measured (`pop_seconds_waited`), such as `kdtune.teachers.CachedTeacher`.
        rollouts: `kdtune.rollouts.Rollouts`, whose state is saved; None: there are none.
        trained: name of the model in tables, such as "student".
        divergence: display name of `kd_loss`; None without a teacher.
    """

    def __init__(
        self,
        inputs: Inputs,
        world: World,
        progress: Progress,
        *,
        model: Transformer,
        optimizer: Optimizer,
        scheduler: Any = None,
        loss: KDLoss | None = None,
        teacher: Any = None,
        rollouts: Any = None,
        trained: str = "model",
        divergence: str | None = None,
    ) -> None:
        self.inputs, self.world, self.progress = inputs, world, progress
        self.cfg = cfg = inputs.cfg
        self.metrics = Metrics(world, teacher_wait=getattr(teacher, "pop_seconds_waited", None))
        self._model, self.optimizer, self._scheduler, self._loss = model, optimizer, scheduler, loss
        self._rollouts = rollouts
        self._trained, self._divergence = trained, divergence
        self._output_dir = Path(cfg.output_dir)
        base = (cfg.checkpointer or {}).get("checkpoint_dir")
        # What stands beside the weights in a model folder: licence and generation config of the base, tokenizer, chat template.
        self._beside: dict[str, Any] = {
            "base": base,
            "tokenizer": inputs.tokenizer,
            "is_chat": inputs.loader.dataset.is_chat,
        }
        self._step, self._is_stopped = inputs.num_steps if inputs.is_finished else 0, False
        self._model_flops, self._total_flops = ModelFlops.of(model), 0.0
        taught = getattr(teacher, "model", None) if loss is not None and loss.needs_teacher else None
        self._teacher_flops = ModelFlops.of(taught) if isinstance(taught, Transformer) else None
        self._resources, self.room = ExitStack(), Room(world.device)

    def __enter__(self) -> Self:
        cfg, inputs = self.cfg, self.inputs
        if inputs.is_finished:
            return self
        if inputs.resume_from is not None:
            saved = load_training_state(inputs.resume_from / "state", cfg, model=self._model, optimizer=self.optimizer,
                                        scheduler=self._scheduler, loss=self._loss, rollouts=self._rollouts)  # fmt: skip
            self._step, self._total_flops = saved["step"], saved.get("total_flops", 0.0)
            inputs.loader.seek(saved["position"])
        self._profiler, second_logger = profiler_and_logger(cfg, self.world)
        record = {**config.run_record(cfg), "batches_per_step": inputs.batches_per_step, "adapters": has_adapters(self._model),
                  **({"divergence": self._divergence} if self._divergence else {}), **inputs.fingerprints}  # fmt: skip
        start_run(
            self._output_dir, self.world, step=self._step, resolved_config=config.resolved_yaml(cfg), record=record
        )
        self._manager = CheckpointManager(self._output_dir, keep_last_n=cfg.keep_last_n_checkpoints,
                                          best_metric=cfg.best_metric, async_save=cfg.enable_async_checkpointing)  # fmt: skip
        path = self._output_dir / "metrics.jsonl" if self.world.is_main else None
        with ExitStack() as stack:  # closed again where one of them cannot be entered
            self._log = stack.enter_context(StepLog(path, second_logger, self.progress, every=cfg.log_every_n_steps,
                                                    divergence=self._divergence or "KL"))  # fmt: skip
            self._interrupt = stack.enter_context(InterruptFlag(self.progress.write))
            stack.enter_context(self._profiler or nullcontext())
            stack.enter_context(self._manager)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, traceback)

    @property
    def is_new(self) -> bool:
        """True before the first step of a run that is not resumed from a checkpoint."""
        return self._step == 0

    def log(self, values: Mapping[str, float]) -> None:
        """Record the numbers of the validation before the first step."""
        self._log.log(values, self._step)
        self.tell(values)

    def tell(self, values: Mapping[str, float]) -> None:
        """Tell the rollouts the numbers of a validation, {} if there was none."""
        if self._rollouts is not None and values:
            self._rollouts.after_validation(values)

    def sample(self, models: Mapping[str, Any]) -> None:
        """Append each model's answer to each of `sample_prompts` to samples.jsonl; one that cannot generate is left out.

        Raises:
            CheckpointError: the logits of a model are not finite; the message names it.
        """
        prompts, length = self.cfg.sample_prompts, self.cfg.sample_max_new_tokens
        able = {name: model for name, model in models.items() if isinstance(model, Transformer | Generator)}
        if not prompts:
            return
        self.progress.phase(f"answering sample_prompts ({len(prompts)})")
        with JSONLLogger(self._output_dir / "samples.jsonl" if self.world.is_main else None) as samples:
            for prompt in self.progress.counted(prompts, "prompts"):
                for name, model in able.items():
                    try:
                        pair = self.inputs.tokenizer.pair if name == "teacher" else None
                        own = pair.teacher if pair else self.inputs.tokenizer
                        text = answer(model, own, prompt, length, sync_tokens=True)
                    except CheckpointError as error:  # its weights are not numbers
                        raise CheckpointError(f"{name}: {error}") from error
                    samples.log({"model": name, "prompt": prompt, "answer": text}, self._step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as the steps': validation, samples, checkpoints. It waits for the device first."""
        if self.world.device.type != "cpu":
            torch.accelerator.synchronize(self.world.device)
        with self.metrics.paused():
            yield

    def steps(self) -> Iterator[Step]:
        """Yield the remaining steps. After each: log, sample and save what is due; on a signal, save and stop early."""
        if self.inputs.is_finished:
            return
        self.progress.start(self.inputs.num_steps, self._step)
        self.metrics.restart_clock()
        self._is_stopped = self.world.any(self._interrupt.requested)
        while self._step < self.inputs.num_steps and not self._is_stopped:
            loader = self.inputs.loader
            enter_epoch(loader, self._step // self.inputs.steps_per_epoch)
            position = loader.position
            with self.metrics.waiting_for_data():
                batches = take_micro_batches(loader, self.cfg.gradient_accumulation_steps)
            step = Step(self, self._step, batches, position)
            lr = float(self.optimizer.param_groups[0]["lr"])  # some optimizers hold a tensor, which the step changes
            yield step
            if not step.row:
                raise RuntimeError(
                    "Step.check_finite was not called before the optimizer's step: it fetches the step's numbers"
                )
            self._end(step, lr)

    def flops_of(self, batch: Batch) -> int:
        """Return the operations of a micro-batch's forward and backward, and of a teacher's forward in this process."""
        found = self._model_flops.training(batch.lengths, batch.num_valid_tokens)
        if self._teacher_flops is not None:
            # What a text's writer has computed is counted there; the head's product is the loss's.
            lengths = (batch.teacher_lengths or batch.lengths) if batch.signal is None else ()
            found += self._teacher_flops.forward(lengths, batch.num_valid_tokens)
        return found

    def _end(self, step: Step, lr: float) -> None:
        cfg, num_steps = self.cfg, self.inputs.num_steps
        self._step += 1
        row = {"epoch": step.position[0], **step.row, "lr": lr}
        if self._loss is not None and "kd_loss" in row:
            row |= self._loss.after_step(self._step, num_steps, row["kd_loss"])
        if self._rollouts is not None:
            row = self._rollouts.described(row)
        self._total_flops += row["flops"] + row.get("rollout_flops", 0.0)
        row["total_flops"] = self._total_flops
        if cfg.log_peak_memory_stats:
            row |= memory_stats(self.world.device)
        self._log.log(row, self._step)
        if is_due(self._step, cfg.sample_every_n_steps) or self._step == num_steps:
            with self.paused():
                self.sample({self._trained: self._model})
        # Read once a step: a signal that comes later than this stops the run after the next step, and is saved there.
        self._is_stopped = self.world.any(self._interrupt.requested) and self._step < num_steps
        if is_due(self._step, cfg.save_every_n_steps) or self._is_stopped:
            self.progress.phase(f"saving step_{self._step}")
            with self.paused():
                self._manager.save(self._step, model=self._model, optimizer=self.optimizer, scheduler=self._scheduler, loss=self._loss,
                                   rollouts=self._rollouts, metrics=row,
                                   extra={**resume_extra(cfg, self.inputs.loader.position), "total_flops": self._total_flops},
                                   **self._beside)  # fmt: skip
        if self._profiler:
            self._profiler.step()

    def finish(self) -> None:
        """Write final/, loss.png and the table of before and after; for an interrupted run, print how to resume it."""
        if self._is_stopped:
            text = stopped_text(self._output_dir, self._interrupt.signal_name, self._step, self.inputs.num_steps)
            return self.world.print(text)
        if not self.inputs.is_finished:
            self.progress.phase("saving final/")
            write_final(self._output_dir, self._model, self.world, save_weights=self.cfg.save_weights, **self._beside)
        show_results(self.cfg, self.world, trained=self._trained, divergence=self._divergence)


def show_results(cfg: Any, world: World, *, trained: str, divergence: str | None = None) -> None:
    """Draw loss.png of a finished run and print its answers, its table, and the paths of its files.

    `cfg` is the recipe's, `world` the processes; for `trained` and `divergence` see `Run`.
    """
    if world.is_main:
        print_results(Path(cfg.output_dir), trained=trained, best_metric=cfg.best_metric, divergence=divergence or "KL")
