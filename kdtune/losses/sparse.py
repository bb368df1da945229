"""Sparse teachers: the ids that the teacher's distribution is known for, and divergences computed from them.

Shapes: R tokens, K ids of each, V ids of the student.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.contract import Divergence, OnSharedIds, covers_extra_ids, divergence_name, value_and_gradient
from kdtune.losses.divergences.base import TargetKind

Outside: TypeAlias = Literal["tail", "renormalize", "ignore"]
"""What becomes of the ids that are not among the teacher's k, see `TopKTargets`."""
KIND_OF: dict[str, TargetKind] = {"tail": "tail", "renormalize": "renormalized", "ignore": "ignored"}


@dataclass(frozen=True)
class TopKRows:
    """The teacher's distribution with all ids but K merged into one, the tail; or over the K ids alone, and the student's too."""

    ids_RK: Tensor  # int64, distinct
    logp_RK: Tensor  # natural log-probabilities; without a tail any shift of them
    tail_R: Tensor | None  # log-probability of all other ids together; None: they are ignored

    def __getitem__(self, rows: slice) -> "TopKRows":
        return TopKRows(self.ids_RK[rows], self.logp_RK[rows], None if self.tail_R is None else self.tail_R[rows])

    def to(self, dtype: torch.dtype) -> "TopKRows":
        """Return the rows with log-probabilities in a dtype."""
        return TopKRows(self.ids_RK, self.logp_RK.to(dtype), None if self.tail_R is None else self.tail_R.to(dtype))

    def most_likely(self) -> Tensor:
        """Return the most likely id of each token, [R]."""
        return self.ids_RK.gather(1, self.logp_RK.argmax(1, keepdim=True)).squeeze(1)


@dataclass(frozen=True)
class SampledRows:
    """Ids drawn from the teacher, for sums over all ids: the sum of f_v is estimated by that of weight_k f_k, without bias.

    A weight is 1 / (number of draws * probability of drawing this id). Ids may repeat.
    """

    ids_RK: Tensor  # int64
    logp_RK: Tensor  # the teacher's natural log-probabilities
    weights_RK: Tensor

    def __getitem__(self, rows: slice) -> "SampledRows":
        return SampledRows(self.ids_RK[rows], self.logp_RK[rows], self.weights_RK[rows])

    def to(self, dtype: torch.dtype) -> "SampledRows":
        """Return the rows with log-probabilities and weights in a dtype."""
        return SampledRows(self.ids_RK, self.logp_RK.to(dtype), self.weights_RK.to(dtype))


SparseRows = TopKRows | SampledRows


class TeacherTargets(Protocol):
    """What the loss keeps of a teacher's whole distribution."""

    kind: TargetKind
    """Kind of the rows, by which divergences are allowed or refused."""

    def of(self, teacher_logp_RV: Tensor) -> Tensor | SparseRows:
        """Return the rows that the loss sees."""


class TopKTargets:
    """The teacher's k most likely ids of every token, for `teacher_targets`: what a cache of them would train.

    With the tail as one more id, the divergence is that of the two distributions after all other ids are merged: it is
    never negative, and at most the full one, for divergences that are f-divergences; others are refused. Renormalized, the k ids
    share all of the teacher's probability, and the student's distribution stays whole: it is taught to give the others none.
    Ignored, both distributions are those over the k ids alone, renormalized (NeMo-RL, Megatron; for reverse KL on the student's
    own text arXiv 2603.25562): defined for every divergence, and nothing holds down what the student gives to other ids.
    Other tools sum the k terms of the full formula (verl, EasyDistill), which is negative where the student has more
    probability there than the teacher.

    Args:
        k: number of ids.
        outside: "tail": one bucket for all other ids; "renormalize": no probability for them; "ignore": as if there were none.
    """

    def __init__(self, k: int, outside: Outside = "tail") -> None:
        if k < 1:
            raise ConfigError(f"k={k}: must be 1 or more")
        if outside not in KIND_OF:
            raise ConfigError(f"outside={outside}: must be {', '.join(KIND_OF)}")
        self.k, self.outside = k, outside
        self.kind: TargetKind = KIND_OF[outside]

    def of(self, teacher_logp_RV: Tensor) -> Tensor | SparseRows:
        """Return the k ids with their tail, or dense rows with -inf for all others."""
        logp_RK, ids_RK = teacher_logp_RV.topk(min(self.k, teacher_logp_RV.shape[1]), dim=1, sorted=False)
        if self.outside == "renormalize":
            # Not full_like: compiled by torch 2.13, some readers of the result get its constant at the k ids too.
            return teacher_logp_RV.clamp(max=-torch.inf).scatter(1, ids_RK, logp_RK.log_softmax(-1))
        return TopKRows(ids_RK, logp_RK, rest(teacher_logp_RV, ids_RK) if self.outside == "tail" else None)


class SampledTargets:
    """Ids drawn from the teacher with importance weights, for `teacher_targets` (arXiv 2503.16870, "sparse logit sampling").

    Value and gradient are unbiased estimates of the full divergence's, for every divergence that is a sum over ids; others
    are refused. The paper's case is the forward KL with exponent 1. The reverse KL's terms can be large for ids that the
    teacher hardly ever draws, so its estimate is noisy.

    Args:
        num_samples: draws of each token, with replacement.
        exponent: draw in proportion to p^exponent, above 0 to 1; below 1 unlikely ids are drawn more often.
    """

    kind: TargetKind = "sampled"

    def __init__(self, num_samples: int, exponent: float = 1.0) -> None:
        if num_samples < 1:
            raise ConfigError(f"num_samples={num_samples}: must be 1 or more")
        if not 0 < exponent <= 1:
            raise ConfigError(f"exponent={exponent}: must be above 0 and at most 1")
        self.num_samples, self.exponent = num_samples, exponent

    def of(self, teacher_logp_RV: Tensor) -> Tensor | SparseRows:
        """Draw ids by torch's default generator; repeated ids stay apart."""
        logr_RV = teacher_logp_RV if self.exponent == 1 else (self.exponent * teacher_logp_RV).log_softmax(-1)
        if len(teacher_logp_RV) == 0:  # multinomial refuses it
            ids_RK = logr_RV.new_zeros((0, self.num_samples), dtype=torch.int64)
        elif (
            self.num_samples == 1
        ):  # torch's multinomial of one sample asks a GPU whether the rows are valid, and waits
            r_RV = logr_RV.exp()
            ids_RK = (r_RV / torch.empty_like(r_RV).exponential_()).argmax(1, keepdim=True)
        else:
            ids_RK = logr_RV.exp().multinomial(self.num_samples, replacement=True)
        weights_RK = (-logr_RV.gather(1, ids_RK)).exp() / self.num_samples
        return SampledRows(ids_RK, teacher_logp_RV.gather(1, ids_RK), weights_RK)


_DEFINED: dict[TargetKind, str] = {
    "tail": 'f-divergences at temperature 1 (ForwardKL, ReverseKL, JensenShannon, ...), or outside="renormalize"',
    "sampled": "sums over ids at temperature 1 (ForwardKL, ReverseKL, JensenShannon, ...)",
    "renormalized": 'those that are finite where the teacher gives no probability (ForwardKL, JensenShannon, ...), or outside="tail"',
    "ignored": "all that compare distributions over ids",
}


def target_problem(divergence: Divergence, kind: TargetKind) -> str | None:
    """Return why a divergence is not defined on targets of a kind; None if it is."""
    if kind in ("renormalized", "ignored") and not getattr(divergence, "of_text", False):
        is_finite = kind == "ignored" or covers_extra_ids(divergence)
        return None if is_finite else "it is infinite where the student alone gives an id probability"
    own = getattr(divergence, "target_problem", None)
    return own(kind) if own else "it does not say that it is defined there (`target_problem`)"


def check_targets(divergence: Divergence, targets: TeacherTargets | None) -> None:
    """Check that a divergence is defined on the targets.

    Raises:
        ConfigError: it is not; the message says why and what is.
    """
    if targets is not None and (problem := target_problem(divergence, targets.kind)):
        raise ConfigError(
            f"teacher_targets: {type(targets).__name__} cannot serve {divergence_name(divergence)}: {problem}; allowed are "
            f"{_DEFINED[targets.kind]}"
        )


def misses_extra_ids(divergence: Divergence) -> bool:
    """Return whether ids to which the teacher gives no probability add to a sum over ids: no draw reaches them."""
    if target_problem(divergence, "sampled"):
        return False
    terms, slopes = getattr(divergence, "terms")(torch.zeros(1, 1), torch.full((1, 1), -torch.inf))  # noqa: B009
    return bool((terms != 0).any() or (slopes != 0).any())


def sparse_value_and_gradient(divergence: Divergence, s_RV: Tensor, rows: SparseRows) -> tuple[Tensor, Tensor]:
    """Return the divergence [R] from sparse rows, and its partial derivatives [R, V] with respect to s_RV."""
    if (own := getattr(rows, "value_and_gradient", None)) is not None:  # rows of a teacher with another vocabulary
        return own(divergence, s_RV)
    if isinstance(divergence, OnSharedIds):
        return divergence.restricted(s_RV, lambda s: sparse_value_and_gradient(divergence.__wrapped__, s, rows))
    kind: TargetKind = "sampled" if isinstance(rows, SampledRows) else "ignored" if rows.tail_R is None else "tail"
    if problem := target_problem(divergence, kind):  # of a teacher of one's own: nobody could ask before it answered
        raise ConfigError(
            f"the teacher's {type(rows).__name__} cannot serve {divergence_name(divergence)}: {problem}; allowed are {_DEFINED[kind]}"
        )
    s_RK = s_RV.gather(1, rows.ids_RK)
    if isinstance(rows, SampledRows):
        terms_RK, slopes_RK = getattr(divergence, "terms")(s_RK, rows.logp_RK)  # noqa: B009 - see target_problem
        slopes_RV = torch.zeros_like(s_RV).scatter_add_(1, rows.ids_RK, rows.weights_RK * slopes_RK)
        return (rows.weights_RK * terms_RK).sum(-1), slopes_RV
    if rows.tail_R is None:
        # An id that the teacher excludes has no place among the k.
        s_RK = s_RK.masked_fill(rows.logp_RK == -torch.inf, -torch.inf).log_softmax(-1)
        values_R, slopes = value_and_gradient(divergence, s_RK, rows.logp_RK.log_softmax(-1))
        slopes = slopes - s_RK.exp() * slopes.sum(-1, keepdim=True)
        return values_R, torch.zeros_like(s_RV).scatter_(1, rows.ids_RK, slopes)
    student_tail_R = rest(s_RV, rows.ids_RK)
    coarse = [
        torch.cat([one, tail[:, None]], dim=1) for one, tail in ((s_RK, student_tail_R), (rows.logp_RK, rows.tail_R))
    ]
    values_R, slopes = value_and_gradient(divergence, *coarse)
    # The tail's logarithm depends on the ids outside, each by its share of their probability.
    shares_RV = (s_RV - student_tail_R[:, None].clamp(min=torch.finfo(s_RV.dtype).min)).exp()
    slopes_RV = shares_RV.mul_(slopes[:, -1:]).scatter_(1, rows.ids_RK, slopes[:, :-1])
    return values_R, slopes_RV


def rest(logp_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """Return the log-probability [R] of all ids but some; -inf if none is left."""
    return logp_RV.scatter(1, ids_RK, -torch.inf).logsumexp(-1)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, exact to rounding; x from -eps up counts as -eps, for a mass that rounding made 1.

    Below log 1/2 by log1p, above it by expm1 (Mächler, "Accurately computing log(1 - exp(-|a|))", 2012).
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    small = x < -0.6931472
    return torch.where(small, (-x.masked_fill(~small, -1.0).exp()).log1p(), (-x.masked_fill(small, -0.5).expm1()).log())
