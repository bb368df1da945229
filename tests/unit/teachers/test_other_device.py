"""A teacher on another device than the student: one without values ("meta"), or the CPU."""

import pytest
import torch

from kdtune.data import Batch
from kdtune.losses import KDLoss
from kdtune.models import Transformer, llama
from kdtune.models.quantization import linear_quantizer, target_linears
from kdtune.teachers import OnlineTeacher, other_device
from kdtune.teachers.other_device import OtherDeviceTeacher

CPU, META = torch.device("cpu"), torch.device("meta")
TOKENS = [torch.tensor([[1, 2, 3], [4, 5, 6]]) + step for step in range(3)]
BATCHES = [Batch.from_labels(tokens, tokens.roll(-1, 1)).without_padding() for tokens in TOKENS]


def model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return llama(vocab_size=16, embed_dim=64, num_layers=2, num_heads=2, intermediate_dim=64, max_seq_len=16)


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are moved from the device without values to the CPU, where they are zeros."""
    shapes: list[tuple[int, ...]] = []

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return torch.zeros(tensor.shape)

    monkeypatch.setattr(other_device, "mover", lambda _: moved)
    return shapes


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
def test_only_the_head_and_hidden_states_come_from_its_device(
    scheme: str | None, crossings: list[tuple[int, ...]]
) -> None:
    source = model().to(META)
    if scheme:
        for name, linear in target_linears(source).items():
            linear_quantizer(scheme)(name, linear)
    student, teacher = model(seed=1), OtherDeviceTeacher(source, layers=(1,), device=CPU)
    teacher.prefetch(BATCHES)
    for batch in BATCHES:
        signal = teacher(batch)
        hidden = student(**batch.inputs, return_hidden=True)
        loss, _ = KDLoss(kd_ratio=1.0)(hidden, student.output, signal, batch.targets)
        assert loss.device == CPU
    assert {one.device for one in teacher.model.parameters()} == {META}
    assert crossings == [(16, 64), *[(1, 6, 64)] * 6]


def test_an_accelerator_begins_the_next_batch_when_this_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, crossings: list[tuple[int, ...]]
) -> None:
    teacher = OtherDeviceTeacher(model().to(META), device=CPU)
    begun = count_forwards(teacher.model, monkeypatch)
    teacher.prefetch(BATCHES)
    signals, numbers = [], [len(begun)]
    for batch in BATCHES:
        signals.append(teacher(batch))
        numbers.append(len(begun))
    assert numbers == [0, 2, 3, 3]
    for signal in signals:
        signal.result()
    assert len(begun) == 3
    teacher(BATCHES[0])  # not announced
    assert len(begun) == 4


def test_a_cpu_begins_a_batch_when_the_loss_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the student's forward is queued on its device, which computes beside the CPU."""
    teacher = OtherDeviceTeacher(model(), device=CPU)
    begun = count_forwards(teacher.model, monkeypatch)
    teacher.prefetch(BATCHES)
    signals = [teacher(batch) for batch in BATCHES]
    assert begun == []
    for number, signal in enumerate(signals, 1):
        assert signal.shape == signal.result().shape == (1, 6) and signal.vocab_size == 16
        assert len(begun) == number


def count_forwards(teacher: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    begun: list[object] = []
    forward = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda *args, **kwargs: (begun.append(args), forward(*args, **kwargs))[1])
    return begun


def test_its_signals_are_those_of_a_teacher_on_the_students_device() -> None:
    plain, other = OnlineTeacher(model(), layers=(1, 2)), OtherDeviceTeacher(model(), layers=(1, 2), device=CPU)
    other.prefetch(BATCHES)
    for batch in BATCHES:
        expected, found = plain(batch), other(batch).result()
        for ours, theirs in zip(
            (found.hidden_BSD, *found.layers), (expected.hidden_BSD, *expected.layers), strict=True
        ):
            assert torch.equal(ours, theirs) and not ours.requires_grad
        positions = torch.arange(6)
        assert torch.equal(found.log_probs(positions), expected.log_probs(positions))
    assert other.generate([1, 2], max_new_tokens=4, stop_ids=[]) == plain.generate(
        [1, 2], max_new_tokens=4, stop_ids=[]
    )
