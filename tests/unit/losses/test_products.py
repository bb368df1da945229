"""The ways to multiply bf16 hidden states with a bf16 head, against float64."""

import os

import pytest
import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.losses import HiddenSignal, KDLoss, products
from kdtune.losses.divergences.base import first_id, most_likely
from kdtune.losses.heads import Projection
from kdtune.models import OutputHead

has_bf16_units = pytest.mark.skipif(not products.cpu_multiplies_bf16(), reason="this CPU has no bf16 units")


def batch(
    num_tokens: int, num_ids: int, *, dim: int = 48, seed: int = 0
) -> tuple[Tensor, OutputHead, HiddenSignal, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher_hidden = (torch.randn(1, num_tokens, d, generator=generator).bfloat16() for d in (dim, 2 * dim))
    heads = [OutputHead(d, num_ids).bfloat16() for d in (dim, 2 * dim)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.4, generator=generator)
    labels = torch.randint(num_ids, (1, num_tokens), generator=generator)
    return hidden.requires_grad_(), heads[0], HiddenSignal(teacher_hidden, heads[1]), labels


def test_forked_processes_have_buffers_of_their_own() -> None:
    head = Projection(torch.zeros(1, 4), torch.zeros(8, 4))
    with products.Buffers() as buffers:
        buffers.logits(head, 2, 8, torch.float32)[0].fill_(1.0)
    if (child := os.fork()) == 0:
        with products.Buffers() as buffers:
            buffers.logits(head, 2, 8, torch.float32)[0].fill_(2.0)
        os._exit(0)
    os.waitpid(child, 0)
    with products.Buffers() as buffers:
        (kept,) = buffers.logits(head, 2, 8, torch.float32)
    assert kept.tolist() == [[1.0] * 8] * 2


def exact(hidden: Tensor, output: OutputHead, signal: HiddenSignal, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients in float64."""
    cap = output.softcap
    h, w = hidden.detach().double().requires_grad_(), output.weight.detach().double().requires_grad_()
    logits = h @ w.T
    logq = (logits if cap is None else cap * (logits / cap).tanh()).log_softmax(-1)
    logp = (signal.hidden_BSD.double() @ signal.output.weight.detach().double().T).log_softmax(-1)
    loss = 0.5 * (logp.exp() * (logp - logq)).sum() - 0.5 * logq.gather(-1, labels[..., None]).sum()
    return loss.detach(), list(torch.autograd.grad(loss, (h, w)))


def relative_errors(loss: Tensor, inputs: tuple[Tensor, Tensor], gradients: list[Tensor]) -> list[float]:
    found = torch.autograd.grad(loss, inputs)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, gradients, strict=True)]


@pytest.mark.parametrize("two_products", [pytest.param(True, marks=has_bf16_units), False])
@pytest.mark.parametrize(("num_tokens", "num_ids", "chunk_size"), [(1, 500, None), (37, 900, 10), (5, 128_256, 64)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_exact_forms(
    two_products: bool,
    num_tokens: int,
    num_ids: int,
    chunk_size: int | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is that of rounding the logits' gradient and the result to bf16, each at most 2^-9 of every number."""
    monkeypatch.setattr(products, "cpu_multiplies_bf16", lambda: two_products)
    hidden, output, signal, labels = batch(num_tokens, num_ids)
    output.softcap = softcap
    loss, _ = KDLoss(chunk_size=chunk_size)(hidden, output, signal, labels)
    value, gradients = exact(hidden, output, signal, labels)
    assert loss.item() == pytest.approx(value.item(), rel=2e-5)
    assert max(relative_errors(loss, (hidden, output.weight), gradients)) < 0.0035


@has_bf16_units
def test_the_products_run_in_bf16() -> None:
    hidden, output, _, _ = batch(4, 300)
    assert products.form_of(hidden, output.weight, torch.float32) == "two products"
    assert products.form_of(hidden.float(), output.weight, torch.float32) == "raised"
    assert products.form_of(hidden, output.weight, torch.bfloat16) == "rounded"


@has_bf16_units
def test_two_products_give_18_bits() -> None:
    """Where the first product alone gives 9, also summed over a dimension as long as a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((7, 50_000), (50_000, 30)))
    wanted = a.double() @ b.double()
    product, rest = products._with_rounding_error(a, b)
    assert (product.double() - wanted).norm() > 1e-3 * wanted.norm()
    assert (product.double() + rest.double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("chunk_size", [None, 10])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_in_bf16(chunk_size: int | None, softcap: float | None) -> None:
    """Less exact, by what rounding the logits costs: more than 0.3 % of the gradient and less than 3 %."""
    hidden, output, signal, labels = batch(37, 900)
    output.softcap = softcap
    loss, _ = KDLoss(chunk_size=chunk_size, logits_dtype=torch.bfloat16)(hidden, output, signal, labels)
    value, gradients = exact(hidden, output, signal, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value.item(), rel=2e-3)
    errors = relative_errors(loss, (hidden, output.weight), gradients)
    assert 0.003 < max(errors) < 0.03


def test_logits_in_bf16_are_for_models_in_bf16() -> None:
    hidden, output, signal, labels = batch(3, 50)
    with pytest.raises(ConfigError, match="models in bf16"):
        KDLoss(logits_dtype=torch.bfloat16)(hidden.float(), output.float(), signal, labels)
    with pytest.raises(ConfigError, match="logits_dtype=torch.float16: must be"):
        KDLoss(logits_dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_chunk_is_reused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From call to call, in validation too, and grown by a larger batch; the losses are those of memory of their own."""
    sizes = (5, 37, 37, 20)
    cases = [(hidden.to(dtype), output.to(dtype), signal, labels) for hidden, output, signal, labels in (
        batch(num_tokens, 300, seed=num_tokens) for num_tokens in sizes)]  # fmt: skip
    monkeypatch.setattr(products.Buffers, "_spare", {})
    found, memory = [], []
    for index, case in enumerate(cases):
        with torch.inference_mode(index == 1):
            found.append(KDLoss()(*case)[0].item())
        memory.append(sorted(one.data_ptr() for spare in products.Buffers._spare.values() for one in spare))
    assert memory[0] != memory[1] == memory[2] == memory[3]
    for loss, case in zip(found, cases, strict=True):
        monkeypatch.setattr(products.Buffers, "_spare", {})
        assert KDLoss()(*case)[0].item() == loss


def test_memory_of_a_chunk_is_not_shared_by_losses_within_losses() -> None:
    head = Projection(torch.zeros(1, 2), torch.zeros(3, 2))
    with products.Buffers() as outer, products.Buffers() as inner:
        (first,), (second,) = (one.logits(head, 4, 3, torch.float32) for one in (outer, inner))
        assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("num_ids", [100, 8192 * 2, 8192 * 3 + 1, 49_152])
def test_most_likely_is_argmax(num_ids: int) -> None:
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(20, num_ids, generator=generator)
    for logits in (
        many,
        many.round(),
        torch.zeros(2, num_ids),
        many.index_fill(1, torch.tensor([num_ids - 1]), torch.inf),
    ):
        assert torch.equal(most_likely(logits), logits.argmax(-1))
        assert torch.equal(first_id(logits == logits.amax(-1, keepdim=True)), logits.argmax(-1))
