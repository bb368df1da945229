"""Documents laid end to end in one row of tokens, without padding. Shape suffixes: T tokens of all documents, N documents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents in a row of tokens [1, T]: attention stays within a document, whose positions start from 0.

    The numbers are kept twice: on the host, where the sizes of attention calls are needed without waiting for a device, and on
    the device.
    """

    lengths: tuple[int, ...]
    """Number of tokens of each document, at least 1."""
    longest: int
    """The largest of them."""
    positions_T: Tensor
    """int64 position of each token in its document."""
    starts_N1: Tensor
    """int32 index of each document's first token, and T."""
    block_masks: Mapping[int | None, Any] = field(default_factory=dict)
    """Flex attention's masks by the window, of a forward that needs them (`kdtune.models.flex`)."""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> "Documents":
        """Return the documents with these numbers of tokens, on the CPU.

        Raises:
            ValueError: there is none, or one is empty.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"Documents: lengths {list(lengths)}; at least one document, each of at least 1 token")
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        starts_N1 = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), max(lengths), positions_T, starts_N1)

    @property
    def lengths_of_tokens(self) -> Tensor:
        """Return for each token the number of tokens of its document, int32 [T], on the device and without a wait for it."""
        lengths_N = self.starts_N1.diff()
        return lengths_N.repeat_interleave(lengths_N, output_size=len(self.positions_T))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Documents":
        """Return the documents with a function applied to each tensor, such as a move to a device."""
        return replace(self, positions_T=function(self.positions_T), starts_N1=function(self.starts_N1))

    def to(self, device: torch.device | str) -> "Documents":
        """Return the documents with their tensors on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def check_alone(self, tokens: Tensor, *others: object) -> None:
        """Raise ValueError unless tokens are one row [1, T] of these documents, and no other input says what is attended to."""
        if any(other is not None for other in others):
            raise ValueError(
                "documents: they are the positions and the mask, and no cache holds them; leave the others out"
            )
        if tuple(tokens.shape) != (1, len(self.positions_T)):
            raise ValueError(
                f"documents: {len(self.lengths)} of {len(self.positions_T)} tokens together, for tokens of shape "
                f"{tuple(tokens.shape)}; they must be end to end in one row, [1, {len(self.positions_T)}]"
            )
