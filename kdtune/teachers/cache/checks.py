"""Whether a data set can be captured, and a cache was captured of the examples that a run trains on, found before weights are read."""

import re

from kdtune import tokenizers
from kdtune.data import Dataset, MapDataset, PackedDataset
from kdtune.data.mix import MixedDataset
from kdtune.data.part import part_of
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.teachers.cache.format import Cache
from kdtune.teachers.cache.header import FILE
from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)

_PARTS = {
    "special_ids": "special tokens",
    "chat_template": "chat template",
    "tool_template": "template for tools",
}


def checked_dataset(key: str, dataset: Dataset) -> MapDataset:
    """Return the dataset of a config's `key`, or of a packed one the examples in the packs, whose rows can be found by index.

    Raises:
        ConfigError: it is a stream, its examples are cut to fill packs, or it is a mixture of packs.
    """
    if not isinstance(dataset, MapDataset):
        raise ConfigError(
            f"{key}: is a stream, whose examples have no index by which a teacher cache finds its rows; {key}.streaming=false"
        )
    if isinstance(dataset, PackedDataset):
        if dataset.split_across_pack:
            raise ConfigError(
                f"{key}.split_across_pack=true: examples that are cut are read without what came before, and a teacher cache has rows "
                f"of whole ones; ~{key}.split_across_pack"
            )
        return dataset.unpacked
    if _has_packs(dataset):
        raise ConfigError(
            f"{key}: is a mixture of packs, whose examples have no index by which a teacher cache finds its rows; {key}.datasets without "
            "packed=true: batches are without padding (padding_free), and tokens_per_micro_batch bounds their tokens"
        )
    return dataset


def _has_packs(dataset: Dataset) -> bool:
    if isinstance(dataset, MixedDataset):
        return any(map(_has_packs, dataset.datasets))
    return isinstance(dataset, PackedDataset)


def fitted_dataset(cache: Cache, key: str, tokenizer: Tokenizer, dataset: Dataset) -> Dataset:
    """Return the examples of a run's dataset that a cache has: all of them, or the part that was captured, which is logged.

    Args:
        cache: the cache.
        key: config key of the dataset, for the messages.
        tokenizer: the run's. Of a pair the cache is of the teacher's tokens.
        dataset: the run's, packed or not.

    Raises:
        ConfigError: the cache was captured of another data set, or with another tokenizer, template or truncation; the message has all
            that differs. Or as of `checked_dataset`.
    """
    header, whole = cache.header, checked_dataset(key, dataset)
    if different := _differences(cache, tokenizer, whole):
        raise ConfigError(
            f"{key}: {cache.folder} was captured of other examples: {'; '.join(different)}; use the settings of the capture "
            f"({FILE}), or capture again"
        )
    try:
        assert isinstance(dataset, MapDataset)  # `whole` is it, or is in it
        part = part_of(dataset, header.first_example, header.num_examples)
    except ConfigError as error:
        raise ConfigError(f"{key}: {cache.folder} has part of it: {error}") from error
    if part is not dataset:
        what = "trains on" if key == "dataset" else "is validated on"
        first, last = header.example_ids[0], header.example_ids[-1]
        log.info(
            "%s: %s has the examples %d to %d of %d: the run %s these", key, cache.folder, first, last, whole.size, what
        )
    return part


def _differences(cache: Cache, tokenizer: Tokenizer, dataset: MapDataset) -> list[str]:
    """Return what differs between the captured examples and a run's, [] if they are the same.

    Those in a teacher's own tokens, and a cache of all positions, which serves any labels, are checked when they are read.
    """
    header = cache.header
    theirs = tokenizer if tokenizer.pair is None else tokenizer.pair.teacher
    now = tokenizers.fingerprint(theirs)
    different = {part for part, found in header.tokenizer.items() if part in now and now[part] != found}
    found = ["the tokenizer gives other ids"] if "ids" in different else []
    if dataset.size != header.dataset_size:
        found.append(f"there are {dataset.size} examples, and were {header.dataset_size}")
    # Routes choose teachers, and change no example; in a mixture each of its datasets may have some.
    rows, captured = (re.sub(r", routes \w+", "", text) for text in (dataset.fingerprint(), header.dataset))
    is_same = not header.dataset or dataset.is_paired or rows == captured
    if is_same:
        return found
    found += [f"the {name} is another one" for part, name in _PARTS.items() if part in different]
    if theirs.max_seq_len != header.max_seq_len:
        shown = ["null" if limit is None else limit for limit in (theirs.max_seq_len, header.max_seq_len)]
        found.append(f"tokenizer.max_seq_len is {shown[0]}, and was {shown[1]}")
    if found or header.positions == "all":
        return found
    date = f", another date in the chat template (tokenizer.date={theirs.date} here)" if theirs.asks_date else ""
    return [f"their texts, their order or what of them is trained on differs{date}"]
