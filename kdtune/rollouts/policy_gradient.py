"""The part of the reverse KL of whole texts that no single step has: MiniLLM's policy gradient.

Shapes: A tokens of an answer.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kdtune.errors import ConfigError
from kdtune.rollouts.record import Rollout

FloatArray = npt.NDArray[np.float64]


class PolicyGradient:
    """MiniLLM's policy gradient (arXiv 2306.08543, section 2.2), for the key `policy_gradient` of `kdtune.rollouts.Rollouts`.

    What a token gains is how much more likely the teacher finds the rest of the text than the student does:
    r_k = log p(y_k) - log q(y_k), and R_t the sum of those after t. The student's log q(y_t) is pushed up by its advantage A_t, R_t
    whitened over all tokens of the step, in addition to the divergence `kd_loss` of each token, which is MiniLLM's single-step term with
    `kdtune.losses.ReverseKL`. Both have the weight kd_ratio, which must be below 1; only the data's text has cross entropy.

    With gamma 1, `normalizes_length`, `whitens` and `reward_clip` off and `reward_scale` 1, single steps and policy gradient together are
    the gradient of the reverse KL between the models' distributions of whole texts.

    A text from the buffer (the share `replay` of `kdtune.rollouts.Share`; MiniLLM makes four passes over its texts) was written by the
    student of some steps ago. With rho_t the ratio of its probability of y_t now and then, the objective is PPO's,
    min(rho A, clip(rho, 1 - c, 1 + c) A) (arXiv 1707.06347): the factor rho, and no gradient where it is already further from 1 than
    `ratio_clip` in the direction of the advantage. Rewards are those of then, whitened over the texts of the step; a new text has the
    ratio 1. MiniLLM's code clips the product of the ratio and the weights of mixed text; here these are a factor outside, so that a first
    pass is the gradient itself.

    Args:
        gamma: discount of later tokens' rewards.
        reward_scale: what rewards are divided by; .5 in the paper's scripts, 1 in its code's default.
        reward_clip: largest absolute reward after that; None: no bound.
        normalizes_length: divide R_t by the number of rewards in it.
        includes_current: count r_t in R_t too, as the paper's code does; the single-step term has it already.
        whitens: subtract the mean of all tokens of the step and divide by their standard deviation.
        ratio_clip: c, above 0; None: no bound.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.95,
        reward_scale: float = 0.5,
        reward_clip: float | None = 100.0,
        normalizes_length: bool = True,
        includes_current: bool = False,
        whitens: bool = True,
        ratio_clip: float | None = 0.2,
    ) -> None:
        bounds = [one for one in (reward_clip, ratio_clip) if one is not None]
        if not 0 <= gamma <= 1 or min(reward_scale, *bounds) <= 0:
            raise ConfigError(
                f"gamma={gamma}, reward_scale={reward_scale}, reward_clip={reward_clip}, ratio_clip={ratio_clip}: gamma must lie between 0 "
                "and 1, the others above 0 (reward_clip=null, ratio_clip=null: no bound)"
            )
        self.gamma, self.reward_scale, self.reward_clip, self.ratio_clip = gamma, reward_scale, reward_clip, ratio_clip
        self.normalizes_length, self.includes_current, self.whitens = normalizes_length, includes_current, whitens

    def advantages(self, rollouts: Sequence[Rollout]) -> list[FloatArray]:
        """Return the advantage [A] of each token of some rollouts, all of a step; they need the log-probabilities of both models."""
        returns = [self._returns(one) for one in rollouts]
        if not self.whitens:
            return returns
        every = np.concatenate(returns)
        # Equal returns, such as of one token, say nothing: an advantage of 0.
        return [(one - every.mean()) / max(float(every.std()), 1e-8) for one in returns]

    def replayed(self, advantages: FloatArray, log_ratios: FloatArray) -> FloatArray:
        """Return what the gradients of log q now are multiplied by, [A], in place of the advantages [A].

        log_ratios: [A], log q of the tokens now less that of when they were written.
        """
        ratios = np.exp(log_ratios)
        if self.ratio_clip is None:
            return advantages * ratios
        is_beyond = np.where(advantages > 0, ratios > 1 + self.ratio_clip, ratios < 1 - self.ratio_clip)
        return advantages * ratios * ~is_beyond

    def _returns(self, rollout: Rollout) -> FloatArray:
        if rollout.log_probs is None or rollout.teacher_log_probs is None:
            raise ValueError("PolicyGradient: a rollout without the log-probabilities of both models")
        ratio = rollout.teacher_log_probs - rollout.log_probs
        rewards = ratio / self.reward_scale
        if self.reward_clip is not None:
            rewards = rewards.clip(-self.reward_clip, self.reward_clip)
        found, after, length = np.empty_like(rewards), 0.0, len(rewards)
        for at in reversed(range(length)):
            with_current = rewards[at] + self.gamma * after
            # Undiscounted by one more step without it, so that the next token's reward counts in full.
            found[at], after = with_current if self.includes_current else after, with_current
        if self.normalizes_length:
            counts = np.arange(length, 0, -1) - (0 if self.includes_current else 1)
            found = found / counts.clip(min=1)
        return found


def importance_weights(rollout: Rollout, teacher_share: float) -> FloatArray:
    """Return q / ((1 - a) q + a p) [A] of the tokens of a text drawn from that mixture, a the teacher's share; 1 for the student's own.

    Of each token: as in the paper, the ratio of what comes before it is left out, for its variance.
    """
    if teacher_share == 0 or rollout.log_probs is None or rollout.teacher_log_probs is None:
        return np.ones(rollout.answer_length)
    ratio = np.exp(rollout.teacher_log_probs - rollout.log_probs)
    weights: FloatArray = 1 / (1 - teacher_share + teacher_share * ratio)
    return weights
