"""The fused loss through an output head with an adapter: its gradients against float64 autograd on plain logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError
from kdtune.losses import HiddenSignal, KDLoss
from kdtune.models import OutputHead, adapter_parameters, apply_lora, llama
from kdtune.models.lora import LoRAHead
from kdtune.models.nf4 import quantize_nf4

TOKENS, WIDTH, VOCAB, RANK = 10, 16, 40, 3
KINDS = [pytest.param(False, id="lora"), pytest.param(True, id="dora")]


def adapted_head(
    *, use_dora: bool, dropout: float = 0.0, dtype: torch.dtype = torch.float32, softcap: float | None = None
) -> LoRAHead:
    base = OutputHead(WIDTH, VOCAB, softcap=softcap).to(dtype).requires_grad_(False)
    head = LoRAHead(base, rank=RANK, alpha=4.5, dropout=dropout, use_dora=use_dora, quantize_base=False)
    with torch.no_grad():
        head.lora_b.weight.normal_(std=0.3)
    return head


def plain_logits(hidden: Tensor, head: LoRAHead, parts: dict[str, Tensor]) -> Tensor:
    """From the papers, in float64."""
    weight = head.weight.double() + 1.5 * parts["lora_b.weight"] @ parts["lora_a.weight"]
    if "magnitude" in parts:
        weight = parts["magnitude"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    logits = hidden @ weight.T
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("use_dora", KINDS)
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_value_and_gradients(use_dora: bool, chunk_size: int | None, kd_ratio: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    student, teacher = (adapted_head(use_dora=use_dora, softcap=softcap) for _ in range(2))
    hidden, teacher_hidden = (torch.randn(2, TOKENS // 2, WIDTH) for _ in range(2))
    labels = torch.randint(VOCAB, (2, TOKENS // 2))
    labels[0, 1] = IGNORE_INDEX
    hidden.requires_grad_()
    loss, _ = KDLoss(kd_ratio=kd_ratio, chunk_size=chunk_size)(
        hidden, student, HiddenSignal(teacher_hidden, teacher), labels
    )
    loss.backward()

    names = [name for name, _ in student.named_parameters() if name != "weight"]
    wide = {name: student.get_parameter(name).detach().double().requires_grad_() for name in names}
    wide_hidden = hidden.detach().double().requires_grad_()
    valid = labels != IGNORE_INDEX
    logp = plain_logits(wide_hidden, student, wide)[valid].log_softmax(-1)
    theirs = {name: parameter.detach().double() for name, parameter in teacher.named_parameters()}
    teacher_logp = plain_logits(teacher_hidden.double(), teacher, theirs)[valid].log_softmax(-1)
    kl = (teacher_logp.exp() * (teacher_logp - logp)).sum()
    expected = (1 - kd_ratio) * F.nll_loss(logp, labels[valid], reduction="sum") + kd_ratio * kl
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=1e-4, atol=1e-5)
    for name in names:
        torch.testing.assert_close(student.get_parameter(name).grad.double(), wide[name].grad, rtol=1e-4, atol=1e-5)
    assert student.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("use_dora", KINDS)
def test_dropout_on_the_head(use_dora: bool) -> None:
    """The loss sees the logits that forward gives under the same draw."""
    torch.manual_seed(0)
    head = adapted_head(use_dora=use_dora, dropout=0.5)
    hidden, labels = torch.randn(1, TOKENS, WIDTH), torch.randint(VOCAB, (1, TOKENS))
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        loss, _ = KDLoss(kd_ratio=0.0)(hidden, head, None, labels)
        torch.manual_seed(1)
        logits = head(hidden.flatten(0, 1))
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels[0], reduction="sum"))
        losses.append(loss.item())
        head.eval()
    assert losses[0] != losses[1]


def test_small_updates_survive_bf16() -> None:
    """Updates far below the rounding of the base's own weights still move the loss."""
    torch.manual_seed(0)
    head = adapted_head(use_dora=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.add_(4)
        head.lora_b.weight.mul_(1e-3)
    hidden, labels = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16), torch.randint(VOCAB, (1, TOKENS))
    loss, _ = KDLoss(kd_ratio=0.0)(hidden, head, None, labels)
    parts = {name: parameter.detach().double() for name, parameter in head.named_parameters()}
    base = F.cross_entropy(hidden[0].double() @ head.weight.double().T, labels[0], reduction="sum")
    exact = F.cross_entropy(plain_logits(hidden[0].double(), head, parts), labels[0], reduction="sum")
    assert abs(loss - exact) < 0.2 * abs(exact - base)


class Largest(TorchDispatchMode):
    """The most rows of any tensor with a row of the vocabulary's length."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor) and one.ndim == 2 and one.shape[1] == VOCAB:
                self.rows = max(self.rows, one.shape[0])
        return result


@pytest.mark.parametrize("use_dora", KINDS)
def test_no_logits_beyond_a_chunk(use_dora: bool) -> None:
    torch.manual_seed(0)
    head = adapted_head(use_dora=use_dora)
    hidden, labels = torch.randn(1, 64, WIDTH, requires_grad=True), torch.randint(VOCAB, (1, 64))
    with Largest() as largest:
        loss, _ = KDLoss(kd_ratio=0.0, chunk_size=4)(hidden, head, None, labels)
        loss.backward()
    assert largest.rows <= max(4, WIDTH + RANK)


def test_a_whole_model_learns_through_an_adapted_tied_head() -> None:
    torch.manual_seed(0)
    model = apply_lora(
        llama(vocab_size=VOCAB, embed_dim=WIDTH, num_layers=1, num_heads=2, intermediate_dim=24, tie_embeddings=True),
        lora_rank=RANK,
        apply_lora_to_output=True,
    )
    tokens = torch.randint(VOCAB, (2, 9))
    optimizer = torch.optim.Adam(adapter_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss, _ = KDLoss(kd_ratio=0.0)(model(tokens[:, :-1], return_hidden=True), model.output, None, tokens[:, 1:])
        optimizer.zero_grad()
        (loss / 16).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.output.lora_a.weight.grad.abs().sum() > 0


def test_heads_that_are_no_product_are_refused() -> None:
    hidden, labels = torch.randn(1, TOKENS, WIDTH), torch.randint(VOCAB, (1, TOKENS))
    biased = adapted_head(use_dora=False)
    biased.bias = nn.Parameter(torch.zeros(VOCAB))
    quantized = OutputHead(WIDTH, VOCAB)
    quantized.weight = quantize_nf4(quantized.weight)
    for head, message in ((biased, "has a bias"), (quantized, "NF4Tensor")):
        with pytest.raises(ConfigError, match=message):
            KDLoss(kd_ratio=0.0)(hidden, head, None, labels)
