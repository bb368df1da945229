"""Losses by the name of the paper or tool that they come from, for the `kd_loss` node: `kd_loss: kdtune.losses.presets.gkd`.

Each is a divergence with the published defaults. A paper's method is usually more than its loss; each says what is left out.
`kd_ratio` is its own key: the divergence's weight beside cross entropy.
"""

from typing import Literal

from kdtune.losses.cross_tokenizer import ALM, ULD
from kdtune.losses.divergences.adaptive_kl import AdaptiveKL
from kdtune.losses.divergences.arg_max import ArgMaxCrossEntropy
from kdtune.losses.divergences.concrete_score import ConcreteScore
from kdtune.losses.divergences.jensen_shannon import JensenShannon
from kdtune.losses.divergences.kl import ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL
from kdtune.losses.divergences.mixture import BySource


def torchtune() -> ForwardKL:
    """Forward KL, torchtune's loss for knowledge distillation with kd_ratio 0.5, the default here too.

    torchtune leaves out the teacher's entropy: the same gradient, another value. Not repeated: its gradient is divided by the
    number of tokens twice.
    """
    return ForwardKL()


def gkd(beta: float = 0.5) -> JensenShannon:
    """Generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649), with the usual kd_ratio of 1.

    Not in a loss: the share of texts that the student writes itself (`kdtune.rollouts.Share`, docs/regimes.md).

    Args:
        beta: the teacher's share of the mixture, between 0 and 1; near the ends see `kdtune.losses.JensenShannon`.
    """
    return JensenShannon(beta)


def distillm(direction: Literal["forward", "reverse"] = "reverse", alpha: float = 0.1) -> SkewForwardKL | SkewReverseKL:
    """Skew KL of DistiLLM (arXiv 2402.03898), with the usual kd_ratio of 1.

    Not in a loss: the schedule by which the student's own texts come in, their replay buffer, and the language modelling
    loss on a pre-training corpus. `kdtune.rollouts.DistiLLMSchedule` has the first two (docs/regimes.md).

    Args:
        direction: "reverse", the paper's better one, or "forward".
        alpha: share of the one that is mixed into the other.
    """
    return SkewReverseKL(alpha) if direction == "reverse" else SkewForwardKL(alpha)


def distillm2(alpha: float = 0.1, detach_mixture: bool = True) -> BySource:
    """Skew KL on the teacher's text, skew reverse KL on the student's: DistiLLM-2 (arXiv 2503.07067), with kd_ratio 1.

    Not in a loss: the pairs of texts and their weights (`kdtune.rollouts.Pairs`, docs/regimes.md). Not repeated: the mean of a
    text's tokens before the mean of texts, for a step is divided by its tokens; and an alpha of each text, which goes by a statistic that
    the authors' code reads and never writes, so that it trains at the fixed one.

    Args:
        alpha: share of the one that is mixed into the other.
        detach_mixture: no gradient through the mixture of the skew reverse KL, as in the authors' code.
    """
    return BySource(SkewForwardKL(alpha), SkewReverseKL(alpha, detach_mixture))


def akl(head_mass: float = 0.5) -> AdaptiveKL:
    """Adaptive KL (AKL, arXiv 2404.02657), all of the paper's loss.

    Args:
        head_mass: probability of the teacher's head.
    """
    return AdaptiveKL(head_mass)


def minillm() -> ReverseKL:
    """The single-step part of MiniLLM's gradient (arXiv 2306.08543): the reverse KL of each next token.

    Not in a loss: the policy gradient of what comes after a token, texts sampled from a mixture of both models, their
    importance weights, and the language modelling loss on a pre-training corpus. All but the last are in `kdtune.rollouts`
    (docs/regimes.md).
    """
    return ReverseKL()


def csd() -> ConcreteScore:
    """Concrete score distillation (CSD, arXiv 2509.25837), weighted by the teacher's and the student's probabilities."""
    return ConcreteScore(("teacher", "student"))


def hard() -> ArgMaxCrossEntropy:
    """Cross entropy on the teacher's most likely next token, at every position of the data's text.

    Not in a loss: sequence-level distillation (arXiv 1606.07947), where the teacher writes the text.
    """
    return ArgMaxCrossEntropy()


def uld() -> ULD:
    """Universal logit distillation, for a teacher with another tokenizer (arXiv 2402.12030); its weights are kd_ratio 0.6.

    All of the paper's loss. Not repeated: its code leaves out the end of the answer.
    """
    return ULD()


def alm(temperature: float = 100.0, debias_threshold: float | None = 0.1) -> ALM:
    """Approximate likelihood matching, for a teacher with another tokenizer (arXiv 2503.20083), times its temperature.

    Not in it: the paper's term on hidden states (`hidden_loss` needs one tokenizer), and its weighing of losses by their gradients.

    Args:
        temperature: of the probabilities of chunks.
        debias_threshold: as in `kdtune.losses.ALM`; None, without debiasing, is enough for a cache of the text's probabilities.
    """
    return ALM(temperature, scale_by_temperature=True, debias_threshold=debias_threshold)
