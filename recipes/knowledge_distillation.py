"""Distil a teacher into a student: cross entropy on the data plus a divergence from the teacher, such as forward KL.

    kdtune run knowledge_distillation_single_device --config quickstart
    kdtune run knowledge_distillation_single_device --config llama3_2/knowledge_distillation_single_device kd_ratio=0.75
    kdtune run --nproc_per_node 4 knowledge_distillation_distributed --config llama3_2/knowledge_distillation_distributed

The loss of a token is (1 - kd_ratio) * cross entropy + kd_ratio * KL(teacher || student), in nats. A step's gradient is
the sum over its valid tokens divided by their number, counted before the first backward: it does not depend on how the
step is cut into micro-batches. The full [tokens, vocabulary] logits of either model are never in memory (kdtune/losses).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdtune import config, data, evaluation, losses, models, runs, teachers, tokenizers, training
from kdtune.distributed import World

ALIASES = ("knowledge_distillation_single_device", "knowledge_distillation_distributed")


@dataclass(kw_only=True)
class Config(teachers.TeacherConfig, training.TrainingConfig):
    """Keys of distillation, beside those of training and of a teacher (kdtune/training/config.py, kdtune/teachers/protocol.py)."""

    teacher_tokenizer: Any = config.component(default=None, returns=tokenizers.Tokenizer)
    """The teacher's, for a cross-tokenizer `kd_loss` (docs/losses.md); null: that of teacher_checkpointer's folder."""
    teacher_processes: int = config.key(0, at_least=0, may_change=True)
    """Number of torchrun's processes, the last ones, that hold only the teacher; 0: every process holds its part of both models."""
    teacher: Any = config.component(default=None, returns=teachers.Teacher)
    """A teacher in place of a model: kdtune.teachers.CachedTeacher (docs/teacher_cache.md), BaseOfStudent, or one of your own
    (docs/extending.md); null: one of the keys above."""
    kd_loss: Any = config.component(default={"_component_": "kdtune.losses.ForwardKL"})
    """The divergence between teacher and student."""
    teacher_targets: Any = config.component(default=None)
    """What the divergence sees of the teacher's distribution: kdtune.losses.TopKTargets or SampledTargets; null: all of it."""
    rollouts: Any = config.component(default=None)
    """Texts that a model writes, learned from in place of the data's answers: kdtune.rollouts.Rollouts (docs/regimes.md); null: none."""
    hidden_loss: Any = config.component(default=None)
    """A term on hidden states added to the loss: kdtune.losses.HiddenStateLoss; null: none."""
    kd_ratio: float = 0.5
    """Weight of the divergence; cross entropy has 1 - kd_ratio."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = [*super().problems(), *teachers.problems(self)]
        own_text = training.is_own_text(self)
        found += training.divergence_problems(self.kd_loss, self.teacher_targets, is_own_text=own_text)
        found += training.rollout_problems(self)
        if not 0 <= self.kd_ratio <= 1:
            found.append(f"kd_ratio={self.kd_ratio}: must lie between 0 (cross entropy only) and 1 (divergence only)")
        return found


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    with training.start(cfg) as (world, progress):
        if world.is_teacher:
            return teachers.serve(lambda: teachers.build_teacher_model(cfg, world), world, runs.InterruptFlag())
        run(cfg, world, progress)


def run(cfg: Config, world: World, progress: runs.Progress) -> None:
    """Train the student of the config: data, models, optimizer, loop, final/."""
    # Data. It comes first: no weight is read for examples that cannot be trained on.
    inputs = training.load_inputs(cfg, world, progress)
    divergence = config.instantiate(cfg.kd_loss)
    names: dict[str, str] = {"trained": "student", "divergence": losses.divergence_name(divergence)}
    if inputs.is_finished:
        return training.show_results(cfg, world, **names)

    # Models. The teacher first: its random weights must be the same in a resumed run, where the student draws none.
    progress.phase("loading the models")
    teacher = teachers.build_teacher(cfg, world)
    student = training.build_trained_model(cfg, world, inputs, "student")
    if isinstance(teacher, teachers.TeacherOfStudent):
        teacher.attach(student)
    divergence = teachers.check_vocabularies(
        inputs.tokenizer, student.config.vocab_size, teacher.vocab_size, divergence
    )

    # Loss and optimizer.
    loss_fn = training.build_kd_loss(cfg, divergence, student, teacher, world)
    optimizer, scheduler = training.build_optimizer(cfg, student, inputs.num_steps, loss_fn)
    rollouts = training.start_rollouts(cfg, inputs, student, teacher, world)

    with training.Run(inputs, world, progress, model=student, optimizer=optimizer, scheduler=scheduler, loss=loss_fn,
                      teacher=teacher, rollouts=rollouts, **names) as session:  # fmt: skip
        if session.is_new:
            session.log(validate(student, teacher, loss_fn, inputs.held_out, world, progress, with_teacher_loss=True))
            session.sample({"student": student, "teacher": teacher})

        for step in session.steps():
            if rollouts is not None:
                step.batches = rollouts.batches(step)  # maybe a model writes the step's answers
            if loss_fn.needs_teacher:
                teacher.prefetch([batch for batch in step.batches if batch.signal is None])
            for batch in step.micro_batches():
                loss, parts = kd_step(student, teacher, loss_fn, batch)
                (loss / step.num_valid_tokens).backward()
                step.add(loss, parts, batch)
            grad_norm = training.clip_grad_norm_([*student.parameters(), *loss_fn.parameters()], cfg.clip_grad_norm)
            step.check_finite(grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            # Periodic work. The session does the rest that is due after a step (samples, checkpoints, signals).
            if step.is_validated:
                with session.paused():
                    step.log(validate(student, teacher, loss_fn, inputs.held_out, world, progress))
    session.finish()


def kd_step(
    student: models.Transformer, teacher: teachers.Teacher, loss_fn: losses.KDLoss, batch: data.Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss summed over the micro-batch's valid tokens, and its named parts."""
    signal = (batch.signal or teacher(batch)) if loss_fn.needs_teacher else None
    hidden = student(**batch.inputs, return_hidden=True, **loss_fn.forward_options)
    return loss_fn(hidden, student.output, signal, batch.targets)


def validate(
    student: models.Transformer,
    teacher: teachers.Teacher,
    loss_fn: losses.KDLoss,
    held_out: list[data.Batch] | None,
    world: World,
    progress: runs.Progress,
    *,
    with_teacher_loss: bool = False,
) -> dict[str, float]:
    """Return held-out cross entropy and divergence in nats per token, and top-1 agreement; {} without held-out data."""
    if held_out is None:
        return {}
    judge = teachers.held_out_teacher(teacher)  # None: cross entropy alone
    if judge is not None:
        judge.prefetch(held_out)
    measured = loss_fn.with_kd_ratio(0.0 if judge is None else 1.0)  # whatever is trained
    found = evaluation.evaluate_kd(student, judge, measured, held_out, world=world, progress=progress.validating,
                                   with_teacher_loss=with_teacher_loss)  # fmt: skip
    return {f"val_{name}": value for name, value in found.items() if name != "tokens"}


if __name__ == "__main__":
    main()
