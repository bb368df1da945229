"""Batches without padding, and a step's examples cut by their numbers of tokens."""

from dataclasses import replace

import pytest
import torch
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from kdtune.constants import IGNORE_INDEX
from kdtune.data import (
    Batch,
    DatasetStats,
    EncodedRow,
    Loader,
    RowStream,
    TokenizedDataset,
    batches,
    collate,
    make_example,
)
from kdtune.data.micro_batches import cut_by_tokens
from kdtune.data.rows import RowEncoder
from kdtune.errors import DataError
from kdtune.losses import Targets
from kdtune.training.steps import take_micro_batches

LENGTHS = [12, 2, 7, 5, 11, 3, 9, 4, 2, 2, 6]


def row(number):
    return EncodedRow([100 + number] * LENGTHS[number], [True] * LENGTHS[number])


def in_memory():
    return TokenizedDataset((row(number) for number in range(len(LENGTHS))), DatasetStats("numbers", len(LENGTHS)))


def stream():
    rows = IterableDataset.from_generator(lambda: ({"number": number} for number in range(len(LENGTHS))))
    return RowStream(rows, RowEncoder(lambda found: row(found["number"])), source="stream", shuffle_buffer=4)


def examples_of(batch):
    """Number of each example of a batch."""
    return [int(batch.tokens.flatten()[start]) - 100 for start in batch.row_starts] if batch.num_tokens else []


def test_rows_are_laid_end_to_end_with_their_targets():
    examples = [
        make_example([5, 6, 7], [False, True, True]),
        make_example([8, 9], [True] * 2),
        make_example([1] * 4, [True] * 4),
    ]
    padded = collate(examples, pad_id=0)
    batch = padded.without_padding()
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[6, 7, IGNORE_INDEX, 9, IGNORE_INDEX, 1, 1, 1, IGNORE_INDEX]]
    assert batch.inputs["documents"].lengths == batch.lengths == (3, 2, 4)
    assert (batch.num_tokens, batch.num_padded_tokens, padded.num_padded_tokens) == (9, 0, 3)
    assert torch.equal(batch.targets.labels_N, padded.targets.labels_N) and batch.row_starts == [0, 3, 5]
    assert batch.prompt_lengths == padded.prompt_lengths
    direct = collate(examples, pad_id=0, padding_free=True)
    assert torch.equal(direct.tokens, batch.tokens) and torch.equal(direct.labels, batch.labels)
    assert direct.inputs["documents"].lengths == direct.lengths and direct.prompt_lengths == padded.prompt_lengths
    assert torch.equal(direct.inputs["documents"].positions_T, batch.inputs["documents"].positions_T)
    assert direct.targets.shape == batch.targets.shape == (1, 9)
    on_meta = batch.to("meta")
    assert {one.device.type for one in (on_meta.tokens, on_meta.inputs["documents"].starts_N1)} == {"meta"}


def test_batches_that_only_their_dataset_understands_stay_as_they_are():
    batch = collate([make_example([1, 2], [True] * 2), make_example([3], [True])], 0)
    for other in (
        replace(batch, inputs={**batch.inputs, "pixel_values": torch.zeros(2, 1)}),
        collate([], 0),
        batch.without_padding(),
    ):
        assert other.without_padding() is other


def test_a_label_on_padding_is_refused():
    batch = Batch(
        {"tokens": torch.zeros(2, 3, dtype=torch.int64)},
        Targets.from_labels(torch.ones(2, 3, dtype=torch.int64)),
        (3, 2),
    )
    with pytest.raises(DataError, match=r"a label beyond the lengths of its rows, \[3, 2\]"):
        batch.without_padding()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60), st.integers(1, 4), st.booleans()
)  # fmt: skip
def test_cuts_keep_every_example_and_the_limit(lengths, limit, num_ranks, is_padded):
    parts = cut_by_tokens(lengths, limit, num_ranks=num_ranks, is_padded=is_padded)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert len(parts) % num_ranks == 0 and all(parts[:-num_ranks])
    tokens = [[lengths[index] for index in part] for part in parts if part]
    sizes = [len(part) * max(part) if is_padded else sum(part) for part in tokens]
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, tokens, strict=True))
    flat = [length for part in tokens for length in part]
    assert flat == sorted(lengths, reverse=True), "similar lengths are together"
    # Fewer rounds would not do: a greedy cut of the same order is the shortest.
    shortest, size, first = 1, 0, 0
    for number, length in enumerate(flat):
        grown = (number - first + 1) * flat[first] if is_padded else size + length
        if number and grown > limit:
            shortest, first, grown = shortest + 1, number, length
        size = grown
    assert len(parts) == -(-shortest // num_ranks) * num_ranks


def test_ranks_get_equal_work():
    lengths = [500] * 10
    assert [len(part) for part in cut_by_tokens(lengths, 4096, num_ranks=2)] == [5, 5]
    assert [len(part) for part in cut_by_tokens(lengths, 4096)] == [5, 5], "not 8 and 2"
    assert cut_by_tokens([7], 3, num_ranks=3) == [[0], [], []]


def steps(dataset, *, num_ranks=1, tokens=None, start=(0, 0), count=4, **settings):
    """The examples of each micro-batch of some steps, by rank, and the position after each step."""
    found = []
    loaders = [
        Loader(dataset(), batch_size=2, pad_id=0, seed=3, rank=rank, num_ranks=num_ranks, padding_free=True,
               tokens_per_micro_batch=tokens, batches_per_step=4 // num_ranks, **settings)
        for rank in range(num_ranks)
    ]  # fmt: skip
    for loader in loaders:
        loader.seek(start)
    for _ in range(count):
        taken = [take_micro_batches(loader, 4 // num_ranks) for loader in loaders]
        assert len({len(one) for one in taken}) == 1, "every rank has as many micro-batches"
        assert len({loader.position for loader in loaders}) == 1
        found.append(([[examples_of(batch) for batch in one] for one in taken], loaders[0].position))
    return found


def examples(found):
    return [sorted(number for rank in ranks for part in rank for number in part) for ranks, _ in found]


@pytest.mark.parametrize("dataset", [in_memory, stream])
@pytest.mark.parametrize(("num_ranks", "tokens"), [(1, 20), (2, 20), (4, 9), (2, 1), (1, 1000)])
def test_a_step_has_the_same_examples_however_it_is_cut(dataset, num_ranks, tokens):
    expected, found = steps(dataset), steps(dataset, num_ranks=num_ranks, tokens=tokens)
    assert examples(found) == examples(expected)
    assert [position for _, position in found] == [position for _, position in expected]
    for ranks, _ in found:
        sizes = [sum(LENGTHS[number] for number in part) for rank in ranks for part in rank if len(part) > 1]
        assert max(sizes, default=0) <= tokens


@pytest.mark.parametrize(("dataset", "num_workers"), [(in_memory, 0), (in_memory, 2), (stream, 0), (stream, 1)])
def test_the_steps_after_any_step_are_the_same_again(dataset, num_workers):
    whole = steps(dataset, tokens=20)
    for done, (_, position) in enumerate(whole[:3], 1):
        again = steps(dataset, tokens=20, start=position, count=4 - done, num_workers=num_workers)
        assert again == whole[done:]


def test_a_stream_is_read_no_further_than_the_step():
    read = []

    def rows():
        for number in range(len(LENGTHS)):
            read.append(number)
            yield {"number": number}

    dataset = RowStream(
        IterableDataset.from_generator(rows),
        RowEncoder(lambda found: row(found["number"])),
        source="s",
        shuffle_buffer=1,
    )
    loader = Loader(
        dataset, batch_size=2, pad_id=0, shuffle=False, padding_free=True, tokens_per_micro_batch=20, batches_per_step=2
    )
    next(loader)
    assert len(read) <= 4 + 1 + 1, "a step's, and the stream's own look ahead"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("padding_free", [False, True])
def test_validation_is_cut_too(num_ranks, padding_free):
    found = [
        list(
            batches(
                in_memory(), 8, 0, rank=rank, num_ranks=num_ranks, padding_free=padding_free, tokens_per_micro_batch=24
            )
        )
        for rank in range(num_ranks)
    ]
    assert len({len(one) for one in found}) == 1
    numbers = [int(token) - 100 for one in found for batch in one for token in batch.tokens.flatten().unique() if token]
    assert sorted(numbers) == list(range(len(LENGTHS)))
    assert max(batch.tokens.numel() for one in found for batch in one) <= 24
