"""TAID: a target that moves from the student's distribution to the teacher's as training goes on. Notation as in `base`."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.divergences.base import check_range
from kdtune.losses.divergences.kl import ForwardKL
from kdtune.losses.divergences.mixture import Mixture


class TAID(Mixture):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937): a divergence from softmax(a * t + (1 - a) * s).

    No gradient goes through the target. Its teacher's share `a` begins at `start` and after step k of n is
    ``min(end, max(start + (end - start) * k / n, a + rate * sigmoid(m) * (1 - a)))``, where m is the moving average
    ``momentum * m + (1 - momentum) * (before - now) / (before + 1e-15)`` of the relative fall of the step's divergence per
    token, over all processes (in the authors' code each has its own). The first step has nothing to be compared with, and
    m stays 0. Share and average are part of a run's resume state; each step's share is `taid_share` in metrics.jsonl.

    Args:
        divergence: any divergence; None: forward KL, the paper's.
        start: the first step's share, above 0: at 0 the first step would have no gradient from the teacher.
        end: the largest share, `start` to 1.
        rate: the paper's alpha: how much faster than linearly the share may rise. 0: linearly.
        momentum: the paper's beta, 0 to below 1.
        temperature: as in `Mixture`.
        scale_by_temperature_squared: as in `Mixture`.
    """

    def __init__(
        self,
        divergence: Callable[..., Tensor] | None = None,
        start: float = 0.4,
        end: float = 1.0,
        rate: float = 5e-4,
        momentum: float = 0.99,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        check_range("start", start, lambda share: 0 < share <= 1, "above 0, at most 1")
        check_range("end", end, lambda share: start <= share <= 1, f"from start={start:g} to 1")
        super().__init__(
            ForwardKL() if divergence is None else divergence,
            share=start,
            alpha=1.0,
            replaces="teacher",
            detach=True,
            temperature=temperature,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )
        self.start, self.end = start, end
        self.rate = check_range("rate", rate, lambda rate: rate >= 0, "0 or more")
        self.momentum = check_range("momentum", momentum, lambda factor: 0 <= factor < 1, "from 0 to below 1")
        self.label = "TAID"
        self._average, self._before = 0.0, math.nan

    def after_step(self, step: int, num_steps: int, kd_loss: float) -> dict[str, float]:
        """Move the share on after a step, see `kdtune.losses.StatefulLoss`; return the step's own as `taid_share`."""
        share, own = self.share, {"taid_share": self.share}
        if not math.isnan(self._before):
            fall = (self._before - kd_loss) / (self._before + 1e-15)
            self._average = self.momentum * self._average + (1 - self.momentum) * fall
            share += self.rate * _sigmoid(self._average) * (1 - share)
        self._before = kd_loss
        linear = self.start + (self.end - self.start) * min(1.0, step / num_steps)
        self.share = min(self.end, max(linear, share))
        return own

    def state_dict(self) -> dict[str, Any]:
        """Return the share, the average and the divergence of the last step (None before the first)."""
        before = None if math.isnan(self._before) else self._before
        return {"share": self.share, "average": self._average, "before": before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            ConfigError: the share is not between `start` and `end`.
        """
        share, before = float(state_dict["share"]), state_dict["before"]
        if not self.start <= share <= self.end:
            raise ConfigError(
                f"TAID's share {share:g} of the resumed run is not from start={self.start:g} to end={self.end:g}; resume with its own"
            )
        self.share, self._average = share, float(state_dict["average"])
        self._before = math.nan if before is None else float(before)


def _sigmoid(number: float) -> float:
    """1 / (1 + exp(-number)), without overflow."""
    return 1 / (1 + math.exp(-number)) if number >= 0 else 1 - 1 / (1 + math.exp(number))
