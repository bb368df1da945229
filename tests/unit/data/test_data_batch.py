import torch

from kdtune.constants import IGNORE_INDEX as I
from kdtune.data import Batch, collate, make_example


def test_collate_pads_on_the_right_to_the_longest():
    batch = collate([make_example([1, 5, 3], [False, True, True]), make_example([1, 3], [False, True])], pad_id=3)
    assert batch.tokens.tolist() == [[1, 5, 3], [1, 3, 3]]
    assert batch.labels.tolist() == [[5, 3, I], [3, I, I]]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.num_tokens == 5  # padding is not counted, although the pad id occurs as a real token
    assert batch.num_valid_tokens() == 3
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert moved.num_tokens == 5


def test_a_batch_made_by_hand_has_no_padding():
    assert Batch(torch.ones(2, 3, dtype=torch.int64), torch.full((2, 3), I)).num_tokens == 6
