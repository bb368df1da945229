"""Updates in backward, against the same optimizer's step after it."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kdtune.models import Transformer, llama
from kdtune.training import Muon, clip_grad_norm_, get_linear_schedule_with_warmup, trainable_parameters
from kdtune.training.in_backward import is_in_backward, pop_grad_norm, step_in_backward

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "fused adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "muon": partial(Muon, lr=0.01),
}


def model() -> Transformer:
    torch.manual_seed(0)
    return llama(
        vocab_size=31, embed_dim=16, num_layers=2, num_heads=4, intermediate_dim=24, max_seq_len=32, tie_embeddings=True
    )


def trained(make: Callable[..., Any], in_backward: bool) -> tuple[Transformer, Any, list[float]]:
    """After four steps with a schedule: the model, the optimizer and the norms."""
    student, norms = model(), []
    optimizer = make(trainable_parameters(student))
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=5)
    if in_backward:
        step_in_backward(optimizer)
    for step in range(4):
        tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(step))
        (student(tokens).logsumexp(-1).sum() / 100).backward()
        if in_backward:
            assert all(parameter.grad is None for parameter in student.parameters())
        norm = clip_grad_norm_(student.parameters(), None)
        norms.append(float(pop_grad_norm(optimizer) if in_backward else norm))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    return student, optimizer, norms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_state_and_norms_are_the_same(name: str) -> None:
    (ours, one, norms), (theirs, other, expected) = (trained(OPTIMIZERS[name], how) for how in (True, False))
    assert is_in_backward(one) and not is_in_backward(other)
    assert norms == pytest.approx(expected, rel=1e-6) and min(norms) > 0
    for (label, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, wanted), label
        for key, value in other.state[wanted].items():
            assert torch.equal(one.state[found][key], value), (label, key)
    assert any(
        not torch.equal(found, wanted) for found, wanted in zip(ours.parameters(), model().parameters(), strict=True)
    )


def test_no_two_gradients_are_in_memory_together() -> None:
    student = model()
    optimizer = torch.optim.SGD(trainable_parameters(student), lr=0.1)
    most = 0

    def count(parameter: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(one.grad is not None for one in student.parameters()))

    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # runs before the update
    step_in_backward(optimizer)
    student(torch.arange(6)[None]).logsumexp(-1).sum().backward()
    assert most == 1


def test_model_and_optimizer_are_freed() -> None:
    student, optimizer, _ = trained(OPTIMIZERS["adamw"], in_backward=True)
    weight = weakref.ref(next(student.parameters()))
    del student, optimizer
    gc.collect()
    assert weight() is None
