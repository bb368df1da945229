"""Reverse KL by the text that the student has sampled: of the teacher it needs the log-probabilities of that text alone.

Shapes: N labelled positions.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.divergences.base import raised
from kdtune.losses.heads import Projection, project
from kdtune.losses.signal import HiddenSignal, Signal
from kdtune.losses.targets import Targets, check_positions, check_target_ids
from kdtune.losses.token_log_probs import signal_token_log_probs, token_log_probs

if TYPE_CHECKING:
    from kdtune.losses.kd_loss import KDLoss


class SampledReverseKL:
    """Reverse KL, KL(student || teacher), estimated from text that the student itself has sampled, at temperature 1.

    With d = log q(y) - log p(y) of a token y of the text, q the student's probability and p the teacher's, a token's gradient is
    d * grad log q(y). Its mean over draws of y from q is the gradient of `kdtune.losses.ReverseKL` at this position. That one has no
    noise of draws: take it where the teacher gives all probabilities. This one is for a teacher that gives no more than those of the
    text: a server, or a cache of kind path. In neither, a token is charged with what comes after it.

    Estimators of the value (arXiv 2506.09477), all with that one gradient:

    - "k2": d^2 / 2, of which d * grad log q is the derivative; never negative, and not the KL: half its square, if d is constant.
    - "k1": d, whose mean over draws is the KL; a token's may be negative. The gradient is of d as a reward: differentiated itself, k1
      would be grad log q(y), which has the mean 0 and no teacher in it.

    "k3", exp(-d) - 1 + d, is refused. It is an unbiased value too, but the mean of its derivative is the gradient of the forward KL.

    On text that the student has not sampled, such as a data set's, the gradient is that of the mean of d^2 / 2 there: the student learns to
    give this text the teacher's probabilities. That is no KL, and it says nothing of tokens that the text lacks.

    Args:
        estimator: of the value that is reported, "k2" or "k1".
        off_policy: allow a data set's text, for that other loss; otherwise it is refused.

    Raises:
        ConfigError: another estimator.
    """

    of_text = True
    """It compares the likelihoods of tokens, not distributions over ids."""

    def __init__(self, estimator: str = "k2", off_policy: bool = False) -> None:
        if estimator not in ("k2", "k1"):
            reason = (
                ": differentiated, its mean is the gradient of the forward KL, not of the reverse"
                if estimator == "k3"
                else ""
            )
            raise ConfigError(f"estimator={estimator}: must be k2 or k1{reason}")
        self.estimator, self.off_policy = estimator, off_policy
        self.name = f"sampled reverse KL ({estimator}{', off policy' if off_policy else ''})"

    def __call__(self, student_logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
        """Return the estimate of each token, [N], in fp32 or wider, from the text's log-probabilities by student and teacher."""
        s_N, t_N = raised(student_logp_N, teacher_logp_N.detach())
        d_N = s_N - t_N
        if self.estimator == "k2":
            return d_N.square() / 2
        reward_N = d_N.detach()
        return reward_N + reward_N * (s_N - s_N.detach())

    def target_problem(self, kind: Any) -> str | None:
        """Return why the loss is not defined on sparse targets: it needs the probability of the text."""
        return "it needs the probability of the text's own tokens"

    def text_problem(self) -> str | None:
        """Return why the loss is refused for text that the student has not sampled; None if it is allowed there."""
        if self.off_policy:
            return None
        return (
            "SampledReverseKL is the reverse KL on text that the student has sampled, and a data set's text is not; give "
            "kdtune.losses.ReverseKL, which needs no samples, or kd_loss.off_policy=true: the mean of (log q - log p)^2 / 2 on this text"
        )


def text_loss(
    loss: "KDLoss", student: Projection, signal: Signal | None, targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `KDLoss` does, for a divergence of the text's likelihoods: with "class_loss" and "kd_loss" among the parts.

    Args:
        loss: the loss; its kd_ratio is above 0.
        student: its hidden states and head.
        signal: the teacher's; of any kind that knows the probabilities of the text.
        targets: the batch's.

    Raises:
        ConfigError: the teacher is missing or does not know them, or a head is cut by the vocabulary.
        DataError: a label is not an id of both vocabularies.
        TrainingError: the signal is not of the targets' positions.
    """
    if signal is None:
        raise ConfigError(f"a teacher is missing: kd_ratio is {loss.kd_ratio}; without a teacher it must be 0")
    if loss.logits_dtype is not None:
        raise ConfigError("loss_logits_dtype: a loss of the text's likelihood has its logits in fp32; set null")
    check_target_ids(targets.id_range, min(student.vocab_size, signal.vocab_size))
    check_positions("the teacher's log-probabilities", signal.shape, targets.shape)
    teacher: Projection | Signal = signal
    if isinstance(signal, HiddenSignal):
        with torch.no_grad():
            teacher = project("teacher", signal.hidden_BSD, signal.output)
    if student.shards or (isinstance(teacher, Projection) and teacher.shards):
        raise ConfigError("a loss of the text's likelihood needs the whole heads of both models; set tp=1")
    student_N = token_log_probs(student, targets.positions_N, targets.labels_N, loss.chunk_size)
    teacher_N = signal_token_log_probs(teacher, targets.positions_N, targets.labels_N, loss.chunk_size)
    ce_N, kd_N = -student_N, loss.divergence(student_N, teacher_N.to(student_N.dtype))
    if targets.class_weights_N is not None:
        ce_N = ce_N * targets.class_weights_N.to(ce_N.dtype)
    if targets.weights_N is not None:
        ce_N, kd_N = (one * targets.weights_N.to(one.dtype) for one in (ce_N, kd_N))
    ce, kd = ce_N.sum(), kd_N.sum()
    # A part with weight 0 is left out, not multiplied by 0: it may be infinite.
    total = loss.kd_ratio * kd if loss.kd_ratio == 1 else (1 - loss.kd_ratio) * ce + loss.kd_ratio * kd
    parts = {"class_loss": ce.detach(), "kd_loss": kd.detach()}
    if targets.watched_M is not None:
        from kdtune.losses.watched import watched_parts

        parts |= watched_parts(student, teacher, targets, (student_N - teacher_N).sum().detach())
    return total, parts
