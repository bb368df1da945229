"""Divergences between next-token distributions: pure functions of log-probabilities, one value per token.

Shapes: N tokens, V vocabulary. A divergence is any `f(student_logp_NV, teacher_logp_NV) -> [N]` that autograd can
differentiate with respect to its first argument: a function, or an object that holds its own settings, such as the temperature,
and is called. The losses take care of masks, vocabularies, chunks and the softmax.
A teacher whose head has fewer rows than the student's gives -inf for the ids that it lacks. A divergence that is finite there,
in value and gradient, counts the student's probability for them; any other gets only the shared ids, renormalized.
"""

import math

import torch
from torch import Tensor

from kdtune.errors import ConfigError


def forward_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Return KL(teacher || student) of every token in nats, [N]; 0 where the two agree.

    sum_v p_v (log p_v - log q_v) with p the teacher's and q the student's probabilities, at temperature 1: Hinton,
    Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2. The paper trains on
    the cross entropy -sum_v p_v log q_v; subtracting the teacher's entropy leaves the gradient as it is and makes the
    value 0 at a match.

    Arguments are natural log-probabilities, each row summing to 1, at least fp32 (half precision is raised to fp32,
    float64 stays). Ids to which the teacher gives no probability add 0, whatever the student says; a token is inf
    where the student excludes (-inf) an id to which the teacher gives some.
    """
    dtype = torch.promote_types(student_logp_NV.dtype, torch.float32)
    student_logp_NV, teacher_logp_NV = student_logp_NV.to(dtype), teacher_logp_NV.to(dtype)
    teacher_p_NV = teacher_logp_NV.exp()
    # Masked before the product: 0 * inf would be NaN, in the value and in its gradient.
    log_ratio_NV = (teacher_logp_NV - student_logp_NV).masked_fill(teacher_p_NV == 0, 0.0)
    return (teacher_p_NV * log_ratio_NV).sum(-1)


class ForwardKL:
    """KL(teacher || student) in nats per token, see `forward_kl`; the distillation loss of a config's `kd_loss`.

    Args:
        temperature: both distributions are softmax(logits / temperature). 1: unchanged. The value is not
            multiplied by temperature squared, which arXiv 1503.02531 does to keep the gradient's size.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = check_temperature(temperature)

    @property
    def name(self) -> str:
        """Display name in tables and plots."""
        return "KL" if self.temperature == 1 else f"KL (T={self.temperature:g})"

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the divergence of each token, [N]; the arguments are natural log-probabilities, fp32 or wider."""
        student_logp_NV, teacher_logp_NV = tempered(self.temperature, student_logp_NV, teacher_logp_NV)
        return forward_kl(student_logp_NV, teacher_logp_NV)


def check_temperature(temperature: float) -> float:
    """Return the temperature if it is valid.

    Raises:
        ConfigError: it is not a finite number above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            f"temperature={temperature}: must be a number above 0; 1 leaves the distributions as they are"
        )
    return temperature


def tempered(temperature: float, *logp: Tensor) -> tuple[Tensor, ...]:
    """Return the log-probabilities [N, V] at a temperature; at 1 the tensors themselves.

    A softmax ignores a shift of its logits, so log-probabilities / T give the same result as logits / T.
    """
    return logp if temperature == 1 else tuple((one / temperature).log_softmax(-1) for one in logp)
