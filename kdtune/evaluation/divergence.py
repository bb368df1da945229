"""Held-out cross entropy of a student, and its divergence from the teacher, per token."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from kdtune.data import Batch
from kdtune.distributed import World
from kdtune.errors import DataError
from kdtune.generation import eval_mode
from kdtune.losses import ForwardKL, KDLoss, PendingSignal, Signal, TextSignal, TopKSignal, signal_cross_entropy
from kdtune.models import Transformer
from kdtune.models.quantization import megabytes

TIMED_BATCHES = 8

# Wraps the batches to show progress, such as tqdm.
Progress = Callable[[Iterable[Batch]], Iterable[Batch]]


def evaluate_kd(
    student: Transformer,
    teacher: Callable[[Batch], Signal] | None,
    loss: KDLoss,
    batches: Iterable[Batch],
    *,
    world: World,
    progress: Progress | None = None,
    with_teacher_loss: bool = False,
) -> dict[str, float]:
    """Return `class_loss`, `kd_loss` and `forward_kl` per token, `agreement` (share of equal arg-maxes) and `tokens`.

    `kd_loss` is the loss's divergence, `forward_kl` is KL(teacher || student) at temperature 1 whatever was trained, so
    that runs with different divergences can be compared; losses are in nats. If the student's head has ids that the
    teacher's lacks, also `student_mass_outside`, its probability for them; with a term on hidden states `hidden_loss`.

    Means over the valid tokens of all batches, so they do not depend on how the tokens are cut into batches. Runs under
    no_grad in eval mode, which is undone afterwards, through the training loss, so the full logits never exist.

    Args:
        student: on the world's device.
        teacher: returns a batch's signal, such as `kdtune.teachers.OnlineTeacher`; None: only `class_loss` is measured.
        loss: the run's own loss; `kd_loss` is its divergence.
        batches: a finite pass over held-out data.
        world: the processes that share the work, each with its own batches; they are moved to its device.
        progress: wraps `batches`.
        with_teacher_loss: measure `teacher_class_loss` too, the teacher's cross entropy.

    Raises:
        DataError: if no token of the batches is valid.
    """
    # The loss itself measures it where it is what is trained.
    is_kl = type(loss.divergence) is ForwardKL and loss.divergence.temperature == 1
    is_trained = loss.kd_ratio > 0 and is_kl and loss.teacher_targets is None
    forward_kl = loss if is_trained else KDLoss(kd_ratio=1.0, chunk_size=loss.chunk_size)
    sums: defaultdict[str, float] = defaultdict(float)
    num_tokens: float = 0
    with eval_mode(student):
        for held_out in progress(batches) if progress else batches:
            num_tokens += held_out.num_valid_tokens
            batch = held_out.to(world.device)
            signal = None if teacher is None else teacher(batch)
            hidden = student(**batch.inputs, return_hidden=True, **loss.forward_options)
            if isinstance(signal, PendingSignal):
                signal = signal.result()
            inputs = (hidden, student.output, signal, batch.targets)
            _, parts = loss(*inputs)
            if batch.targets.alignment is not None:  # the teacher's ids are others: only the run's own loss is defined
                signal = None
            if signal is not None and not isinstance(signal, TextSignal):
                parts["forward_kl"] = (parts if forward_kl is loss else forward_kl(*inputs)[1])["kd_loss"]
            # A signal of K ids gives a label outside them no probability.
            if with_teacher_loss and signal is not None and not isinstance(signal, TopKSignal):
                teacher_loss = signal_cross_entropy(signal, batch.targets, loss.chunk_size)
                parts |= {} if teacher_loss is None else {"teacher_class_loss": teacher_loss}
            for name, value in parts.items():
                sums[name] += float(value)
    *totals, num_tokens = world.sum([*sums.values(), num_tokens])
    if num_tokens == 0:
        raise DataError(
            "validation: 0 valid tokens; at least one label is needed; give dataset_val examples with answers"
        )
    return {**{name: value / num_tokens for name, value in zip(sums, totals, strict=True)}, "tokens": int(num_tokens)}


def evaluate_ce(
    model: Transformer,
    batches: Iterable[Batch],
    *,
    world: World,
    progress: Progress | None = None,
    loss: KDLoss | None = None,
) -> dict[str, float]:
    """Return `class_loss` (cross entropy, nats per token), `perplexity` (its exponential) and `tokens`; see `evaluate_kd`.

    `model` is on the world's device. `loss` has the chunk size and must have kd_ratio 0. None: the default loss.
    """
    found = evaluate_kd(model, None, loss or KDLoss(kd_ratio=0.0), batches, world=world, progress=progress)
    return {
        "class_loss": found["class_loss"],
        "perplexity": perplexity(found["class_loss"]),
        "tokens": found["tokens"],
    }


def forward_cost(model: Transformer, batches: Sequence[Batch]) -> dict[str, float]:
    """Return `megabytes` of a model's weights and `tokens_per_second` of its forward passes, without the output head.

    Up to `TIMED_BATCHES` of the process's `batches` are timed, padding included, after one pass that is not.
    """
    device = model.device
    timed = [batch.to(device) for batch in batches[:TIMED_BATCHES]]
    synchronize = (lambda: torch.accelerator.synchronize(device)) if device.type != "cpu" else lambda: None
    with eval_mode(model):
        model(**timed[0].inputs, return_hidden=True)
        synchronize()
        start = time.perf_counter()
        for batch in timed:
            model(**batch.inputs, return_hidden=True)
        synchronize()
    rate = sum(batch.tokens.numel() for batch in timed) / (time.perf_counter() - start)
    return {"megabytes": megabytes(model), "tokens_per_second": rate}


def perplexity(class_loss: float) -> float:
    """Return the exponential of a cross entropy in nats per token; infinite beyond float64's range (above 709 nats)."""
    return math.exp(class_loss) if class_loss < 709.0 else math.inf
