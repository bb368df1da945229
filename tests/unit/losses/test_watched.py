"""What watched targets add to the loss's parts, against whole logits in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kdtune.losses import (
    DenseSignal,
    ForwardKL,
    HiddenSignal,
    KDLoss,
    SampledReverseKL,
    Targets,
    TextSignal,
    TopKSignal,
    TopKTargets,
)
from kdtune.models import OutputHead

T, D = 40, 6
POSITIONS, WATCHED = torch.arange(3, 40, 2), torch.tensor([0, 3, 4, 11, 18])


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(vocab_size: int, seed: int, softcap: float | None = None) -> OutputHead:
    made = OutputHead(D, vocab_size, softcap=softcap).double()
    with torch.no_grad():
        made.weight.copy_(numbers(vocab_size, D, seed=seed))
    return made


def targets(labels_N: Tensor, watched_M: Tensor | None = WATCHED, **more: Any) -> Targets:
    return Targets(
        POSITIONS, labels_N, (2, T // 2), (int(labels_N.min()), int(labels_N.max())), watched_M=watched_M, **more
    )


def by_hand(student_TV: Tensor, teacher_TV: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """The sums of log q - log p, and of the shares of the 16 most likely ids that both have, row by row."""
    width = min(student_TV.shape[1], teacher_TV.shape[1])
    q_TV, p_TV = student_TV.log_softmax(-1), teacher_TV[:, : student_TV.shape[1]].log_softmax(-1)
    log_ratio = sum((q_TV[at, label] - p_TV[at, label]).item() for at, label in zip(POSITIONS, labels_N, strict=True))
    overlap, count = 0.0, min(16, width, student_TV.shape[1])
    for at in POSITIONS[WATCHED]:
        first, second = (set(row.sort(descending=True).indices[:count].tolist()) for row in (q_TV[at], p_TV[at]))
        overlap += len(first & second) / count
    return log_ratio, overlap


@pytest.mark.parametrize(
    ("vocab_size", "teacher_vocab_size", "softcap"), [(60, 60, None), (60, 50, 2.0), (50, 60, None), (9, 9, None)]
)
@pytest.mark.parametrize("kind", ["hidden", "dense", "text loss", "sparse targets"])
def test_they_are_those_of_whole_logits(
    kind: str, vocab_size: int, teacher_vocab_size: int, softcap: float | None
) -> None:
    ours, theirs = head(vocab_size, 1, softcap), head(teacher_vocab_size, 2)
    hidden_BSD, teacher_BSD = numbers(2, T // 2, D, seed=3).requires_grad_(), numbers(2, T // 2, D, seed=4)
    labels_N = torch.randint(
        min(vocab_size, teacher_vocab_size), POSITIONS.shape, generator=torch.Generator().manual_seed(5)
    )
    student_TV, teacher_TV = ours(hidden_BSD).detach().flatten(0, 1), theirs(teacher_BSD).detach().flatten(0, 1)
    expected = by_hand(student_TV, teacher_TV, labels_N)
    signal = DenseSignal(teacher_TV.view(2, T // 2, -1)) if kind == "dense" else HiddenSignal(teacher_BSD, theirs)
    divergence: Any = SampledReverseKL() if kind == "text loss" else ForwardKL()
    if kind == "text loss" and vocab_size < teacher_vocab_size:
        return  # each model's probabilities are those over its own ids there
    kept = TopKTargets(3) if kind == "sparse targets" else None
    loss_fn = KDLoss(divergence, kd_ratio=0.5, chunk_size=7, teacher_targets=kept)
    weights = {"weights_N": numbers(len(labels_N), seed=6).abs(), "class_weights_N": torch.zeros(len(labels_N))}
    total, parts = loss_fn(hidden_BSD, ours, signal, targets(labels_N, **weights))
    assert parts["log_ratio"].item() == pytest.approx(expected[0], rel=1e-12)
    assert parts["overlap"].item() == pytest.approx(expected[1], rel=1e-6)
    assert not parts["log_ratio"].requires_grad
    plain, others = loss_fn(hidden_BSD, ours, signal, targets(labels_N, None, **weights))
    assert total.item() == plain.item()
    assert parts.keys() - others.keys() == {"log_ratio", "overlap"}
    first, second = (torch.autograd.grad(one, hidden_BSD)[0] for one in (total, plain))
    assert torch.equal(first, second)


def test_what_a_teacher_does_not_know_is_left_out() -> None:
    ours, hidden_BSD, labels_N = head(20, 1), numbers(2, T // 2, D, seed=3), torch.arange(len(POSITIONS))
    ids_BSK = torch.arange(4).expand(2, T // 2, 4)
    sparse = TopKSignal(ids_BSK, numbers(2, T // 2, 4, seed=4).log_softmax(-1) - 1, 20, outside="tail")
    _, parts = KDLoss()(hidden_BSD, ours, sparse, targets(labels_N))
    assert not {"log_ratio", "overlap"} & parts.keys()
    text = TextSignal(-numbers(2, T // 2, seed=5).abs(), 20)
    _, parts = KDLoss(SampledReverseKL())(hidden_BSD, ours, text, targets(labels_N))
    assert "log_ratio" in parts and "overlap" not in parts
    _, parts = KDLoss(kd_ratio=0.0)(hidden_BSD, ours, None, targets(labels_N))
    assert parts.keys() == {"class_loss"}


def test_a_micro_batch_without_a_text_has_the_same_parts() -> None:
    ours, theirs, nothing = head(20, 1), head(20, 2), torch.zeros(0, dtype=torch.int64)
    hidden_BSD = numbers(1, 1, D, seed=3)
    empty = Targets(nothing, nothing, (1, 1), (0, -1), watched_M=nothing)
    for divergence in (ForwardKL(), SampledReverseKL()):
        _, parts = KDLoss(divergence)(hidden_BSD, ours, HiddenSignal(hidden_BSD, theirs), empty)
        assert parts["log_ratio"].item() == parts["overlap"].item() == 0.0
