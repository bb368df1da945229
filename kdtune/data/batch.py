"""Examples put together into padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.data.transforms import Example


@dataclass(frozen=True)
class Batch:
    """Right-padded examples: int64 [B, S]; labels[b, t] is the target of position t, or IGNORE_INDEX."""

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...] | None = None
    """Tokens of each row without padding; None: no row is padded."""

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.tokens.numel() if self.lengths is None else sum(self.lengths)

    @property
    def num_padded_tokens(self) -> int:
        """Positions that are padding; 0 for the batch of a process that has no example left."""
        return self.tokens.numel() - self.num_tokens if self.num_tokens else 0

    def num_valid_tokens(self) -> int:
        """Positions that have a label. On a GPU this waits for the device: count before moving the batch."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """The batch of some examples, padded on the right to the longest (tokens with pad_id, labels with IGNORE_INDEX).

    Without examples it is one token of padding: something to compute on for a process that has no batch left while others
    have one, which counts nowhere.
    """
    if not examples:
        return Batch(torch.full((1, 1), pad_id), torch.full((1, 1), IGNORE_INDEX), (0,))
    lengths = tuple(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), max(lengths)), pad_id, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, :length] = torch.from_numpy(example.tokens)
        labels[row, :length] = torch.from_numpy(example.labels)
    return Batch(tokens, labels, lengths)
