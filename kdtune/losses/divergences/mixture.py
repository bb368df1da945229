"""Divergences made of others: from an assistant between the models, a weighted sum, one by the text's writer. Notation as in `base`."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.contract import (
    Divergence,
    divergence_name,
    gradient_by_autograd,
    is_of_text,
    part_of,
    value_and_gradient,
)
from kdtune.losses.divergences.base import TargetKind, TemperedDivergence, check_range, raised, tempered


class Mixture(TemperedDivergence):
    """Any divergence, with an assistant r between the models in place of one of them (AMiD, arXiv 2510.15982).

    r is proportional to [share * p^a + (1 - share) * q^a]^(1/a) with a = (1 - alpha) / 2: the arithmetic mean for alpha -1
    (GKD, DistiLLM), the normalized geometric one, softmax(share * t + (1 - share) * s), for alpha 1 (TAID, arXiv 2501.16937).
    ``Mixture(ForwardKL(), share=a)`` is the skew KL, ``Mixture(ReverseKL(), share=1 - a, replaces="teacher")`` the skew reverse
    KL, ``Mixture(ForwardKL(), alpha=1, replaces="teacher", detach=True)`` TAID's loss.

    Args:
        divergence: any divergence; of its own temperature 1.
        share: the teacher's share of r, 0 to 1.
        alpha: -1 to 0.99, or 1.
        replaces: the model that r stands in for; the other one is itself.
        detach: no gradient through r, only for replaces="teacher".
        temperature: both models are softmax(logits / temperature) before they are mixed. 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self,
        divergence: Callable[..., Tensor],
        share: float = 0.5,
        alpha: float = -1.0,
        replaces: Literal["student", "teacher"] = "student",
        detach: bool = False,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.divergence_from: Divergence = part_of(divergence, "Mixture")
        self.share = check_range("share", share, lambda w: 0 <= w <= 1, "from 0 to 1")
        self.alpha = check_range("alpha", alpha, lambda a: -1 <= a <= 0.99 or a == 1, "from -1 to 0.99, or 1")
        self.replaces, self.detach = replaces, detach
        if getattr(self.divergence_from, "temperature", 1.0) != 1:
            raise ConfigError(
                "temperature of the mixture's divergence: must be 1; give the mixture itself the temperature"
            )
        if replaces == "student" and (detach or share == 1):
            given = "detach=true" if detach else "share=1"
            raise ConfigError(f'{given}: leaves replaces="student" without a gradient; allowed with replaces="teacher"')
        self.label = f"{divergence_name(divergence)} of a mixture ({share:g}, {alpha:g})"

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N] and slope [N, V], at temperature 1."""
        if self.replaces == "teacher" and self.detach:
            return value_and_gradient(self.divergence_from, s_NV, self.assistant(s_NV.detach(), t_NV)[0])
        if self.replaces == "teacher":  # the gradient reaches the student by both arguments
            return gradient_by_autograd(self._value, s_NV, t_NV)
        r_NV, students_part_NV = self.assistant(s_NV, t_NV)
        values_N, slope_NV = value_and_gradient(self.divergence_from, r_NV, t_NV)
        if self.alpha != -1:  # r is normalized
            slope_NV = slope_NV - r_NV.exp() * slope_NV.sum(-1, keepdim=True)
        return values_N, students_part_NV * slope_NV

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the divergence of each token, [N], in fp32 or wider, from natural log-probabilities."""
        return self._value(*tempered(self.temperature, *raised(student_logp_NV, teacher_logp_NV))) * self.factor

    def _value(self, s_NV: Tensor, t_NV: Tensor) -> Tensor:
        r_NV, _ = self.assistant(s_NV.detach() if self.detach else s_NV, t_NV)
        return self.divergence_from(*((r_NV, t_NV) if self.replaces == "student" else (s_NV, r_NV)))

    def assistant(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return log r [N, V], and the derivative of its logarithm before normalization with respect to s."""
        if self.share in (0, 1):
            return (t_NV, torch.zeros_like(s_NV)) if self.share else (s_NV, torch.ones_like(s_NV))
        if self.alpha == 1:
            mean_NV = self.share * t_NV + (1 - self.share) * s_NV
            return mean_NV.log_softmax(-1), torch.full_like(s_NV, 1 - self.share)
        a = (1 - self.alpha) / 2
        neither_NV = (s_NV == -torch.inf) & (t_NV == -torch.inf)
        of_s_NV = (a * s_NV + math.log1p(-self.share)).masked_fill(neither_NV, 0.0)
        sum_NV = torch.logaddexp(of_s_NV, (a * t_NV + math.log(self.share)).masked_fill(neither_NV, 0.0))
        students_part_NV = (of_s_NV - sum_NV).exp()
        r_NV = (sum_NV / a).masked_fill(neither_NV, -torch.inf)
        return r_NV if a == 1 else r_NV.log_softmax(-1), students_part_NV


class WeightedSum:
    """Weighted sum of divergences, such as 0.7 * forward KL + 0.3 * reverse KL.

    Args:
        divergences: any divergences, each at its own temperature.
        weights: as many numbers above 0.
    """

    def __init__(self, divergences: Sequence[Callable[..., Tensor]], weights: Sequence[float]) -> None:
        if not divergences or len(divergences) != len(weights):
            raise ConfigError(
                f"weights: {len(weights)} for {len(divergences)} divergences; allowed is one for each, and at least one"
            )
        for weight in weights:
            check_range("weights", weight, lambda number: number > 0, "numbers above 0")
        self.parts: tuple[Divergence, ...] = tuple(part_of(one, "WeightedSum") for one in divergences)
        self.weights = tuple(weights)
        self.name = " + ".join(f"{w:g} {divergence_name(one)}" for w, one in zip(weights, divergences, strict=True))

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the sum of each token, [N], in fp32 or wider, from natural log-probabilities."""
        first, *rest = (w * part(student_logp_NV, teacher_logp_NV) for w, part in self._weighted())
        return sum(rest, first)

    def value_and_gradient(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a call returns, and its partial derivatives with respect to student_logp_NV."""
        return self._sum(lambda part: value_and_gradient(part, student_logp_NV, teacher_logp_NV))

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of all parts, and their slopes, [N, V]; only of parts that are sums over ids, see `target_problem`."""
        return self._sum(lambda part: getattr(part, "terms")(s_NV, t_NV))  # noqa: B009 - a protocol's optional method

    def target_problem(self, kind: TargetKind) -> str | None:
        """Return why one of the divergences is not defined on sparse targets of a kind; None if all are."""
        return _target_problem(self.parts, kind)

    def _weighted(self) -> list[tuple[float, Divergence]]:
        return list(zip(self.weights, self.parts, strict=True))

    def _sum(self, pair_of: Callable[[Divergence], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the weighted sums of the two tensors that a function gives for each part."""
        pairs = [(w, *pair_of(part)) for w, part in self._weighted()]
        w, first, second = pairs[0]
        first, second = w * first, w * second
        for w, more, more_too in pairs[1:]:
            first, second = first + w * more, second + w * more_too
        return first, second


class BySource:
    """One divergence on text of the teacher or the data, another on text that the student has written (DistiLLM-2, arXiv 2503.07067).

    For the key `rollouts`, whose policy decides who writes, such as `kdtune.rollouts.Pairs`. The paper's pair is the skew KL and the
    skew reverse KL: what the teacher says becomes likelier, and what the student says and the teacher would not less likely.
    Validation is on the data's text.

    Args:
        teacher: any divergence of distributions over ids, for text that the student has not written.
        student: the one for its own.
    """

    def __init__(self, teacher: Callable[..., Tensor], student: Callable[..., Tensor]) -> None:
        self.parts: tuple[Divergence, ...] = tuple(part_of(one, "BySource") for one in (teacher, student))
        for one in self.parts:
            if is_of_text(one) or getattr(one, "is_cross_tokenizer", False):
                raise ConfigError(
                    f"BySource: {divergence_name(one)} compares no distributions over the same ids; allowed are divergences that do"
                )
        self.name = f"{divergence_name(teacher)} / {divergence_name(student)}"

    def for_text(self, is_own_text: bool) -> Divergence:
        """Return the divergence for text that the student has written, or for another's."""
        return self.parts[is_own_text]

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the divergence of each token, [N], of text that the student has not written."""
        return self.parts[0](student_logp_NV, teacher_logp_NV)

    def target_problem(self, kind: TargetKind) -> str | None:
        """Return why one of the two is not defined on sparse targets of a kind; None if both are."""
        return _target_problem(self.parts, kind)


def _target_problem(parts: Sequence[Divergence], kind: TargetKind) -> str | None:
    """Return the first of the divergences' own problems."""
    from kdtune.losses.sparse import target_problem

    return next((problem for part in parts if (problem := target_problem(part, kind))), None)
