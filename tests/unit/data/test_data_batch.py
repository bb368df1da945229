from dataclasses import dataclass, replace

import pytest
import torch

from kdtune.constants import IGNORE_INDEX as I
from kdtune.data import (
    Batch,
    DatasetStats,
    Example,
    Loader,
    MapDataset,
    TokenizedDataset,
    batches,
    collate,
    make_example,
    mixed_dataset,
)
from kdtune.errors import ConfigError
from kdtune.tokenizers import byte_tokenizer


def test_collate_pads_on_the_right_to_the_longest():
    batch = collate([make_example([1, 5, 3], [False, True, True]), make_example([1, 3], [False, True])], pad_id=3)
    assert batch.tokens.tolist() == [[1, 5, 3], [1, 3, 3]]
    assert batch.labels.tolist() == [[5, 3, I], [3, I, I]]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.num_tokens == 5  # padding is not counted, although the pad id occurs as a real token
    assert batch.num_valid_tokens == 3
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert moved.num_tokens == 5


def test_a_batch_made_by_hand_has_no_padding():
    assert Batch.from_labels(torch.ones(2, 3, dtype=torch.int64), torch.full((2, 3), I)).num_tokens == 6


def test_a_row_knows_its_example_and_where_its_answer_starts():
    rows = [
        replace(make_example([1, 5, 3, 2], [False, False, True, True]), index=7),
        make_example([1, 3], [False, False]),
    ]
    assert collate(rows[:1], pad_id=0).example_ids == (7,)
    batch = collate(rows, pad_id=0)
    assert batch.example_ids is None  # the second comes from a stream
    assert batch.prompt_lengths == (2, 2)
    assert [len(row.tokens[: row.prompt_length]) for row in rows] == [2, 2]


def test_loaders_number_the_examples_of_a_dataset_and_not_those_of_a_stream():
    encoded = [([1, 10 + i, 2], [False, True, True]) for i in range(5)]
    dataset = TokenizedDataset(encoded, DatasetStats("rows"))
    for num_workers in (0, 1):
        loader = Loader(dataset, batch_size=2, pad_id=0, shuffle=True, seed=3, num_workers=num_workers)
        for _ in range(3):
            batch = next(loader)
            assert [10 + index for index in batch.example_ids] == batch.tokens[:, 1].tolist()
    held_out = list(batches(dataset, 2, 0))
    assert [batch.example_ids for batch in held_out] == [(0, 1), (2, 3), (4,)]
    assert held_out[0].prompt_lengths == (1, 1)


@dataclass(frozen=True)
class Picture(Example):
    """A caption and its picture."""

    pixels: torch.Tensor | None = None


class Pictures(MapDataset):
    """Batches with pixel_values beside the tokens: a dataset's own, nothing of kdtune is changed."""

    def __init__(self, first: int = 0) -> None:
        self.report, self.first = DatasetStats("pictures"), first

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Picture:
        example = make_example([5 + index] * (2 + index), [True] * (2 + index))
        return Picture(**vars(example), pixels=torch.full((1, 4, 4), float(self.first + index)))

    def collate(self, examples, pad_id):
        batch = super().collate(examples, pad_id)
        pixels = [example.pixels for example in examples] or [torch.zeros(1, 4, 4)]
        return replace(batch, inputs={**batch.inputs, "pixel_values": torch.stack(pixels)})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_makes_its_own_batches(num_workers):
    loader = Loader(Pictures(), batch_size=2, shuffle=False, seed=0, pad_id=0, num_workers=num_workers)
    found = [next(loader) for _ in range(2)]
    assert [batch.inputs["pixel_values"][:, 0, 0, 0].tolist() for batch in found] == [[0.0, 1.0], [2.0]]
    assert [batch.example_ids for batch in found] == [(0, 1), (2,)]
    held_out = list(batches(Pictures(), 2, 0, rank=1, num_ranks=3))
    assert held_out[0].inputs["pixel_values"][:, 0, 0, 0].tolist() == [2.0]
    assert held_out[0].inputs["pixel_values"].shape == (1, 1, 4, 4)
    assert next(batches(Pictures(), 2, 0, rank=2, num_ranks=3)).num_valid_tokens == 0


def test_a_mix_makes_the_batches_of_its_datasets():
    mixed = mixed_dataset(byte_tokenizer(), datasets=[Pictures(), Pictures(10)], weights=[1, 1])
    pixels = [value for batch in batches(mixed, 2, 0) for value in batch.inputs["pixel_values"][:, 0, 0, 0].tolist()]
    assert sorted(pixels) == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
    text = TokenizedDataset([([1, 2], [False, True])], DatasetStats("text"))
    with pytest.raises(ConfigError, match=r"datasets: Pictures, TokenizedDataset make batches in different ways"):
        mixed_dataset(byte_tokenizer(), datasets=[Pictures(), text], weights=[1, 1])
