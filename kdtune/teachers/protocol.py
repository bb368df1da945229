"""What a recipe knows of a teacher, wherever its distributions come from."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from kdtune.data import Batch
from kdtune.losses import Signal


@runtime_checkable
class Teacher(Protocol):
    """Gives the signal of a batch: computed here, on other processes, or read from a file."""

    @property
    def vocab_size(self) -> int:
        """Ids from 0 that its signals give probability to."""

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announces the batches that it is called with next, in this order, so that it may start on them at once."""

    def __call__(self, batch: Batch) -> Signal:
        """The signal for the positions of a batch; a constant: no gradient reaches the teacher."""
