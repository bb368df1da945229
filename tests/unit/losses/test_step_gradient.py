"""The gradient of an optimizer step does not depend on how the step is cut into micro-batches (float64, SGD)."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kdtune.constants import IGNORE_INDEX
from kdtune.losses import CrossEntropyLoss, ForwardKLLoss, HiddenSignal, KDLoss
from kdtune.models import Transformer, llama

VOCAB_SIZE = 50
TOLERANCE = 1e-10


def tiny(seed: int, *, embed_dim: int, tie_embeddings: bool) -> Transformer:
    torch.manual_seed(seed)
    model = llama(
        vocab_size=VOCAB_SIZE,
        embed_dim=embed_dim,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=24,
        max_seq_len=32,
        tie_embeddings=tie_embeddings,
    ).double()
    for parameter in model.parameters():  # large enough for the models to differ clearly
        nn.init.normal_(parameter, std=0.3)
    return model


LENGTHS = (12, 2, 7, 5, 11, 3, 9, 4)


def ragged_rows() -> tuple[Tensor, Tensor]:
    """Tokens and labels of eight right-padded rows; a third of each row's targets is ignored, and all of one row's."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(VOCAB_SIZE, (2, 8, 12), generator=generator)
    labels[torch.rand(8, 12, generator=generator) < 0.3] = IGNORE_INDEX
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = IGNORE_INDEX
    labels[5] = IGNORE_INDEX
    return tokens, labels


def step(student: Transformer, teacher: Transformer, num_micro_batches: int) -> dict[str, Tensor]:
    """The student's weights after one step as a recipe takes it.

    Every micro-batch is padded to its own longest row; its sum is divided by the valid tokens of the whole step.
    """
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    tokens, labels = ragged_rows()
    num_tokens = (labels != IGNORE_INDEX).sum()
    loss_fn = KDLoss(kd_ratio=0.75, chunk_size=5)
    size = len(LENGTHS) // num_micro_batches
    for start in range(0, len(LENGTHS), size):
        rows, longest = slice(start, start + size), max(LENGTHS[start : start + size])
        with torch.no_grad():
            signal = HiddenSignal(teacher(tokens[rows, :longest], return_hidden=True), teacher.output)
        hidden = student(tokens[rows, :longest], return_hidden=True)
        loss, _ = loss_fn(hidden, student.output, signal, labels[rows, :longest])
        (loss / num_tokens).backward()
    optimizer.step()
    return dict(student.named_parameters())


def step_on_plain_logits(student: Transformer, teacher: Transformer) -> dict[str, Tensor]:
    """The weights after the same step on the whole batch, from the plain-logit losses."""
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    tokens, labels = ragged_rows()
    logits = student(tokens)
    (0.25 * CrossEntropyLoss()(logits, labels) + 0.75 * ForwardKLLoss()(logits, teacher(tokens), labels)).backward()
    optimizer.step()
    return dict(student.named_parameters())


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 8])
def test_a_step_is_the_same_however_it_is_cut(num_micro_batches: int, tie_embeddings: bool) -> None:
    student = tiny(0, embed_dim=16, tie_embeddings=tie_embeddings)
    teacher = tiny(1, embed_dim=32, tie_embeddings=False)
    before = dict(student.named_parameters())
    expected = step_on_plain_logits(student, teacher)
    found = step(student, teacher, num_micro_batches)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = (weight - before[name]).norm()
        assert moved > 1e-3, name
        assert (found[name] - weight).norm() < TOLERANCE * moved, name
