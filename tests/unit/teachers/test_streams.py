"""The teacher on a stream of its own: the order in which streams wait, from the recipe's own step, and the loss."""

import sys

import pytest
import torch

from kdtune import _assets
from kdtune.config.recipe import import_recipe
from kdtune.data import Batch
from kdtune.losses import KDLoss
from kdtune.models import Transformer, llama
from kdtune.teachers import OnlineTeacher

TOKENS = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])
BATCH = Batch.from_labels(TOKENS, TOKENS.roll(-1, 1)).without_padding()


def model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return llama(vocab_size=16, embed_dim=16, num_layers=2, num_heads=2, intermediate_dim=32, max_seq_len=16)


def step_of(teacher: OnlineTeacher, student: Transformer) -> torch.Tensor:
    """The recipe's step."""
    recipe = sys.modules[import_recipe(_assets.find_recipe("knowledge_distillation")).__module__]
    loss, _ = recipe.kd_step(student, teacher, KDLoss(kd_ratio=0.5), BATCH)
    return loss


def test_the_loss_waits_for_the_teacher_and_the_students_forward_does_not(
    stream_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = OnlineTeacher(model(1), overlaps=True), model(0)
    for name, one in (("teacher", teacher.model), ("student", student)):
        monkeypatch.setattr(one.norm, "forward", lambda x, f=one.norm.forward, n=name: (stream_log.append(n), f(x))[1])
    loss = step_of(teacher, student)
    assert stream_log == [
        "main: event 1", "side: wait for main 1",  # for the tokens
        "side: enter", "teacher", "side: exit", "side: event 1",
        "student",
        "main: wait for side 1", "tensor kept for main",
    ]  # fmt: skip
    assert torch.equal(loss, step_of(OnlineTeacher(model(1)), model(0)))


def test_a_signal_that_is_read_twice_is_computed_once(stream_log: list[str]) -> None:
    teacher = OnlineTeacher(model(1), overlaps=True)
    signal = teacher(BATCH)
    assert signal.shape == (1, 8) and signal.vocab_size == 16
    positions = torch.arange(8)
    expected = OnlineTeacher(model(1))(BATCH).log_probs(positions)
    assert torch.equal(signal.log_probs(positions), expected) and torch.equal(signal.log_probs(positions), expected)
    assert stream_log.count("side: enter") == 1


def test_a_cpu_has_no_streams() -> None:
    teacher = OnlineTeacher(model(1), overlaps=True)
    assert torch.equal(step_of(teacher, model(0)), step_of(OnlineTeacher(model(1)), model(0)))
