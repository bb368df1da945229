"""What a teacher gives for a batch. Shapes: B batch, S sequence, D the teacher's embedding width."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn


@dataclass(frozen=True)
class HiddenSignal:
    """A teacher's last hidden states (after its final norm) and its output head, from which the loss makes the logits.

    The whole vocabulary's distribution at a fraction of the memory: [B, S, V] logits are never stored. Both are
    constants to the loss: no gradient reaches the teacher.
    """

    hidden_BSD: Tensor
    output: nn.Linear


# The kinds of signal that the losses understand.
Signal: TypeAlias = HiddenSignal
