"""Part of a dataset in memory, whose examples keep the numbers that they have in the whole."""

from collections.abc import Sequence
from dataclasses import replace

from kdtune.data.batch import Batch
from kdtune.data.dataset import MapDataset
from kdtune.data.mix import MixedDataset
from kdtune.data.packing import PackedDataset
from kdtune.data.transforms import Example
from kdtune.errors import ConfigError


class PartOfDataset(MapDataset):
    """The examples from `first` on, `count` of them; an epoch has each once, in the order that a dataset of them alone would have.

    dataset: the whole, each of whose examples an epoch has once. Examples are fetched by their place in the part, and numbered
    (`Example.index`) by that in the whole.
    """

    def __init__(self, dataset: MapDataset, first: int, count: int) -> None:
        self.report, self.is_chat, self.is_paired = dataset.report, dataset.is_chat, dataset.is_paired
        self._dataset, self._first, self._count = dataset, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        return self._dataset[self._first + index]

    def numbered(self, index: int) -> Example:
        """Return the example at a place in the part, with its index in the whole."""
        return replace(self[index], index=self._first + index)

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Make the batch of these examples, as the whole dataset would."""
        return self._dataset.collate(examples, pad_id)

    @property
    def has_own_batches(self) -> bool:
        """True if the whole dataset has."""
        return self._dataset.has_own_batches

    @property
    def lengths(self) -> Sequence[int] | None:
        """Number of tokens of each example."""
        return self._part(self._dataset.lengths)

    @property
    def teacher_lengths(self) -> Sequence[int] | None:
        """Number of a teacher's own tokens of each example."""
        return self._part(self._dataset.teacher_lengths)

    def fingerprint(self) -> str:
        """Return which examples they are, and the fingerprint of the whole."""
        return f"examples {self._first} to {self._first + self._count - 1} of {self._dataset.fingerprint()}"

    def _part(self, lengths: Sequence[int] | None) -> Sequence[int] | None:
        return None if lengths is None else lengths[self._first : self._first + self._count]


def part_of(dataset: MapDataset, first: int, count: int) -> MapDataset:
    """Return `count` examples of a dataset from `first` on, packed anew if they are packed; the dataset itself if these are all.

    Raises:
        ConfigError: the dataset has fewer, or is a mixture, of whose parts an epoch takes fixed shares.
    """
    if isinstance(dataset, PackedDataset):
        part = part_of(dataset.unpacked, first, count)
        return dataset if part is dataset.unpacked else dataset.packed_alike(part)
    if (first, count) == (0, dataset.size):
        return dataset
    if not 0 <= first < first + count <= dataset.size:
        raise ConfigError(f"examples {first} to {first + count - 1}: the dataset has {dataset.size}; take some of them")
    if isinstance(dataset, MixedDataset) or len(dataset) != dataset.size:
        raise ConfigError(
            f"examples {first} to {first + count - 1} of {dataset.size}: an epoch of a mixture has a share of each of its datasets; take "
            "all of them, or one dataset"
        )
    return PartOfDataset(dataset, first, count)
