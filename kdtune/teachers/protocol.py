"""Interface of a teacher, wherever its distributions come from."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from kdtune.data import Batch
from kdtune.losses import Signal


@runtime_checkable
class Teacher(Protocol):
    """Source of a batch's signal: computed here, on other processes, or read from a file."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, from 0, that its signals give probability to."""

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announce the batches of the next calls, in this order, so that the teacher may start on them at once."""

    def __call__(self, batch: Batch) -> Signal:
        """Return the signal for the positions of a batch; a constant: no gradient reaches the teacher."""
