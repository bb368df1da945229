"""Losses for a teacher with another tokenizer: of sorted probabilities, of the text's likelihood, and a hybrid.

Each is called for pairs of positions, or pieces of text, that `kdtune.losses.alignment` found to belong together, always in
the shifted form: the distribution that predicts what follows the same bytes. Notation as in `divergences.base`; W is the
teacher's vocabulary, which need not be the student's.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.contract import Divergence, covers_extra_ids, divergence_name, divergence_of, value_and_gradient
from kdtune.losses.divergences.base import TemperedDivergence, ascending, check_range, check_temperature, times
from kdtune.losses.divergences.kl import ForwardKL
from kdtune.losses.sparse import log1mexp


class ULD(TemperedDivergence):
    """Universal logit distillation: sum_i |p_(i) - q_(i)| over probabilities sorted in descending order (arXiv 2402.12030).

    The smaller vocabulary is filled up with zeros. At most 2; 0 where the sorted probabilities agree, whichever ids have them:
    nothing says which token should be likely, so that it needs the cross entropy beside it (kd_ratio below 1). The paper adds
    it to the cross entropy with the weight 1.5, which is kd_ratio 0.6. Its code, and TRL's default, leave out the end of
    the answer, or read the distribution one position late.

    Args:
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    label = "ULD"
    is_cross_tokenizer = True

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N] and slope [N, V], at temperature 1; teacher [N, W]."""
        values_N, slope_NV = sorted_distance(s_NV.exp(), t_NV.exp())
        return values_N, slope_NV * s_NV.detach().exp()


def sorted_distance(q_NV: Tensor, p_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_i |q_(i) - p_(i)| over descending order, [N], and its partial derivatives with respect to q, [N, V].

    The shorter row is filled up with zeros. The values must not be negative.
    """
    order_NV, sorted_p_NW = ascending(q_NV.detach())[1], ascending(p_NW)[0]
    # Ascending: the zeros come first.
    width = max(q_NV.shape[1], p_NW.shape[1])
    sorted_q, sorted_p = (F.pad(one, (width - one.shape[1], 0)) for one in (q_NV.gather(1, order_NV), sorted_p_NW))
    gap = sorted_q - sorted_p
    signs_NV = gap.detach()[:, width - q_NV.shape[1] :].sign()
    return gap.abs().sum(-1), torch.zeros_like(signs_NV).scatter_(1, order_NV, signs_NV)


class HybridULD:
    """A divergence over the tokens that both vocabularies have, by bytes, and ULD over the others: after GOLD (TRL), corrected.

    With the shared ids and one more for all others together, both distributions sum to 1 and the exact divergence has its usual
    meaning: 0 only for equal ones, never negative, at most the one of the full distributions. GOLD, like NeMo-RL's copy, sums
    the shared ids' terms as they are, which can be negative; KDFlow renormalizes over them, which leaves the mass outside free. The
    probabilities of the others are compared by `sorted_distance`, times rest_weight. Tokens are shared if their bytes are
    equal, not their strings ("Ġthe" and "▁the" are the same token), and so are the tokens that end an answer.

    Where a template's blank makes the next tokens of the models begin at different bytes, ids do not mean the same continuation,
    and ULD over all of them takes the divergence's place. With the same tokenizer, this is the exact divergence itself.

    Args:
        exact: any divergence, such as `kdtune.losses.ReverseKL()`; None: forward KL.
        rest_weight: factor of the distance between the probabilities of tokens that only one model has.
    """

    is_cross_tokenizer = True

    def __init__(self, exact: Callable[..., Tensor] | None = None, rest_weight: float = 1.0) -> None:
        self.exact: Divergence = ForwardKL() if exact is None else divergence_of(exact)
        self.rest_weight = check_range("rest_weight", rest_weight, lambda w: w >= 0, "0 or above")
        if getattr(self.exact, "temperature", 1.0) != 1:
            raise ConfigError(
                "temperature of HybridULD's divergence: must be 1; the others' probabilities are compared at 1"
            )
        self.shared: _SharedIds | None = None

    @property
    def name(self) -> str:
        """Display name in tables and plots."""
        return f"{divergence_name(self.exact)} + ULD"

    def over(self, student_ids: Sequence[int], teacher_ids: Sequence[int], sizes: tuple[int, int]) -> "HybridULD":
        """Return the loss for two vocabularies.

        Args:
            student_ids: ids of the tokens that both have.
            teacher_ids: the teacher's ids of the same tokens.
            sizes: numbers of rows of the two heads; ids beyond the tokenizers' belong to the others.

        Raises:
            ConfigError: no token is shared; or all of one vocabulary is, and the divergence would be infinite for the rest.
        """
        if not student_ids:
            raise ConfigError("kd_loss: the two vocabularies share no token, by bytes; take kdtune.losses.ULD")
        student_is_part, teacher_is_part = (size == len(student_ids) for size in sizes)
        if student_is_part != teacher_is_part and not covers_extra_ids(self.exact, of_teacher=student_is_part):
            whose, other = ("student", "teacher") if student_is_part else ("teacher", "student")
            raise ConfigError(
                f"kd_loss: the {whose}'s vocabulary is part of the {other}'s, and {divergence_name(self.exact)} is infinite for the "
                "rest; take exact=kdtune.losses.JensenShannon, or kdtune.losses.ULD"
            )
        bound = copy.copy(self)
        bound.shared = _SharedIds(student_ids, teacher_ids, sizes)
        return bound

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the loss of each pair of positions, [N], in fp32 or wider."""
        if self.shared is None:
            return self.exact(student_logp_NV, teacher_logp_NV)
        (s, s_rest), (t, t_rest) = self.shared.split(student_logp_NV, teacher_logp_NV)
        rest_N, _ = sorted_distance(s_rest.exp(), t_rest.exp())
        return self.exact(_with_rest(s, s_rest), _with_rest(t, t_rest)) + self.rest_weight * rest_N

    @torch.no_grad()
    def value_and_gradient(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values [N] and their partial derivatives [N, V] with respect to student_logp_NV."""
        if self.shared is None:
            return value_and_gradient(self.exact, student_logp_NV, teacher_logp_NV)
        (s, s_rest), (t, t_rest) = self.shared.split(student_logp_NV, teacher_logp_NV)
        values_N, slope = value_and_gradient(self.exact, _with_rest(s, s_rest), _with_rest(t, t_rest))
        rest_N, rest_slope = sorted_distance(s_rest.exp(), t_rest.exp())
        tail = s_rest.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)
        rest_slope = (s_rest - tail).exp() * slope[:, -1:] + self.rest_weight * rest_slope * s_rest.exp()
        return values_N + self.rest_weight * rest_N, self.shared.join(slope[:, :-1], rest_slope)

    def target_problem(self, kind: Any) -> str | None:
        """Return why the loss is not defined on sparse targets: it needs every probability."""
        return "a cross-tokenizer loss needs every probability of the teacher"


class _SharedIds:
    """Ids of the same tokens in two vocabularies, and the others of each; kept on every device that they are used on."""

    def __init__(self, student_ids: Sequence[int], teacher_ids: Sequence[int], sizes: tuple[int, int]) -> None:
        self._ids: dict[torch.device, tuple[Tensor, ...]] = {}
        shared = [torch.tensor(list(ids)) for ids in (student_ids, teacher_ids)]
        others = []
        for ids, size in zip(shared, sizes, strict=True):
            is_other = torch.ones(size, dtype=torch.bool)
            is_other[ids] = False
            others.append(is_other.nonzero().squeeze(1))
        self._ids[torch.device("cpu")] = (shared[0], others[0], shared[1], others[1])

    def split(self, s_NV: Tensor, t_NW: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the columns of the shared ids and of the others, for both models."""
        ids = self._on(s_NV.device)
        s_shared, s_other, t_shared, t_other = (
            one.index_select(1, some) for one, some in zip((s_NV, s_NV, t_NW, t_NW), ids, strict=True)
        )
        return (s_shared, s_other), (t_shared, t_other)

    def join(self, shared: Tensor, others: Tensor) -> Tensor:
        """Put columns of the student's shared and other ids back into the order of its vocabulary."""
        shared_ids, other_ids, _, _ = self._on(shared.device)
        joined = shared.new_zeros(len(shared), len(shared_ids) + len(other_ids))
        return joined.index_copy_(1, shared_ids, shared).index_copy_(1, other_ids, others)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._ids:
            self._ids[device] = tuple(one.to(device) for one in self._ids[torch.device("cpu")])
        return self._ids[device]


def _with_rest(shared: Tensor, others: Tensor) -> Tensor:
    """Return log-probabilities of the shared ids and of all others together."""
    return torch.cat([shared, others.logsumexp(-1, keepdim=True)], dim=1)


class ALM:
    """Approximate likelihood matching: both models give every piece of the text the same probability (arXiv 2503.20083).

    A chunk is the text between two neighbouring places where both tokenizations have a boundary. With s and t the sums of the two
    models' log-probabilities of its tokens and x = exp(s / T), y = exp(t / T): y log(y / x) + (1 - y) log((1 - y) / (1 - x)), the
    KL between two coins. It needs no vocabulary in common, and only the probabilities of the text itself. For large T it is
    about 1 / T of t' log(t' / s') - t' + s' with s' = -s and t' = -t: with kd_ratio between 0 and 1, set scale_by_temperature or
    the cross entropy outweighs it. tokenkit clamps probabilities at 1e-6 on both sides; here only rounding does.

    A token "_Wor" also says that the text does not go on with "ld", which would have been another token; the bytes of "_Wor" do
    not. With a `debias_threshold`, the paper's outcome chunk debiasing (its section 3.1), a chunk's probability is therefore
    multiplied by that of a next token that begins with a blank, a tab or a line feed or is a special one, which is p(the text, and
    a word ends here) for both. Chunks are joined up to where the teacher gives such a token more than the threshold, as in the
    authors' code; an end that is a special token needs neither. What follows the last such place of a text is left out.

    Args:
        temperature: T.
        scale_by_temperature: multiply by T.
        debias_threshold: from 0 to below 1, the paper's gamma: 0.1. None: no debiasing, which needs the text's probabilities alone.
    """

    is_cross_tokenizer = True
    of_text = True
    """It compares the likelihoods of pieces of text, not distributions over ids."""

    def __init__(
        self,
        temperature: float = 100.0,
        scale_by_temperature: bool = False,
        debias_threshold: float | None = None,
    ) -> None:
        self.temperature = check_temperature(temperature)
        self.scale_by_temperature = scale_by_temperature
        if debias_threshold is not None:
            check_range("debias_threshold", debias_threshold, lambda p: 0 <= p < 1, "from 0 to below 1, or null")
        self.debias_threshold = debias_threshold
        name = "ALM" if debias_threshold is None else "debiased ALM"
        self.name = name if temperature == 100 else f"{name} (T={temperature:g})"
        self._starts: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def with_word_starts(
        self, student_ids: Sequence[int], teacher_ids: Sequence[int], special_ids: Sequence[int]
    ) -> "ALM":
        """Return the loss for two vocabularies, for debiasing.

        Args:
            student_ids: ids of the student's tokens that a word cannot go on with, special ones among them.
            teacher_ids: the same of the teacher.
            special_ids: ids of the student's special tokens, which no text continues.
        """
        bound = copy.copy(self)
        ours, theirs, special = (
            torch.tensor(sorted(set(ids)), dtype=torch.int64) for ids in (student_ids, teacher_ids, special_ids)
        )
        bound._starts = {torch.device("cpu"): (ours, theirs, special)}
        return bound

    def word_starts(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `with_word_starts` was given, on a device.

        Raises:
            ConfigError: it was not called.
        """
        if not self._starts:
            raise ConfigError(
                "kd_loss: ALM with debias_threshold does not know which tokens begin a word; call with_word_starts, as a run does"
            )
        if device not in self._starts:
            ours, theirs, special = self._starts[torch.device("cpu")]
            self._starts[device] = (ours.to(device), theirs.to(device), special.to(device))
        return self._starts[device]

    def __call__(self, student_logp_K: Tensor, teacher_logp_K: Tensor) -> Tensor:
        """Return the loss of each chunk, [K], from its log-likelihoods by student and teacher."""
        s_K, t_K = (one / self.temperature for one in (student_logp_K, teacher_logp_K))
        values_K = times(t_K.exp(), t_K - s_K) - t_K.expm1() * (log1mexp(t_K) - log1mexp(s_K))
        return values_K * self.temperature if self.scale_by_temperature else values_K

    def target_problem(self, kind: Any) -> str | None:
        """Return why the loss is not defined on sparse targets: it needs the probability of the text."""
        return "a cross-tokenizer loss needs every probability of the teacher"


def debiased(
    alm: ALM,
    logp_K: tuple[Tensor, Tensor],
    starts_K: tuple[Tensor, Tensor],
    meets_next_K: Tensor,
    ends_special_K: Tensor,
) -> Tensor:
    """Return the sum of ALM over chunks that are joined and debiased; without waiting for an accelerator.

    Args:
        alm: the loss, with a `debias_threshold`.
        logp_K: log-likelihoods of the chunks, in the order of the text, by student and teacher.
        starts_K: at the first position of each chunk, the log-probability that a word begins there, by both.
        meets_next_K: bool, whether the next chunk begins where this one ends.
        ends_special_K: bool, whether the chunk ends with a special token.
    """
    after_K = tuple(torch.cat([one[1:], one.new_zeros(min(1, len(one)))]) for one in starts_K)
    likely_K = after_K[1].exp() > cast(float, alm.debias_threshold)
    is_debiased_K = meets_next_K & likely_K & ~ends_special_K
    is_end_K = is_debiased_K | ends_special_K
    # Chunks of the same group are joined; a group without an end is left out.
    closes_K = is_end_K | ~meets_next_K
    group_K = closes_K.cumsum(0) - closes_K.long()
    is_whole_G = torch.zeros_like(group_K).index_add(0, group_K, is_end_K.long()) > 0
    joined_G = []
    for text_K, word_end_K in zip(logp_K, after_K, strict=True):
        text_K = text_K + torch.where(is_debiased_K, word_end_K, 0.0)
        sum_G = torch.zeros_like(text_K).index_add(0, group_K, text_K)
        joined_G.append(torch.where(is_whole_G, sum_G, -1.0))
    return torch.where(is_whole_G, alm(*joined_G), 0.0).sum()


def cross_value_and_gradient(
    divergence: Divergence, s_RV: Tensor, t_RW: Tensor, is_exact_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `value_and_gradient` of a cross-tokenizer loss; of ULD where the tokens are not the same bytes (None: all are)."""
    values_R, slope_RV = value_and_gradient(divergence, s_RV, t_RW)
    if is_exact_R is None or isinstance(divergence, ULD):
        return values_R, slope_RV
    other_R, other_RV = value_and_gradient(ULD(), s_RV, t_RW)
    return torch.where(is_exact_R, values_R, other_R), torch.where(is_exact_R[:, None], slope_RV, other_RV)
