"""The fused path against float64 brute force: full logits of both models, log-softmax and autograd."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import TrainingError
from kdtune.losses import ForwardKLLoss, HiddenSignal, KDLoss, products
from kdtune.models import OutputHead

STUDENT_DIM, TEACHER_DIM = 6, 5


@dataclass
class Case:
    hidden: Tensor
    output: OutputHead
    signal: HiddenSignal
    labels: Tensor


def head(inputs: int, outputs: int, generator: torch.Generator, *, trainable: bool = True) -> OutputHead:
    linear = OutputHead(inputs, outputs).double()
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
    return linear.requires_grad_(trainable)


def make_case(
    batch: int, length: int, *, rows: int = 13, teacher_rows: int = 13, trainable: bool = True, seed: int = 0
) -> Case:
    """Random float64 inputs; about a third of the labels are ignored, and every row has its own length."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(min(rows, teacher_rows), (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.2] = IGNORE_INDEX
    for row in range(1, batch):
        labels[row, length - row :] = IGNORE_INDEX
    return Case(
        torch.randn(batch, length, STUDENT_DIM, generator=generator, dtype=torch.float64).requires_grad_(),
        head(STUDENT_DIM, rows, generator, trainable=trainable),
        HiddenSignal(
            torch.randn(batch, length, TEACHER_DIM, generator=generator, dtype=torch.float64),
            head(TEACHER_DIM, teacher_rows, generator),
        ),
        labels,
    )


def capped(output: OutputHead, logits: Tensor) -> Tensor:
    return logits if output.softcap is None else output.softcap * (logits / output.softcap).tanh()


def brute_force(case: Case, kd_ratio: float) -> tuple[Tensor, dict[str, float]]:
    """The loss and its parts from the definitions, in float64, on logits that exist."""
    valid = case.labels != IGNORE_INDEX
    weight, teacher_weight = case.output.weight.double(), case.signal.output.weight.detach().double()
    logits = capped(case.output, (case.hidden.double() @ weight.T)[valid])
    logq = logits - logits.exp().sum(-1, keepdim=True).log()
    ce = -logq[torch.arange(len(logq)), case.labels[valid]].sum()
    parts = {"class_loss": ce.item()}
    if kd_ratio == 0:
        return ce, parts
    shared = min(len(weight), len(teacher_weight))
    teacher_logits = capped(case.signal.output, (case.signal.hidden_BSD.double() @ teacher_weight.T)[valid][:, :shared])
    p = teacher_logits.exp() / teacher_logits.exp().sum(-1, keepdim=True)
    kd = (p * (p.log() - logq[:, :shared])).sum()
    agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    parts |= {"kd_loss": kd.item(), "agreement": float(agreement)}
    if len(weight) > shared:
        parts["student_mass_outside"] = logq[:, shared:].exp().sum().item()
    return (1 - kd_ratio) * ce + kd_ratio * kd, parts


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    """Gradients of hidden states and, if it is trainable, of the head, for a loss scaled as a recipe scales it."""
    inputs = [case.hidden, *([case.output.weight] if case.output.weight.requires_grad else [])]
    return list(torch.autograd.grad(loss / 7, inputs))


def assert_equals_brute_force(case: Case, kd_ratio: float, chunk_size: int | None) -> None:
    loss, parts = KDLoss(kd_ratio=kd_ratio, chunk_size=chunk_size)(case.hidden, case.output, case.signal, case.labels)
    expected, expected_parts = brute_force(case, kd_ratio)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected_parts, rel=1e-12, abs=1e-12)
    assert not any(part.requires_grad for part in parts.values())
    for found, wanted in zip(gradients(loss, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8, 16, None])
@pytest.mark.parametrize("kd_ratio", [0, 0.25, 0.5, 1])
def test_value_and_gradient(kd_ratio: float, chunk_size: int | None) -> None:
    for length, trainable in product(range(1, 18), (True, False)):
        assert_equals_brute_force(make_case(1, length, trainable=trainable, seed=length), kd_ratio, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, None])
@pytest.mark.parametrize("batch", [2, 4])
def test_ragged_rows(batch: int, chunk_size: int | None) -> None:
    assert_equals_brute_force(make_case(batch, 9), 0.5, chunk_size)


@pytest.mark.parametrize(("rows", "teacher_rows"), [(13, 11), (11, 13)])
@pytest.mark.parametrize("kd_ratio", [0, 0.5, 1])
def test_heads_of_different_height(rows: int, teacher_rows: int, kd_ratio: float) -> None:
    case = make_case(2, 7, rows=rows, teacher_rows=teacher_rows)
    assert_equals_brute_force(case, kd_ratio, 3)


@pytest.mark.parametrize(("rows", "teacher_rows"), [(13, 13), (13, 11), (11, 13)])
@pytest.mark.parametrize(("cap", "teacher_cap"), [(1.5, None), (None, 1.5), (0.7, 30.0)])
@pytest.mark.parametrize("kd_ratio", [0, 0.5, 1])
def test_soft_capped_logits(
    rows: int, teacher_rows: int, cap: float | None, teacher_cap: float | None, kd_ratio: float
) -> None:
    case = make_case(2, 7, rows=rows, teacher_rows=teacher_rows)
    case.output.softcap, case.signal.output.softcap = cap, teacher_cap
    assert_equals_brute_force(case, kd_ratio, 3)
    torch.testing.assert_close(case.output(case.hidden), capped(case.output, case.hidden @ case.output.weight.T))


def test_a_plain_linear_is_a_head_without_a_cap() -> None:
    case = make_case(2, 7)
    plain = nn.Linear(STUDENT_DIM, 13, bias=False, dtype=torch.float64)
    plain.weight = case.output.weight
    found, expected = (KDLoss()(case.hidden, head, case.signal, case.labels)[0] for head in (plain, case.output))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block_rows", [1, 2, 3])
def test_blocks_of_a_chunk(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_BLOCK_BYTES", block_rows * 13 * 8)
    assert_equals_brute_force(make_case(2, 9), 0.5, 5)


@pytest.mark.parametrize("tile_rows", [1, 4, 13])
def test_tiles_of_the_head(tile_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 weights a head is raised by tiles; with float64 hidden states the rest stays exact."""
    monkeypatch.setattr(products, "TILE_BYTES", tile_rows * STUDENT_DIM * 8)
    case = make_case(2, 9, rows=13, teacher_rows=12)
    for linear in (case.output, case.signal.output):
        linear.bfloat16()
    loss, _ = KDLoss(chunk_size=5)(case.hidden, case.output, case.signal, case.labels)
    expected, _ = brute_force(case, 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (grad, grad_weight), (wanted, wanted_weight) = gradients(loss, case), gradients(expected, case)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)
    assert grad_weight.dtype == torch.bfloat16
    torch.testing.assert_close(grad_weight, wanted_weight)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)],
)
def test_student_and_teacher_of_different_dtypes(dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    case = make_case(2, 9)
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    signal = HiddenSignal(case.signal.hidden_BSD.to(teacher_dtype), case.signal.output.to(teacher_dtype))
    case = Case(hidden, case.output.to(dtype), signal, case.labels)
    loss, _ = KDLoss(chunk_size=5)(case.hidden, case.output, case.signal, case.labels)
    expected, _ = brute_force(case, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, wanted in zip(gradients(loss, case), gradients(expected, case), strict=True):
        assert found.dtype == dtype
        # In bf16 the gradient of the logits is rounded too, so that a sum near 0 has no relative precision.
        torch.testing.assert_close(found, wanted, atol=1e-3 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_all_ignored() -> None:
    case = make_case(2, 5)
    case.labels.fill_(IGNORE_INDEX)
    loss, parts = KDLoss()(case.hidden, case.output, case.signal, case.labels)
    assert loss.item() == 0.0
    assert {name: part.item() for name, part in parts.items()} == {"class_loss": 0, "kd_loss": 0, "agreement": 0}
    for grad, tensor in zip(gradients(loss, case), (case.hidden, case.output.weight), strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(tensor))


def test_one_valid_token() -> None:
    case = make_case(3, 5)
    case.labels.fill_(IGNORE_INDEX)
    case.labels[1, 2] = 4
    assert_equals_brute_force(case, 0.5, 2)


def test_cross_entropy_needs_no_teacher() -> None:
    case = make_case(2, 5)
    loss, parts = KDLoss(kd_ratio=0)(case.hidden, case.output, None, case.labels)
    torch.testing.assert_close(loss, brute_force(case, 0)[0])
    assert list(parts) == ["class_loss"]


def test_the_teacher_is_a_constant() -> None:
    case = make_case(2, 5)
    case.signal.hidden_BSD.requires_grad_()
    KDLoss()(case.hidden, case.output, case.signal, case.labels)[0].backward()
    assert case.signal.hidden_BSD.grad is None
    assert case.signal.output.weight.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_value_is_the_same(mode: Any) -> None:
    case = make_case(2, 5)
    expected, expected_parts = brute_force(case, 0.5)
    with mode():
        loss, parts = KDLoss()(case.hidden, case.output, case.signal, case.labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert parts["kd_loss"].item() == pytest.approx(expected_parts["kd_loss"], rel=1e-12)


def test_a_frozen_student_with_a_trainable_head() -> None:
    case = make_case(2, 5)
    case.hidden.requires_grad_(False)
    loss, _ = KDLoss()(case.hidden, case.output, case.signal, case.labels)
    (grad,) = torch.autograd.grad(loss, case.output.weight)
    (expected,) = torch.autograd.grad(brute_force(case, 0.5)[0], case.output.weight)
    torch.testing.assert_close(grad, expected)


def test_tied_head() -> None:
    """A weight that is also the embedding gets both of its gradients."""
    case = make_case(2, 5)
    embedding = nn.Embedding(13, STUDENT_DIM).double()
    embedding.weight = case.output.weight
    tokens = torch.arange(10).view(2, 5)

    def grad(loss_of: Any) -> Tensor:
        case.hidden = embedding(tokens).tanh()
        return torch.autograd.grad(loss_of(), embedding.weight)[0]

    fused = grad(lambda: KDLoss(chunk_size=3)(case.hidden, case.output, case.signal, case.labels)[0])
    torch.testing.assert_close(fused, grad(lambda: brute_force(case, 0.5)[0]))


def test_gradcheck() -> None:
    case = make_case(2, 4, trainable=False)
    loss_fn = KDLoss(kd_ratio=0.3, chunk_size=3)
    assert torch.autograd.gradcheck(lambda h: loss_fn(h, case.output, case.signal, case.labels)[0], case.hidden)


def test_gradient_of_the_head_is_the_slope() -> None:
    """Central differences in random directions: gradcheck would go twice through one graph, which is refused."""
    case = make_case(2, 4)
    loss_fn = KDLoss(kd_ratio=0.3, chunk_size=3)
    loss, _ = loss_fn(case.hidden, case.output, case.signal, case.labels)
    (grad,) = torch.autograd.grad(loss, case.output.weight)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step = 1e-5 * torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1, 0):
            with torch.no_grad():
                case.output.weight += sign * step if sign else step
                values.append(loss_fn(case.hidden, case.output, case.signal, case.labels)[0].item())
                case.output.weight -= sign * step if sign else step
        assert values[0] - values[1] == pytest.approx(2 * (grad * step).sum().item(), rel=1e-6)


def test_second_derivatives_and_a_second_backward_are_refused() -> None:
    case = make_case(2, 4)
    loss, _ = KDLoss()(case.hidden, case.output, case.signal, case.labels)
    with pytest.raises(TrainingError, match="no second derivative"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)
    torch.autograd.grad(loss, case.hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, case.hidden)


class ReverseKL:
    """A divergence that kdtune does not define here: KL(student || teacher)."""

    @staticmethod
    def divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        return (student_logp_NV.exp() * (student_logp_NV - teacher_logp_NV)).sum(-1)


class MeanSquares:
    """Neither a divergence nor normalized: its gradient with respect to log-probabilities has any sum."""

    @staticmethod
    def divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        return (student_logp_NV - teacher_logp_NV).square().mean(-1)


@pytest.mark.parametrize("kd_loss", [ReverseKL(), MeanSquares(), ForwardKLLoss()])
def test_any_divergence(kd_loss: Any) -> None:
    case = make_case(2, 6)
    loss, parts = KDLoss(kd_loss, kd_ratio=0.6, chunk_size=4)(case.hidden, case.output, case.signal, case.labels)
    valid = case.labels != IGNORE_INDEX
    logp = (case.hidden @ case.output.weight.T)[valid].log_softmax(-1)
    teacher_logp = (case.signal.hidden_BSD @ case.signal.output.weight.detach().T)[valid].log_softmax(-1)
    kd = kd_loss.divergence(logp, teacher_logp).sum()
    expected = 0.6 * kd + 0.4 * nn.functional.nll_loss(logp, case.labels[valid], reduction="sum")
    torch.testing.assert_close(parts["kd_loss"], kd.detach())
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(loss, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kd_ratio", [0, 0.5, 1])
def test_bf16_is_summed_in_fp32(kd_ratio: float) -> None:
    """From bf16 inputs: fp32 values, and gradients whose only error is their own rounding to bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 4, 32, 64, generator=generator).bfloat16()
    output, teacher_output = (head(64, 2000, generator).bfloat16() for _ in range(2))
    labels = torch.randint(2000, (4, 32), generator=generator)
    case = Case(hidden.requires_grad_(), output, HiddenSignal(teacher_hidden, teacher_output), labels)
    loss, parts = KDLoss(kd_ratio=kd_ratio, chunk_size=50)(hidden, output, case.signal, labels)
    expected, expected_parts = brute_force(case, kd_ratio)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["class_loss"].item() == pytest.approx(expected_parts["class_loss"], rel=1e-5)
    exact = [g.double() for g in torch.autograd.grad(expected, (hidden, output.weight))]
    for found, wanted in zip(torch.autograd.grad(loss, (hidden, output.weight)), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 0.005 * wanted.norm()


class LargestResult(TorchDispatchMode):
    """Remembers the largest number of bytes that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [True, False])
def test_no_logits_beyond_a_chunk(dtype: torch.dtype, trainable: bool) -> None:
    rows, chunk_size = 1000, 8
    sizes = []
    for length in (64, 128):
        case = make_case(1, length, rows=rows, teacher_rows=rows, trainable=trainable)
        hidden = case.hidden.detach().to(dtype).requires_grad_()
        signal = HiddenSignal(case.signal.hidden_BSD.to(dtype), case.signal.output.to(dtype))
        with LargestResult() as largest:
            loss, _ = KDLoss(chunk_size=chunk_size)(hidden, case.output.to(dtype), signal, case.labels)
            loss.backward()
        sizes.append(largest.num_bytes)
    assert sizes == [chunk_size * rows * torch.float32.itemsize] * 2


def test_a_device_that_takes_blocks_whole_may_have_no_rows() -> None:
    """With a head in shards a process may have none of a short chunk's rows; its blocks are none, not a division by zero."""
    empty_CV = torch.empty(0, 5, device="meta")
    assert list(products.slices(len(empty_CV), products.block_size(empty_CV))) == []
