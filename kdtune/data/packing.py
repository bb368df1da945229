"""Packs: several examples, or parts of them, as one example of up to a fixed number of tokens."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np

from kdtune.data.dataset import Dataset, DatasetStats, MapDataset, StreamDataset
from kdtune.data.sources import PREVIEW
from kdtune.data.transforms import Example
from kdtune.errors import ConfigError

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

T = TypeVar("T")


class PackingOptions(TypedDict, total=False):
    """How a builder's examples are packed, see `pack_examples`."""

    packed: bool
    split_across_pack: bool


def pack_examples(
    dataset: Dataset, tokenizer: "Tokenizer", *, packed: bool = True, split_across_pack: bool = False
) -> Dataset:
    """Return the dataset with its examples packed, in its own order: each pack takes the next ones that fit into max_seq_len.

    A pack is one of the examples that batch_size counts and that are shuffled. Its documents do not see each other, and have
    the labels that they have alone.

    dataset: in memory or a stream. tokenizer: the one with max_seq_len. packed: false returns the dataset as it is.
    split_across_pack: fill every pack to max_seq_len; an example that does not fit is cut, and its rest begins the next
    pack without seeing what came before.

    Raises:
        ConfigError: max_seq_len is not set, split_across_pack is without packed, or the examples are in a teacher's tokens too.
    """
    if not packed:
        if split_across_pack:
            raise ConfigError("split_across_pack=true: examples are not packed; set packed=true too, or remove it")
        return dataset
    if tokenizer.max_seq_len is None:
        if PREVIEW.get() is not None:  # the first row may be looked at without the run's tokenizer
            return dataset
        raise ConfigError("packed=true: a pack has up to tokenizer.max_seq_len tokens, which is not set; set it")
    if dataset.is_paired:
        raise ConfigError(
            "packed=true: a teacher with another tokenizer has packs of other lengths; remove it: batches are without padding "
            "(padding_free), and tokens_per_micro_batch bounds their tokens"
        )
    kind = PackedDataset if isinstance(dataset, MapDataset) else PackedStream
    return kind(dataset, tokenizer.max_seq_len, split_across_pack=split_across_pack)  # type: ignore[arg-type]


def cut_into_packs(
    items: Iterable[T], length_of: Callable[[T], int], size: int, *, split: bool
) -> Iterator[list[tuple[T, int, int]]]:
    """Yield the pieces of each pack of up to `size` tokens: an item, and the bounds of its part. `split` cuts items to fill packs."""
    pack: list[tuple[T, int, int]] = []
    room = size
    for item in items:
        start, length = 0, length_of(item)
        while start < length:
            if pack and (room < 1 if split else room < length):
                yield pack
                pack, room = [], size
            stop = min(length, start + room) if split else length
            pack.append((item, start, stop))
            room -= stop - start
            start = stop
    if pack:
        yield pack


class PackedDataset(MapDataset):
    """Packs of a dataset in memory. An epoch has each once.

    dataset: the examples. size: largest number of tokens of a pack. split_across_pack: as of `pack_examples`.
    """

    def __init__(self, dataset: MapDataset, size: int, *, split_across_pack: bool = False) -> None:
        self.report, self.is_chat = dataset.report, dataset.is_chat
        self.unpacked = dataset
        self._size, self.split_across_pack = size, split_across_pack
        known = dataset.lengths
        length_of = known.__getitem__ if known is not None else lambda index: len(dataset[index].tokens)
        self._packs = list(cut_into_packs(range(dataset.size), length_of, size, split=split_across_pack))

    def packed_alike(self, dataset: MapDataset) -> "PackedDataset":
        """Return other examples, packed in the same way."""
        return PackedDataset(dataset, self._size, split_across_pack=self.split_across_pack)

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return _pack([(self.unpacked.numbered(example), start, stop) for example, start, stop in self._packs[index]])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each pack."""
        return [sum(stop - start for _, start, stop in pack) for pack in self._packs]

    def fingerprint(self) -> str:
        """Return number and kind of the packs, and the fingerprint of the examples in them."""
        split = ", examples split" if self.split_across_pack else ""
        return f"{len(self)} packs of up to {self._size} tokens{split}: {self.unpacked.fingerprint()}"


class PackedStream(StreamDataset):
    """Packs of a stream, made as it is read, in the order in which it yields its examples.

    dataset: the examples. size: largest number of tokens of a pack. split_across_pack: as of `pack_examples`.
    """

    def __init__(self, dataset: Dataset, size: int, *, split_across_pack: bool = False) -> None:
        self.is_chat = dataset.is_chat
        self._dataset, self._size, self._split = dataset, size, split_across_pack

    @property
    def report(self) -> DatasetStats:  # type: ignore[override]  # the stream's own, which counts while it is read
        """Counts of the stream's rows."""
        return self._dataset.report

    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the packs of one epoch, in that epoch's order."""
        found = self._dataset.examples(seed=seed, epoch=epoch, shuffle=shuffle)
        return map(_pack, cut_into_packs(found, lambda one: len(one.tokens), self._size, split=self._split))


def _pack(pieces: list[tuple[Example, int, int]]) -> Example:
    """Return the pack of these parts; the last label of a part that is cut is the token that follows in the next pack.

    A part has no index: it is read without what came before, and is another example than the whole.
    """
    parts = tuple(
        replace(
            example,
            tokens=example.tokens[start:stop],
            labels=example.labels[start:stop],
            index=example.index if stop - start == len(example.tokens) else None,
        )
        for example, start, stop in pieces
    )
    tokens, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "labels"))
    return Example(tokens, labels, documents=parts)
