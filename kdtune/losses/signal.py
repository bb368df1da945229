"""A teacher's output for a batch: its next-token distributions, in one of several forms.

Shapes: B batch, S sequence, T = B * S positions, C positions of a chunk, V the teacher's vocabulary, D its embedding width,
K ids that are kept per position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.losses.divergences.base import raised
from kdtune.losses.sparse import Outside, SampledRows, SparseRows, TopKRows, log1mexp


@runtime_checkable
class Signal(Protocol):
    """A teacher's log-probabilities for the positions of a batch, computed when the loss asks for them.

    The loss asks for a chunk of positions at a time, so a form that computes them on demand never holds [T, V].
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (B, S) of the positions."""

    @property
    def vocab_size(self) -> int:
        """V: number of ids, from 0, that it may give probability to."""

    def log_probs(self, positions_C: Tensor) -> Tensor | SparseRows:
        """Return natural log-probabilities [C, V], fp32 or wider, -inf for none; or sparse rows.

        positions_C index the flattened [B, S].
        """


@dataclass(frozen=True)
class HiddenSignal:
    """A teacher's last hidden states (after its final norm) and its output head, from which the loss computes the logits.

    The full distribution at a fraction of the memory: [B, S, V] logits are never stored. Both are constants to the loss:
    no gradient reaches the teacher. The fused loss projects them into its own buffers.
    """

    hidden_BSD: Tensor
    output: nn.Linear
    layers: tuple[Tensor, ...] = ()
    """Hidden states [B, S, D] of the layers that a hidden-state term compares."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S)."""
        return tuple(self.hidden_BSD.shape[:-1])

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.output.out_features

    def log_probs(self, positions_C: Tensor) -> Tensor:
        """Return natural log-probabilities [C, V], fp32 or wider."""
        logits_CV = self.output(self.hidden_BSD.flatten(0, 1)[positions_C])
        return _log_softmax(logits_CV)


@dataclass(frozen=True)
class PendingSignal:
    """A signal that is being computed, beside the student's forward or on another device, or read from a file.

    `result` makes whoever reads it wait, and not before: `KDLoss` calls it.
    """

    shape: tuple[int, ...]
    """(B, S)."""
    vocab_size: int
    """V."""
    result: Callable[[], Signal]

    def log_probs(self, positions_C: Tensor) -> Tensor | SparseRows:
        """Return what the result does."""
        return self.result().log_probs(positions_C)


@dataclass(frozen=True)
class DenseSignal:
    """Log-probabilities, or logits, of every position."""

    logits_BSV: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S)."""
        return tuple(self.logits_BSV.shape[:-1])

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits_BSV.shape[-1]

    def log_probs(self, positions_C: Tensor) -> Tensor:
        """Return natural log-probabilities [C, V], fp32 or wider."""
        return _log_softmax(self.logits_BSV.flatten(0, -2)[positions_C])


@dataclass(frozen=True)
class TopKSignal:
    """The K most likely ids of every position with their log-probabilities, as a cache stores them.

    Renormalized, the K ids share all of the probability, other ids have none; divergences that are infinite where only the
    student gives probability, such as reverse KL, are infinite on it. With a tail, the other ids are one id more, which has
    the probability that the K leave; ignored, the student's distribution too is over the K: see `kdtune.losses.TopKTargets`.
    """

    ids_BSK: Tensor
    """int64."""
    logp_BSK: Tensor
    """Natural log-probabilities, or, renormalized or ignored, logits, of these ids."""
    vocab_size: int
    outside: Outside = "renormalize"
    log_tail_BS: Tensor | None = None
    """With a tail, the logarithm of its probability; None: of what the K leave of 1, which rounding blurs where it is small."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S)."""
        return tuple(self.ids_BSK.shape[:-1])

    def log_probs(self, positions_C: Tensor) -> Tensor | SparseRows:
        """Return natural log-probabilities [C, V], fp32 or wider, -inf for ids that are not among the K; or the rows of the K."""
        ids_CK = self.ids_BSK.flatten(0, -2)[positions_C]
        logp_CK = self.logp_BSK.flatten(0, -2)[positions_C]
        if self.outside != "renormalize":
            (logp_CK,) = raised(logp_CK)
            if self.outside == "ignore":
                return TopKRows(ids_CK, logp_CK, None)
            if self.log_tail_BS is not None:
                return TopKRows(ids_CK, logp_CK, self.log_tail_BS.flatten()[positions_C].to(logp_CK.dtype))
            return TopKRows(ids_CK, logp_CK, log1mexp(logp_CK.logsumexp(-1)))
        logp_CK = _log_softmax(logp_CK)
        dense_CV = logp_CK.new_full((len(ids_CK), self.vocab_size), -torch.inf)
        return dense_CV.scatter(1, ids_CK, logp_CK)


@dataclass(frozen=True)
class SampledSignal:
    """Ids drawn from the teacher at every position, as a cache stores them (arXiv 2503.16870); see `kdtune.losses.SampledTargets`."""

    ids_BSK: Tensor
    """int64; ids may repeat."""
    logp_BSK: Tensor
    """The teacher's natural log-probabilities of these ids."""
    weights_BSK: Tensor
    """1 / (number of draws * probability of drawing this id)."""
    vocab_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S)."""
        return tuple(self.ids_BSK.shape[:-1])

    def log_probs(self, positions_C: Tensor) -> SparseRows:
        """Return the positions' draws."""
        rows = (x.flatten(0, -2)[positions_C] for x in (self.ids_BSK, self.logp_BSK, self.weights_BSK))
        return SampledRows(*rows).to(torch.promote_types(self.logp_BSK.dtype, torch.float32))


@dataclass(frozen=True)
class TextSignal:
    """The probability of the text's own next token at every position, as a cache stores it.

    `kdtune.losses.ALM` and `kdtune.losses.SampledReverseKL` read it.
    """

    logp_BS: Tensor
    """Natural log-probabilities."""
    vocab_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S)."""
        return tuple(self.logp_BS.shape)

    def log_probs(self, positions_C: Tensor) -> Tensor:
        """Raise: other ids' probabilities are not known."""
        raise ConfigError(
            "the teacher knows the probability of the text's own tokens alone; allowed is kd_loss=kdtune.losses.ALM or "
            "kdtune.losses.SampledReverseKL, or another teacher"
        )

    def text_log_probs(self, positions_M: Tensor) -> Tensor:
        """Return the natural log-probability [M] of the token after each of the flattened positions."""
        return self.logp_BS.flatten()[positions_M]


def _log_softmax(logits: Tensor) -> Tensor:
    return raised(logits)[0].log_softmax(-1)
