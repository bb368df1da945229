"""Hard distillation. Notation as in `base`."""

from torch import Tensor

from kdtune.losses.divergences.base import TemperedDivergence, most_likely


class ArgMaxCrossEntropy(TemperedDivergence):
    """Hard distillation: cross entropy on the teacher's most likely id, in nats.

    The first of several ids. Not a divergence: where the models agree it is the teacher's -log of its largest probability.
    Same as sequence-level distillation (arXiv 1606.07947) only on text that the teacher wrote greedily.

    Args:
        temperature: the student's is softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    label = "hard KD"

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N] and slope [N, V], at temperature 1."""
        best_N1 = most_likely(t_NV)[:, None]
        slope_NV = s_NV.new_zeros(s_NV.shape).scatter_(1, best_N1, -1.0)
        return -s_NV.gather(1, best_N1).squeeze(1), slope_NV
