"""Batches in a fixed order, epoch after epoch, from any position."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from kdtune.data.batch import Batch, collate
from kdtune.data.dataset import Dataset, DatasetStats, MapDataset, StreamDataset, report_copy
from kdtune.data.micro_batches import cut_by_tokens
from kdtune.data.transforms import Example
from kdtune.errors import ConfigError, DataError

T = TypeVar("T")
LoaderState: TypeAlias = tuple[int, int]
"""(epoch, batch of that epoch), both from 0: the next batch to be returned."""


class Loader:
    """An endless iterator of batches. The next batch depends only on the dataset, the settings and the position.

    batch_size: examples per batch. pad_id: the tokenizer's. shuffle: a new order every epoch, which depends only on seed.
    num_workers: processes that prefetch and pad (for a stream, whose rows are read in order, at most 1). They change
    neither the order nor the position: prefetched batches do not count. In a stream, seek reads and discards the rows
    before the position. The last, smaller batch of an epoch is kept. `report` counts the rows of the
    dataset; for a stream, those of the current epoch up to the last batch returned.

    rank, num_ranks: this process, of num_ranks that share the batches. Each round takes num_ranks batches, one per process,
    and advances the position, which is the same on all of them, by num_ranks. In an epoch's last round, processes without a
    batch left get one without labels.

    padding_free: rows end to end in place of padding, see `Batch.without_padding`. tokens_per_micro_batch: cut the examples of
    each step, batches_per_step batches on every process, anew: into micro-batches of at most so many tokens, examples of similar
    length together. The step's examples stay the same, and the position advances by the step, after its last micro-batch.

    Raises:
        ConfigError: a setting is out of range.
        DataError: the dataset yields no batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        pad_id: int,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        padding_free: bool = False,
        tokens_per_micro_batch: int | None = None,
        batches_per_step: int = 1,
    ) -> None:
        for key, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("num_workers", num_workers, 0),
            ("tokens_per_micro_batch", tokens_per_micro_batch, 1), ("batches_per_step", batches_per_step, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ConfigError(f"{key}={value}: must be at least {least}")
        if isinstance(dataset, StreamDataset) and num_workers > 1:
            raise ConfigError(
                f"num_workers={num_workers}: at most 1 for a streaming dataset, whose rows are read in order"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.report = dataset.report
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self._settings = _Settings(
            batch_size, pad_id, shuffle, seed, rank, num_ranks, padding_free, tokens_per_micro_batch, batches_per_step
        )
        self._num_workers = num_workers
        self._position: LoaderState = (0, 0)
        self._ahead: Iterator[Any] | None = None
        if self.batches_per_epoch == 0:
            raise DataError(
                f"{dataset.report.source}: no batch to train on: {dataset.report.examples} examples; give it rows, or "
                "another filter_fn"
            )

    @property
    def position(self) -> LoaderState:
        """The next batch to be returned: (epoch, batch of that epoch), from (0, 0)."""
        return self._position

    @property
    def batches_per_epoch(self) -> int | None:
        """Number of batches in an epoch; None for a stream, whose length is unknown."""
        return self._settings.batches(len(self.dataset)) if isinstance(self.dataset, MapDataset) else None

    def __len__(self) -> int:
        """Number of batches in an epoch.

        Raises:
            TypeError: the dataset is a stream (see batches_per_epoch).
        """
        if self.batches_per_epoch is None:
            raise TypeError("a streaming dataset has no length")
        return self.batches_per_epoch

    def seek(self, position: Sequence[int]) -> None:
        """Go to a position, as returned by `position`; iteration then continues exactly as if it had arrived there by itself.

        Raises:
            DataError: the position lies outside an epoch (for a stream, raised by the next batch).
        """
        epoch, batch = position
        outside = self.batches_per_epoch is not None and batch >= self.batches_per_epoch
        if epoch < 0 or batch < 0 or outside:
            raise _outside(epoch, batch, self.batches_per_epoch, self.dataset)
        self._position = (int(epoch), int(batch))
        self._ahead = None

    def __iter__(self) -> Iterator[Batch]:
        """Return the loader itself: iteration continues from the position."""
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = iter(self._fetcher())
        item = next(self._ahead)
        if isinstance(item, DataError):
            self._ahead = None
            try:
                raise item
            finally:
                del item  # The traceback would hold this frame, and this frame the error.
        self._position = item.next_position
        self.report = item.report or self.report
        batch: Batch = item.batch
        return batch

    def _fetcher(self) -> "DataLoader[Any]":
        # A generator of its own: DataLoader would otherwise draw from the global one, and a resumed run would differ.
        common: dict[str, Any] = {
            "num_workers": self._num_workers,
            "generator": torch.Generator().manual_seed(0),
            "worker_init_fn": _leave_signals_to_the_main_process,
        }
        if isinstance(self.dataset, MapDataset):
            indices = _IndexBatches(self.dataset, self._settings, self._position)
            fetched = _MapBatches(self.dataset, self._settings)
            return DataLoader(fetched, sampler=indices, batch_size=None, collate_fn=_as_it_is, **common)
        stream = _StreamBatches(self.dataset, self._settings, self._position)
        return DataLoader(stream, batch_size=None, collate_fn=_as_it_is, **common)


def batches(
    dataset: Dataset,
    batch_size: int,
    pad_id: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    padding_free: bool = False,
    tokens_per_micro_batch: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of one pass over a dataset in its own order, including the last, smaller one; used for validation.

    batch_size: examples per batch. pad_id: the tokenizer's. rank, num_ranks: this process, of num_ranks that share the
    batches. Every process gets the same number of batches; one that has none left gets a last one without labels.
    padding_free, tokens_per_micro_batch: as of `Loader`; batch_size examples on every process are cut anew.
    """
    settings = _Settings(batch_size, pad_id, False, 0, rank, num_ranks, padding_free, tokens_per_micro_batch)
    groups = _grouped(dataset.examples(seed=0, epoch=0, shuffle=False), batch_size)
    for own, _ in _rounds(groups, settings, _num_tokens):
        yield settings.collate(dataset, own)


@dataclass(frozen=True)
class _Settings:
    batch_size: int
    pad_id: int
    shuffle: bool
    seed: int
    rank: int
    num_ranks: int
    padding_free: bool = False
    max_tokens: int | None = None
    batches_per_step: int = 1

    def batches(self, num_examples: int) -> int:
        return -(-num_examples // self.batch_size)

    def collate(self, dataset: Dataset, examples: list[Example]) -> Batch:
        if self.padding_free and not dataset.is_paired and not dataset.has_own_batches:
            # A pack may have one document of many tokens among many short ones, which would be padded to it.
            return collate(examples, self.pad_id, padding_free=True)
        batch = dataset.collate(examples, self.pad_id)
        return batch.without_padding() if self.padding_free else batch


@dataclass(frozen=True)
class _Item:
    batch: Batch
    next_position: LoaderState
    report: DatasetStats | None = None


class _MapBatches(TorchDataset[_Item]):
    """The batch of some examples of a dataset, each with its index, and the position after it."""

    def __init__(self, dataset: MapDataset, settings: _Settings) -> None:
        self._dataset = dataset
        self._settings = settings

    def __getitem__(self, index: tuple[list[int], LoaderState]) -> _Item:
        indices, next_position = index
        examples = [self._dataset.numbered(one) for one in indices]
        return _Item(self._settings.collate(self._dataset, examples), next_position)


class _IndexBatches:
    """Yield the indices of each batch from a position on, and the position after it, endlessly."""

    def __init__(self, dataset: MapDataset, settings: _Settings, start: LoaderState) -> None:
        self._dataset = dataset
        self._settings = settings
        self._start = start

    def __iter__(self) -> Iterator[tuple[list[int], LoaderState]]:
        settings, (epoch, count) = self._settings, self._start
        lengths = None if settings.max_tokens is None else self._dataset.lengths
        length_of = lengths.__getitem__ if lengths is not None else lambda index: _num_tokens(self._dataset[index])
        while True:
            order = self._dataset.order(seed=settings.seed, epoch=epoch, shuffle=settings.shuffle).tolist()
            num_batches = settings.batches(len(order))
            groups = (
                order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
                for batch in range(count, num_batches)
            )
            for own, taken in _rounds(groups, settings, length_of):
                count += taken
                yield own, (epoch, count) if count < num_batches else (epoch + 1, 0)
            epoch, count = epoch + 1, 0


class _StreamBatches(IterableDataset[Any]):
    """Yield the batches of a stream from a position on, endlessly, each with the position after it.

    An error is yielded as an item, so that it keeps its own message when it comes from a worker process.
    """

    def __init__(self, dataset: Dataset, settings: _Settings, start: LoaderState) -> None:
        self._dataset = dataset
        self._settings = settings
        self._start = start

    def __iter__(self) -> Iterator[_Item | DataError]:
        epoch, first = self._start
        try:
            while True:
                yield from self._epoch(epoch, first)
                epoch, first = epoch + 1, 0
        except DataError as error:
            yield error

    def _epoch(self, epoch: int, first: int) -> Iterator[_Item]:
        settings, waiting = self._settings, None
        examples = self._dataset.examples(seed=settings.seed, epoch=epoch, shuffle=settings.shuffle)
        groups = _grouped(examples, settings.batch_size)
        count = sum(1 for _ in islice(groups, first))
        for own, taken in _rounds(groups, settings, _num_tokens):
            if waiting is not None:  # held back until another one follows, so that it is not the epoch's last
                yield waiting
            count += taken
            batch = settings.collate(self._dataset, own)
            waiting = _Item(batch, (epoch, count), report_copy(self._dataset.report))
        if waiting is None:
            raise _outside(epoch, first, count, self._dataset)
        yield _Item(waiting.batch, (epoch + 1, 0), report_copy(self._dataset.report))


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ignore signals sent to the whole process group (Ctrl-C, a closed terminal, Slurm's), so that a run can still save.

    SIGTERM ends a worker with exit code 0, which DataLoader does not treat as a crash.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def _grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


def _rounds(
    groups: Iterator[list[T]], settings: _Settings, length_of: Callable[[T], int]
) -> Iterator[tuple[list[T], int]]:
    """Yield this process's part of each round, nothing if none is left for it, and by how many groups the position advances.

    The groups of all processes are a round, or those of a step are cut anew into several.
    """
    if settings.max_tokens is None:
        for round_of_groups in _grouped(groups, settings.num_ranks):
            own = round_of_groups[settings.rank] if settings.rank < len(round_of_groups) else []
            yield own, len(round_of_groups)
        return
    for step in _grouped(groups, settings.num_ranks * settings.batches_per_step):
        items = [item for group in step for item in group]
        lengths = [length_of(item) for item in items]
        parts = cut_by_tokens(
            lengths, settings.max_tokens, num_ranks=settings.num_ranks, is_padded=not settings.padding_free
        )
        rounds = parts[settings.rank :: settings.num_ranks]
        for number, part in enumerate(rounds, 1):
            yield [items[index] for index in part], len(step) if number == len(rounds) else 0


def _num_tokens(example: Example) -> int:
    return len(example.tokens)


def _as_it_is(item: Any) -> Any:
    return item


def _outside(epoch: int, batch: int, length: int | None, dataset: Dataset) -> DataError:
    return DataError(
        f"{dataset.report.source}: no batch {batch} in epoch {epoch}: an epoch has {length} batches, counted from 0; "
        "was the dataset or batch_size changed since the state was saved?"
    )
