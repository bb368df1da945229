"""The labelled positions of a batch, found once on the CPU. Shapes: B batch, S sequence, T = B * S positions, N labelled ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import DataError, TrainingError

if TYPE_CHECKING:
    from kdtune.losses.alignment import Alignment


@dataclass(frozen=True)
class Targets:
    """Labelled positions of a batch, and their target tokens.

    A loss reads these, not a [B, S] tensor of labels: a search for the labelled positions on a GPU would make the host wait
    for the device in every micro-batch, because the size of its result is unknown beforehand.
    """

    positions_N: Tensor
    """int64 indices into the flattened [B, S] positions, ascending; with `alignment`, in its order."""
    labels_N: Tensor
    """int64 target ids of these positions."""
    shape: tuple[int, ...]
    """(B, S), or the leading shape of the hidden states in general."""
    id_range: tuple[int, int]
    """Smallest and largest target id, (0, -1) without targets: checked against a vocabulary without reading from the device."""
    weights_N: Tensor | None = None
    """Factors of the tokens' losses, floating-point; None: all 1."""
    class_weights_N: Tensor | None = None
    """Factors of the tokens' cross entropies, beside weights_N: 0 where a text is not to be imitated; None: all 1."""
    watched_M: Tensor | None = None
    """int64 indices of some of these N, at which both models' most likely ids are compared, in text that a model has written; None: the
    text is not watched."""
    is_own_text: bool = False
    """The student has written all of the text; see `kdtune.losses.BySource`."""
    alignment: "Alignment | None" = None
    """Where the teacher reads the same text in tokens of its own; None: it reads these."""

    @classmethod
    def from_labels(cls, labels: Tensor) -> "Targets":
        """Find the targets of int64 labels [B, S] that are already shifted, IGNORE_INDEX where there is none.

        On an accelerator this waits for the device.
        """
        flat_T = labels.flatten()
        positions_N = (flat_T != IGNORE_INDEX).nonzero().squeeze(1)
        labels_N = flat_T[positions_N]
        id_range = (int(labels_N.min()), int(labels_N.max())) if len(labels_N) else (0, -1)
        return cls(positions_N, labels_N, tuple(labels.shape), id_range)

    def __len__(self) -> int:
        return len(self.labels_N)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        """Return the targets with a function applied to each tensor, such as a move to a device."""
        mapped: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        alignment = None if self.alignment is None else self.alignment.map(function)
        return replace(self, **mapped, alignment=alignment)

    def moved(self, index_T: Tensor, shape: Sequence[int]) -> "Targets":
        """Return the targets of the same positions in another layout, of `shape`; `index_T` has the new index of each old one."""
        return replace(self, positions_N=index_T[self.positions_N], shape=tuple(shape))

    def to_labels(self) -> Tensor:
        """Return the labels of `shape`, IGNORE_INDEX at positions without a target."""
        labels_T = torch.full(self.shape, IGNORE_INDEX, device=self.labels_N.device).flatten()
        return labels_T.index_copy(0, self.positions_N, self.labels_N).view(self.shape)


def check_target_ids(id_range: tuple[int, int], vocab_size: int) -> None:
    """Raise unless all targets, from the smallest to the largest of id_range, are below vocab_size.

    Raises:
        DataError: one of them is not an id of the vocabulary.
    """
    smallest, largest = id_range
    if smallest < 0 or largest >= vocab_size:
        raise DataError(
            f"a label is not an id of the vocabulary: {smallest if smallest < 0 else largest}; allowed are 0 to "
            f"{vocab_size - 1}, which all models of this loss have, and {IGNORE_INDEX} (ignored); use the tokenizer that "
            "belongs to the models"
        )


def check_positions(name: str, shape: tuple[int, ...], labels_shape: tuple[int, ...]) -> None:
    """Raise unless a tensor has values for the positions of the labels.

    `name` is the tensor's name for the message, `shape` its shape without the last dimension.

    Raises:
        TrainingError: the two shapes differ.
    """
    if tuple(shape) != labels_shape:
        raise TrainingError(
            f"{name} do not belong to the labels: positions {tuple(shape)} for labels of {labels_shape}; both shapes must "
            "be the same; make both from the same batch"
        )
