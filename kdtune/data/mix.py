"""Several datasets mixed by weight."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kdtune.config import instantiate
from kdtune.data.batch import Batch
from kdtune.data.dataset import Dataset, DatasetStats, MapDataset, Order, StreamDataset, random_state, total_report
from kdtune.data.sources import PREVIEW
from kdtune.data.tokenized_cache import tokenized_cache
from kdtune.data.transforms import Example, pair_of, unnumbered
from kdtune.errors import ConfigError

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer


def mixed_dataset(
    tokenizer: "Tokenizer",
    *,
    datasets: Sequence[Dataset | Mapping[str, Any]],
    weights: Sequence[float],
    epoch_length: int | None = None,
) -> Dataset:
    """Mix several datasets in proportion to weights (which need not sum to 1).

    datasets: finished datasets, or builder nodes (`_component_: kdtune.data.alpaca_dataset, ...`), which receive the
    tokenizer. epoch_length: examples per epoch. None: the sum of the datasets' lengths; with a stream among them, until
    the first of them is exhausted. See MixedDataset and MixedStream for the content of an epoch.

    Raises:
        ConfigError: weights do not match the datasets, are not positive, or are too small for one example per epoch.
        DataError: raised by a builder.
    """
    shares = normalized_weights(weights, len(datasets))
    if epoch_length is not None and epoch_length < 1:
        raise ConfigError(f"epoch_length={epoch_length}: examples an epoch; at least 1, or null")
    built = [instantiate(node, tokenizer=tokenizer) if isinstance(node, Mapping) else node for node in datasets]
    for number, dataset in enumerate(built):
        _check_is_dataset(dataset, f"datasets.{number} is")
    if len({_collate_of(dataset) for dataset in built}) > 1:
        kinds = ", ".join(type(dataset).__name__ for dataset in built)
        raise ConfigError(f"datasets: {kinds} make batches in different ways (collate); mix datasets that share it")
    if all(isinstance(dataset, MapDataset) for dataset in built):
        return MixedDataset(cast(list[MapDataset], built), shares, epoch_length)
    return MixedStream(built, shares, epoch_length)


def load_dataset(
    key: str, node: Mapping[str, Any] | None, tokenizer: "Tokenizer", *, cache_dir: str | Path | None = None
) -> Any:
    """Build the dataset that a config has under `key`: `node`, which receives the `tokenizer`; None for None.

    Its tokens are kept in `cache_dir`, and read from there the next time (see `kdtune.data.tokenized_cache`); None: nowhere.

    Raises:
        ConfigError: the builder returns something else than a `Dataset`.
        DataError: raised by the builder.
    """
    with tokenized_cache(cache_dir, node, tokenizer):
        found = instantiate(node, tokenizer=tokenizer)
    if node is not None:
        _check_is_dataset(found, f"{key}: {node['_component_']} returns")
        if pair_of(tokenizer) is not None and not found.is_paired and PREVIEW.get() is None:
            raise ConfigError(
                f"{key}: the examples of {node['_component_']} are in the student's tokens alone, and the teacher has another "
                "tokenizer: use kdtune's builders, or set `teacher` in each Example (kdtune.data.TokenizerPair) and the dataset's "
                "is_paired"
            )
    return found


def _collate_of(dataset: Dataset) -> Callable[..., Batch]:
    """Return the function that makes the dataset's batches; a mix has that of its parts."""
    if isinstance(dataset, MixedDataset | MixedStream):
        return _collate_of(dataset._datasets[0])
    return type(dataset).collate


def _check_is_dataset(found: Any, what: str) -> None:
    if not isinstance(found, Dataset):
        raise ConfigError(
            f"{what} a {type(found).__name__}, not a dataset; a kdtune.data.TokenizedDataset is one, or an object of your own "
            "subclass of kdtune.data.MapDataset or StreamDataset"
        )


def normalized_weights(weights: Sequence[float], num_datasets: int) -> list[float]:
    """Return the weights divided by their sum.

    Raises:
        ConfigError: there is not one weight for each dataset, or one is not a positive number.
    """
    if num_datasets == 0:
        raise ConfigError("datasets: the list is empty; name at least one dataset")
    if len(weights) != num_datasets:
        raise ConfigError(
            f"weights: {len(weights)} values for {num_datasets} datasets; give one weight for each dataset"
        )
    for number, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"weights[{number}]={weight}: must be a positive number; leave a dataset out to give it none"
            )
    return [weight / sum(weights) for weight in weights]


class MixedDataset(MapDataset):
    """Datasets in memory, mixed. An epoch takes exactly its share of each (rounded to whole examples).

    Each dataset is traversed in its own order and continues where the last epoch stopped: no example repeats before its
    whole dataset has been used. Shuffled, the datasets are interleaved at random; otherwise they are evenly spaced.
    datasets, shares: the parts of the mixture, and the share of each in an epoch. epoch_length: examples per epoch.
    """

    def __init__(
        self, datasets: Sequence[MapDataset], shares: Sequence[float], epoch_length: int | None = None
    ) -> None:
        self.report = _mixed_report(datasets)
        self.is_chat = any(dataset.is_chat for dataset in datasets)
        self.is_paired = all(dataset.is_paired for dataset in datasets)
        self.is_prompts = any(dataset.is_prompts for dataset in datasets)
        self._datasets = list(datasets)
        self._starts = np.cumsum([0] + [dataset.size for dataset in datasets])
        self._length = sum(len(dataset) for dataset in datasets) if epoch_length is None else epoch_length
        self._quotas = whole_shares(shares, self._length)
        for number, (quota, share) in enumerate(zip(self._quotas, shares, strict=True)):
            if quota == 0:
                raise ConfigError(
                    f"weights[{number}]: a share of {share:.3g} of an epoch of {self._length} examples is no example; "
                    "raise the weight or epoch_length, or leave the dataset out"
                )

    def __len__(self) -> int:
        return self._length

    @property
    def datasets(self) -> Sequence[MapDataset]:
        """The datasets of the mixture."""
        return self._datasets

    @property
    def size(self) -> int:
        """Number of examples of all datasets together."""
        return int(self._starts[-1])

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Make the batch of these examples, as each of the datasets would."""
        return self._datasets[0].collate(examples, pad_id)

    @property
    def has_own_batches(self) -> bool:
        """True if the datasets have."""
        return self._datasets[0].has_own_batches

    def __getitem__(self, index: int) -> Example:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return unnumbered(self._datasets[number][index - int(self._starts[number])])

    @property
    def lengths(self) -> list[int] | None:
        """Number of tokens of each example of all datasets."""
        return _joined([dataset.lengths for dataset in self._datasets])

    @property
    def teacher_lengths(self) -> list[int] | None:
        """Number of a teacher's own tokens of each example of all datasets."""
        return _joined([dataset.teacher_lengths for dataset in self._datasets])

    def fingerprint(self) -> str:
        """Combine the datasets' fingerprints with the examples per epoch taken from each."""
        parts = zip(self._quotas, self._datasets, strict=True)
        return " + ".join(f"{quota} of {dataset.fingerprint()}" for quota, dataset in parts)

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Order:
        """Return the indices of an epoch [len], in order."""
        chosen = np.repeat(np.arange(len(self._datasets)), self._quotas)
        if shuffle:
            chosen = random_state(seed, epoch).permutation(chosen)
        else:
            spaced = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self._quotas])
            chosen = chosen[np.argsort(spaced, kind="stable")]
        indices = np.empty(self._length, dtype=np.int64)
        for number, start in enumerate(self._starts[:-1]):
            indices[chosen == number] = start + self._part(number, seed=seed, epoch=epoch, shuffle=shuffle)
        return indices

    def _part(self, number: int, *, seed: int, epoch: int, shuffle: bool) -> Order:
        """Return an epoch's quota of one dataset, taken from the endless sequence of that dataset's own epochs."""
        dataset, quota = self._datasets[number], self._quotas[number]
        own_seed = _own_seed(seed, number)
        first, last = epoch * quota, (epoch + 1) * quota
        cycles = range(first // len(dataset), (last - 1) // len(dataset) + 1)
        run = np.concatenate([dataset.order(seed=own_seed, epoch=cycle, shuffle=shuffle) for cycle in cycles])
        offset = first - cycles.start * len(dataset)
        return run[offset : offset + quota]


class MixedStream(StreamDataset):
    """Datasets mixed example by example, at least one of them a stream.

    Shuffled, the dataset of each next example is drawn at random by weight; otherwise it is the one furthest behind its
    share (shares). An epoch ends after epoch_length examples, and exhausted datasets start over; without epoch_length, it ends
    as soon as one is exhausted.
    """

    def __init__(self, datasets: Sequence[Dataset], shares: Sequence[float], epoch_length: int | None = None) -> None:
        self.is_chat = any(dataset.is_chat for dataset in datasets)
        self.is_paired = all(dataset.is_paired for dataset in datasets)
        self.is_prompts = any(dataset.is_prompts for dataset in datasets)
        self._datasets = list(datasets)
        self._shares = np.asarray(shares)
        self._epoch_length = epoch_length

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Make the batch of these examples, as each of the datasets would."""
        return self._datasets[0].collate(examples, pad_id)

    @property
    def has_own_batches(self) -> bool:
        """True if the datasets have."""
        return self._datasets[0].has_own_batches

    @property
    def report(self) -> DatasetStats:  # type: ignore[override]  # computed: the datasets count while they are read
        """The sum of the datasets' reports."""
        return _mixed_report(self._datasets)

    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the examples of one epoch, in that epoch's order."""
        # A dataset that starts over within an epoch does so in an order of its own: its pass is part of its seed.
        passes = [0] * len(self._datasets)
        running = [self._pass(number, 0, seed, epoch, shuffle) for number in range(len(self._datasets))]
        for number in islice(self._choices(seed, epoch, shuffle), self._epoch_length):
            example = next(running[number], None)
            if example is None:
                if self._epoch_length is None:
                    return
                passes[number] += 1
                running[number] = self._pass(number, passes[number], seed, epoch, shuffle)
                example = next(running[number])
            yield unnumbered(example)  # its index in one of the datasets is not unique here

    def _pass(self, number: int, repeat: int, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        own_seed = _own_seed(seed, number, repeat)
        return self._datasets[number].examples(seed=own_seed, epoch=epoch, shuffle=shuffle)

    def _choices(self, seed: int, epoch: int, shuffle: bool) -> Iterator[int]:
        """Yield the number of the dataset that each next example comes from, endlessly."""
        random, taken = random_state(seed, epoch), np.zeros(len(self._datasets))
        while True:
            if shuffle:
                yield int(random.choice(len(self._shares), p=self._shares))
            else:
                number = int(np.argmax(self._shares * (taken.sum() + 1) - taken))
                taken[number] += 1
                yield number


def whole_shares(shares: Sequence[float], total: int) -> list[int]:
    """Return integers that sum to total, in proportion to shares: rounded down, the largest remainders up."""
    exact = np.asarray(shares) * total
    whole = np.floor(exact).astype(np.int64)
    up = np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]
    whole[up] += 1
    return [int(count) for count in whole]


def _joined(found: Sequence[Sequence[int] | None]) -> list[int] | None:
    known = [lengths for lengths in found if lengths is not None]
    return [length for lengths in known for length in lengths] if len(known) == len(found) else None


def _own_seed(*key: int) -> int:
    return int(random_state(*key).integers(2**31))


def _mixed_report(datasets: Sequence[Dataset]) -> DatasetStats:
    return total_report(
        [dataset.report for dataset in datasets], " + ".join(dataset.report.source for dataset in datasets)
    )
