"""Losses over plain logits, as means over the valid tokens.

Labels are already shifted (labels[b, t] is the target of position t) and IGNORE_INDEX where there is none.
Shapes: B batch, S sequence, N valid tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.losses.contract import Divergence, one_a_token, over_student_ids
from kdtune.losses.divergences.kl import ForwardKL
from kdtune.losses.targets import check_positions, check_target_ids


class CrossEntropyLoss:
    """Cross entropy of plain logits with the labels: the mean over valid tokens in nats, 0 if there are none."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean for logits [B, S, V] or [N, V] and labels of the same leading shape. The softmax is in fp32 or wider."""
        valid = _valid_tokens(labels, logits.shape, logits.shape[-1])
        return F.cross_entropy(_raised(logits[valid]), labels[valid], reduction="sum") / valid.sum().clamp(min=1)


class DivergenceLoss:
    """A divergence of plain logits: the mean over valid tokens in nats, 0 if there are none.

    The teacher is a constant: no gradient reaches its logits.

    Args:
        divergence: such as `kdtune.losses.ForwardKL()`.
    """

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence

    def __call__(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean for both logits [B, S, V] or [N, V]; their V may differ.

        The teacher's logits are cut to the student's ids before its softmax, and it gives no probability to ids that it lacks.
        """
        valid = _valid_tokens(labels, logits.shape, min(logits.shape[-1], teacher_logits.shape[-1]))
        check_positions("teacher logits", teacher_logits.shape[:-1], tuple(labels.shape))
        *_, values_N = compare_logits(self.divergence, logits[valid], teacher_logits.detach()[valid])
        return values_N.sum() / valid.sum().clamp(min=1)


class ForwardKLLoss(DivergenceLoss):
    """KL(teacher || student) of plain logits: the mean over valid tokens in nats, 0 if there are none.

    See `kdtune.losses.ForwardKL`, which is also what a config's `kd_loss` takes from it.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(ForwardKL(temperature))


def compare_logits(
    divergence: Divergence, logits_NV: Tensor, teacher_logits_NV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of student and teacher, both [N, V] with the student's V, and the divergence [N].

    logits_NV are the student's. teacher_logits_NV are cut to the student's ids before its softmax; it gives no probability
    to ids that it lacks.
    """
    vocab_size, num_shared = logits_NV.shape[-1], min(logits_NV.shape[-1], teacher_logits_NV.shape[-1])
    divergence = over_student_ids(divergence, vocab_size, num_shared)
    student_NV = _raised(logits_NV).log_softmax(-1)
    teacher_NV = _raised(teacher_logits_NV[:, :num_shared]).log_softmax(-1)
    teacher_NV = F.pad(teacher_NV, (0, vocab_size - num_shared), value=-torch.inf)
    return student_NV, teacher_NV, one_a_token(divergence(student_NV, teacher_NV), len(student_NV), divergence)


def _raised(logits: Tensor) -> Tensor:
    """Return the logits in fp32, or unchanged if they are wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _valid_tokens(labels: Tensor, shape: torch.Size, vocab_size: int) -> Tensor:
    """Return where labels are not IGNORE_INDEX (bool, labels' shape), after checking that they fit the model's output."""
    check_positions("student logits", shape[:-1], tuple(labels.shape))
    valid = labels != IGNORE_INDEX
    wrong = labels[valid & ((labels < 0) | (labels >= vocab_size))]
    if wrong.numel():
        check_target_ids((int(wrong[0]), int(wrong[0])), vocab_size)
    return valid
