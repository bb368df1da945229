"""Which texts of a step each micro-batch has, and the weights of their tokens' losses.

Shapes: N targets of a micro-batch, A tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kdtune.data import Batch
from kdtune.data.micro_batches import cut_by_tokens
from kdtune.distributed import World
from kdtune.generation import eval_mode
from kdtune.losses import token_log_probs
from kdtune.losses.heads import project
from kdtune.models import Transformer
from kdtune.rollouts.policy_gradient import FloatArray
from kdtune.rollouts.record import Rollout


def parts_of(
    rollouts: Sequence[Rollout], world: World, batch_size: int, max_tokens: int | None, *, is_padded: bool
) -> list[list[int]]:
    """Return the indices of the rollouts of each of this process's micro-batches, laid out as the loader lays out examples.

    None has both the student's own text and the teacher's, whose divergences may differ.

    Args:
        rollouts: the step's.
        world: the processes that share them.
        batch_size: texts of a micro-batch.
        max_tokens: largest micro-batch in tokens, which then decides in its place; None: no limit.
        is_padded: count padding among the tokens.
    """
    rank, size = world.dp_rank, world.dp_size
    found: list[list[int]] = []
    for of_teacher in (True, False):
        indices = [index for index, one in enumerate(rollouts) if (one.source == "teacher") == of_teacher]
        if max_tokens is not None and indices:
            lengths = [len(rollouts[index].tokens) for index in indices]
            cut = cut_by_tokens(lengths, max_tokens, num_ranks=size, is_padded=is_padded)
            parts = [[indices[place] for place in part] for part in cut]
        else:
            parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
            parts += [[] for _ in range(-len(parts) % size)]
        found += parts[rank::size]
    return found


def weighted(batch: Batch, weight: float | None) -> Batch:
    """Return a batch with the losses of its tokens times a weight; None: 1."""
    if weight is None:
        return batch
    own_N = batch.targets.weights_N
    factors_N = torch.full((len(batch.targets),), weight)
    return replace(batch, targets=replace(batch.targets, weights_N=factors_N if own_N is None else own_N * factors_N))


def with_class_weights(
    batches: Sequence[Batch], parts: Sequence[Sequence[int]], weights: Sequence[FloatArray], dtype: torch.dtype
) -> list[Batch]:
    """Return the batches with weights of the tokens' cross entropy, in a dtype.

    Args:
        batches: micro-batches of this process.
        parts: the indices of the rollouts of each.
        weights: [A] of each rollout of the step.
        dtype: of the weights in the batches.
    """
    found = []
    for batch, part in zip(batches, parts, strict=True):
        own = np.concatenate([weights[index] for index in part]) if part else np.zeros(0)
        found.append(replace(batch, targets=replace(batch.targets, class_weights_N=torch.from_numpy(own).to(dtype))))
    return found


def log_ratios(
    student: Transformer,
    batches: Sequence[Batch],
    parts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    device: torch.device,
) -> dict[int, FloatArray]:
    """Return by how much log q of the tokens [A] of each of this process's rollouts has changed since they were written, by index.

    All processes of a sharded student call it, with as many batches each.

    Args:
        student: as it is now; it computes in eval mode, as it writes.
        batches: micro-batches of this process.
        parts: the indices of the rollouts of each.
        rollouts: the step's, with their log-probabilities.
        device: of the student.
    """
    found: dict[int, FloatArray] = {}
    with eval_mode(student):
        for batch, part in zip(batches, parts, strict=True):
            moved = batch.to(device)
            head = project("student", student(**moved.inputs, return_hidden=True), student.output)
            now_N = token_log_probs(head, moved.targets.positions_N, moved.targets.labels_N).double().cpu()
            for index, now in zip(part, now_N.split([rollouts[index].answer_length for index in part]), strict=True):
                found[index] = now.numpy() - rollouts[index].log_probs
    return found
