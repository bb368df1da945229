"""A compiled training step at lengths that change from step to step."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from kdtune import losses, models, teachers
from kdtune.data import Batch, collate, make_example
from kdtune.parallel import build_model


def built(num_layers: int, **options: Any) -> models.Transformer:
    def builder() -> models.Transformer:
        return models.llama(
            vocab_size=300, embed_dim=32, num_layers=num_layers, num_heads=4, num_kv_heads=2, intermediate_dim=64, max_seq_len=128
        )  # fmt: skip

    return build_model(builder, None, dtype=torch.float32, compile=True, **options)


def batch_of(lengths: list[int], *, is_padded: bool) -> Batch:
    draw = torch.Generator().manual_seed(sum(lengths))
    examples = [
        make_example(torch.randint(300, (length,), generator=draw).numpy(), [True] * length) for length in lengths
    ]
    return collate(examples, 0, padding_free=not is_padded)


@pytest.mark.slow("torch's compiler makes and builds C++ code for student, teacher and loss, forward and backward")
@pytest.mark.parametrize("is_padded", [False, True])
def test_nothing_is_compiled_again_after_the_first_steps(is_padded: bool) -> None:
    """torch raises in place of compiling again; its count of graphs stays. (Of padded rows, one alone has code of its own.)"""
    torch._dynamo.reset()
    student, teacher = built(2), teachers.OnlineTeacher(built(3, trainable=False))
    kd_loss = losses.KDLoss(compile=True)

    def step(lengths: list[int]) -> None:
        batch = batch_of(lengths, is_padded=is_padded)
        hidden = student(**batch.inputs, return_hidden=True)
        loss, _ = kd_loss(hidden, student.output, teacher(batch), batch.targets)
        loss.backward()

    for lengths in ([7, 19, 30], [25, 11]):
        step(lengths)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([40, 3, 17, 28], [64, 64], [5, 6, 7, 8, 9, 10], *([] if is_padded else [[9], [100]])):
            step(lengths)
    assert counters["stats"]["unique_graphs"] == num_graphs
