from collections import Counter

import numpy as np
import pytest
from datasets import IterableDataset

from kdtune.config import bind, instantiate
from kdtune.data import (
    DatasetStats,
    EncodedRow,
    Loader,
    MixedDataset,
    MixedStream,
    RowStream,
    TokenizedDataset,
    mixed_dataset,
)
from kdtune.data.mix import whole_shares
from kdtune.data.rows import RowEncoder
from kdtune.errors import ConfigError


def numbered(source, size):
    """Examples [source, number, 1]: the first token names the source, the second the example."""
    return TokenizedDataset(
        ([([source, number, 1], [True] * 3)][0] for number in range(size)), DatasetStats(str(source), size)
    )


def stream(source, size):
    rows = IterableDataset.from_generator(generate, gen_kwargs={"source": source, "size": size})
    encoder = RowEncoder(lambda row: EncodedRow([row["source"], row["number"], 1], [True] * 3))
    return RowStream(rows, encoder, source=str(source), shuffle_buffer=4)


def generate(source, size):
    for number in range(size):
        yield {"source": source, "number": number}


def seen(dataset, *, seed=0, epoch=0, shuffle=True, limit=None):
    examples = dataset.examples(seed=seed, epoch=epoch, shuffle=shuffle)
    pairs = [(int(example.tokens[0]), int(example.tokens[1])) for example in examples]
    return pairs[:limit]


@pytest.mark.parametrize("shuffle", [True, False])
def test_proportions_are_exact_and_the_epoch_is_as_long_as_the_sources_together(tokenizer, shuffle):
    mix = mixed_dataset(tokenizer, datasets=[numbered(10, 30), numbered(20, 10)], weights=[1, 3])
    assert isinstance(mix, MixedDataset)
    assert len(mix) == 40
    assert mix.report.rows == 40
    for epoch in range(3):
        assert Counter(source for source, _ in seen(mix, epoch=epoch, shuffle=shuffle)) == {10: 10, 20: 30}


def test_each_source_is_used_up_before_it_repeats(tokenizer):
    mix = mixed_dataset(tokenizer, datasets=[numbered(10, 30), numbered(20, 10)], weights=[0.25, 0.75])
    epochs = [seen(mix, epoch=epoch) for epoch in range(3)]
    first = [pair for epoch in epochs for pair in epoch if pair[0] == 10]
    assert len(set(first)) == 30  # three epochs of ten: all thirty, once each
    second = [number for source, number in epochs[0] if source == 20]
    assert Counter(second) == dict.fromkeys(range(10), 3)
    assert sorted(second[:10]) == list(range(10))
    assert second[:10] != second[10:20]


def test_order_depends_on_seed_and_epoch_alone(tokenizer):
    def orders(seed, epoch):
        mix = mixed_dataset(tokenizer, datasets=[numbered(10, 20), numbered(20, 20)], weights=[1, 1])
        return seen(mix, seed=seed, epoch=epoch)

    assert orders(1, 0) == orders(1, 0)
    assert orders(1, 0) != orders(2, 0)
    assert orders(1, 0) != orders(1, 1)


def test_equal_sources_get_different_orders(tokenizer):
    mix = mixed_dataset(tokenizer, datasets=[numbered(10, 20), numbered(20, 20)], weights=[1, 1])
    pairs = seen(mix)
    assert [n for source, n in pairs if source == 10] != [n for source, n in pairs if source == 20]


def test_unshuffled_sources_are_evenly_spaced(tokenizer):
    mix = mixed_dataset(tokenizer, datasets=[numbered(10, 4), numbered(20, 4)], weights=[3, 1], epoch_length=8)
    pairs = seen(mix, shuffle=False)
    assert Counter(source for source, _ in pairs[:4]) == Counter(source for source, _ in pairs[4:]) == {10: 3, 20: 1}
    assert [number for source, number in pairs if source == 10] == [0, 1, 2, 3, 0, 1]
    one = mixed_dataset(tokenizer, datasets=[numbered(10, 4), numbered(20, 4)], weights=[4, 1], epoch_length=5)
    assert [source for source, _ in seen(one, shuffle=False)] == [10, 10, 20, 10, 10], "one alone is in the middle"


def test_a_mix_of_mixes(tokenizer):
    inner = mixed_dataset(tokenizer, datasets=[numbered(10, 8), numbered(20, 8)], weights=[1, 1], epoch_length=4)
    outer = mixed_dataset(tokenizer, datasets=[inner, numbered(30, 6)], weights=[2, 1], epoch_length=12)
    assert Counter(source for source, _ in seen(outer)) == {10: 4, 20: 4, 30: 4}


def test_loader_over_a_mix_seeks(tokenizer):
    mix = mixed_dataset(tokenizer, datasets=[numbered(10, 7), numbered(20, 6)], weights=[2, 1])
    plain = Loader(mix, batch_size=4, seed=3, pad_id=0)
    uninterrupted = [next(plain).tokens.tolist() for _ in range(10)]
    other = Loader(mix, batch_size=4, seed=3, pad_id=0)
    other.seek((1, 2))
    assert [next(other).tokens.tolist() for _ in range(4)] == uninterrupted[6:]


def test_builder_nodes_get_the_tokenizer(tokenizer, jsonl):
    first = {"_component_": "kdtune.data.instruct_dataset", "source": jsonl([{"input": "a", "output": "x"}] * 4)}
    second = {
        "_component_": "kdtune.data.instruct_dataset",
        "source": jsonl([{"input": "b", "output": "y"}] * 4, "2.jsonl"),
    }
    node = {"_component_": "kdtune.data.mixed_dataset", "datasets": [first, second], "weights": [3, 1]}
    assert bind(node, ["tokenizer"]) == []
    mix = instantiate(node, tokenizer=tokenizer)
    direct = mixed_dataset(tokenizer, datasets=[first, second], weights=[3, 1])
    expected = {tokenizer.words["a"]: 6, tokenizer.words["b"]: 2}
    for dataset in (mix, direct):
        assert Counter(int(e.tokens[2]) for e in dataset.examples(seed=0, epoch=0, shuffle=True)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1]}, "weights: 1 values for 2 datasets"),
        ({"weights": [1, -1]}, r"weights\[1\]=-1: must be a positive number"),
        ({"weights": [0.0, 1]}, r"weights\[0\]=0.0: must be a positive number"),
        ({"weights": [float("nan"), 1]}, r"weights\[0\]=nan"),
        ({"weights": [1e-9, 1]}, r"weights\[0\]: a share of 1e-09 of an epoch of 8 examples is no example"),
        ({"weights": [1, 1], "epoch_length": 0}, "epoch_length=0"),
        ({"weights": [], "datasets": []}, "datasets: the list is empty"),
    ],
)
def test_errors(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        mixed_dataset(tokenizer, **{"datasets": [numbered(10, 4), numbered(20, 4)], **settings})


@pytest.mark.parametrize("total", [1, 7, 10, 101])
def test_whole_shares_sum_up_and_are_off_by_less_than_one(total):
    shares = np.array([0.5, 0.3, 0.2])
    whole = whole_shares(shares, total)
    assert sum(whole) == total
    assert np.abs(np.array(whole) - shares * total).max() < 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_streams_end_with_the_first_that_runs_out(tokenizer, shuffle):
    mix = mixed_dataset(tokenizer, datasets=[stream(10, 300), stream(20, 60)], weights=[3, 1])
    assert isinstance(mix, MixedStream)
    pairs = seen(mix, shuffle=shuffle)
    counts = Counter(source for source, _ in pairs)
    assert counts[20] == 60
    assert counts[10] / counts[20] == pytest.approx(3, rel=0.02 if not shuffle else 0.3)
    assert len(set(pairs)) == len(pairs)
    assert pairs == seen(mix, shuffle=shuffle)
    assert mix.report.rows >= len(pairs)


def test_a_stream_and_a_dataset_in_memory_start_over_within_a_given_epoch_length(tokenizer):
    mix = mixed_dataset(tokenizer, datasets=[stream(10, 3), numbered(20, 5)], weights=[1, 1], epoch_length=20)
    pairs = seen(mix, shuffle=False)
    assert [number for source, number in pairs if source == 10] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert [number for source, number in pairs if source == 20] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert seen(mix, epoch=1) != seen(mix, epoch=0)
