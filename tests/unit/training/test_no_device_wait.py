"""A whole training step without an operation whose result the host has to wait for.

FakeTensorMode computes shapes and no values: it raises where the host asks for one (`.item()`, `nonzero`, indexing by a mask,
`if tensor:`). On a GPU each of these would stall the host until the device has caught up.
"""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from kdtune import data, losses, models, teachers, training
from kdtune.models import Transformer


def llama(**kwargs: int) -> Transformer:
    return models.llama(
        vocab_size=32,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=24,
        max_seq_len=64,
        **kwargs,
    )


def lora(model: Transformer, *, use_dora: bool = False) -> Transformer:
    return models.apply_lora(model, lora_rank=4, lora_alpha=8, lora_dropout=0.1, use_dora=use_dora)


STUDENTS: dict[str, Callable[[Transformer], Transformer]] = {
    "full": lambda model: model,
    "LoRA": lora,
    "DoRA": lambda model: lora(model, use_dora=True),
}


def micro_batches() -> list[data.Batch]:
    """Two ragged batches, collated on the CPU as the loader does: before the mode is entered."""
    rows = [([1, 5, 9, 2], [False, False, True, True]), ([1, 7, 2], [False, True, True]), ([3, 2], [False, True])]
    examples = [data.make_example(ids, trained) for ids, trained in rows]
    return [data.collate(examples[:2], pad_id=0), data.collate(examples[2:], pad_id=0)]


def fake(batch: data.Batch, mode: FakeTensorMode) -> data.Batch:
    targets = losses.Targets(
        mode.from_tensor(batch.targets.positions_N),
        mode.from_tensor(batch.targets.labels_N),
        batch.targets.shape,
        batch.targets.id_range,
    )
    return data.Batch({name: mode.from_tensor(one) for name, one in batch.inputs.items()}, targets, batch.lengths)


def step(student: Transformer, teacher: Transformer, batches: list[data.Batch], num_valid_tokens: int) -> torch.Tensor:
    """One optimizer step, as the KD recipe makes it."""
    ask = teachers.OnlineTeacher(teacher)
    kd_loss = losses.KDLoss(kd_ratio=0.5, chunk_size=2)
    # The fused optimizer keeps its step count with the parameters; the others' is on the CPU, where reading it costs nothing.
    optimizer = torch.optim.AdamW(training.trainable_parameters(student), lr=1e-3, fused=True)
    metrics = training.Metrics()
    for batch in batches:
        hidden_BSD = student(**batch.inputs, return_hidden=True)
        loss, parts = kd_loss(hidden_BSD, student.output, ask(batch), batch.targets)
        (loss / num_valid_tokens).backward()
        metrics.add({"loss": loss, **parts}, batch)
    grad_norm = training.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_a_step_never_asks_for_a_value(kind: str, dtype: torch.dtype) -> None:
    batches = micro_batches()
    num_valid_tokens = sum(batch.num_valid_tokens for batch in batches)
    assert num_valid_tokens == 5
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode() as mode:
            student = STUDENTS[kind](llama()).train()
            grad_norm = step(student, llama(), [fake(batch, mode) for batch in batches], num_valid_tokens)
    finally:
        torch.set_default_dtype(before)
    assert grad_norm.shape == ()


@pytest.mark.parametrize("ask", [torch.Tensor.item, torch.nonzero, lambda values: values[values > 0], bool])
def test_the_mode_raises_where_a_value_is_asked_for(ask: Callable[[torch.Tensor], object]) -> None:
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        ask(torch.ones(1))


def test_labels_that_are_searched_on_the_device_are_found() -> None:
    """What the recipes do not do: the loss with a [B, S] tensor of labels."""
    collated, _ = micro_batches()
    with FakeTensorMode() as mode:
        batch, model = fake(collated, mode), llama()
        hidden_BSD = model(**batch.inputs, return_hidden=True)
        with pytest.raises(DynamicOutputShapeException):
            losses.KDLoss(kd_ratio=0)(hidden_BSD, model.output, None, torch.zeros(2, 4, dtype=torch.int64))
