"""Signals of several teachers: a mixture of their distributions, or one teacher for each example.

Shapes: B batch, S sequence, T = B * S positions, C positions of a chunk, V the largest of the teachers' vocabularies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.fused_linear import project_logits
from kdtune.losses.heads import project
from kdtune.losses.signal import HiddenSignal, PendingSignal, Signal


@dataclass(frozen=True)
class MixtureSignal:
    """The mixture sum_i w_i p_i of the distributions of several teachers for the same positions."""

    signals: tuple[Signal, ...]
    weights: tuple[float, ...]
    """Above 0, with the sum 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S)."""
        return self.signals[0].shape

    @property
    def vocab_size(self) -> int:
        """V."""
        return max(signal.vocab_size for signal in self.signals)

    def log_probs(self, positions_C: Tensor) -> Tensor:
        """Return natural log-probabilities [C, V], fp32 or wider."""
        mixed: Tensor | None = None
        for signal, weight in zip(self.signals, self.weights, strict=True):
            part = _rows(signal, positions_C, self.vocab_size) + math.log(weight)
            mixed = part if mixed is None else torch.logaddexp(mixed, part)
        if mixed is None:
            raise ValueError("MixtureSignal: there are no signals")
        return mixed


@dataclass(frozen=True)
class RoutedSignal:
    """For each position the distribution of one of several teachers, each of which was asked for its own examples."""

    signals: tuple[Signal, ...]
    """Of the teachers, each of a micro-batch of its own."""
    teacher_T: Tensor
    """int64: number of the signal for each of the flattened positions."""
    place_T: Tensor
    """int64: which of that signal's flattened positions it is."""
    shape: tuple[int, ...]
    """(B, S)."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return max(signal.vocab_size for signal in self.signals)

    def log_probs(self, positions_C: Tensor) -> Tensor:
        """Return natural log-probabilities [C, V], fp32 or wider."""
        teacher_C, place_C = self.teacher_T[positions_C], self.place_T[positions_C]
        found: Tensor | None = None
        for number, signal in enumerate(self.signals):
            # Every signal is asked for every position, one that it has: to choose some would make the host wait for the device.
            is_own_C = teacher_C == number
            rows_CV = _rows(signal, place_C.where(is_own_C, 0), self.vocab_size)
            found = rows_CV if found is None else rows_CV.where(is_own_C[:, None], found)
        if found is None:
            raise ValueError("RoutedSignal: there are no signals")
        return found


def _rows(signal: Signal, positions_C: Tensor, vocab_size: int) -> Tensor:
    """Return a teacher's log-probabilities [C, V], -inf for ids that it lacks."""
    if isinstance(signal, PendingSignal):
        signal = signal.result()
    if isinstance(signal, HiddenSignal):  # of a bf16 head, its own call would round the logits to bf16
        head = project("teacher", signal.hidden_BSD, signal.output)
        if head.shards:
            raise ConfigError("several teachers need whole output heads: their parallelism must have tp=1")
        rows: object = project_logits(head, positions_C).log_softmax(-1)
    else:
        rows = signal.log_probs(positions_C)
    if not isinstance(rows, Tensor):
        raise ConfigError(
            f"several teachers: the {type(rows).__name__} of one lack most ids, and their mixture needs the probability of each; allowed "
            'are models, caches of kind=hidden, and of kind=topk with outside="renormalize"'
        )
    return F.pad(rows, (0, vocab_size - rows.shape[1]), value=-torch.inf)


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum.

    Raises:
        ConfigError: one is not a positive number.
    """
    for number, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"weights.{number}={weight}: must be a positive number; leave a teacher out to give it none"
            )
    return tuple(weight / math.fsum(weights) for weight in weights)
