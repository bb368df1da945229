"""A step's gradient and validation are the same padded, end to end, packed, cut by tokens, on one rank or two (float64)."""

import copy
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from kdtune.data import DatasetStats, Loader, TokenizedDataset, batches, pack_examples, quickstart_dataset
from kdtune.data.alignment import TokenizerPair
from kdtune.distributed import World
from kdtune.evaluation import evaluate_kd
from kdtune.losses import ALM, ULD, ForwardKL, HiddenStateLoss, KDLoss, TopKTargets
from kdtune.models import Transformer, llama
from kdtune.teachers import OnlineTeacher
from kdtune.teachers.other_tokenizer import fit_loss
from kdtune.tokenizers import GGUFTokenizer, byte_tokenizer
from kdtune.tokenizers.bpe import tokenizer_from_ranks
from kdtune.tokenizers.chat_format import CHATML
from kdtune.training.steps import take_micro_batches

TOLERANCE = 1e-9
LENGTHS = (12, 2, 7, 5, 11, 3, 9, 4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows of two": {"accumulation": 4},
    "without padding": {"padding_free": True},
    "without padding, two by two": {"padding_free": True, "accumulation": 4},
    "padded, 24 tokens": {"tokens": 24},
    "20 tokens": {"padding_free": True, "tokens": 20, "accumulation": 2},
    "1 token": {"padding_free": True, "tokens": 1},
    "two ranks": {"padding_free": True, "ranks": 2},
    "two ranks, 13 tokens": {"padding_free": True, "tokens": 13, "ranks": 2, "accumulation": 2},
}


def model(vocab_size: int, seed: int, embed_dim: int) -> Transformer:
    torch.manual_seed(seed)
    found = llama(vocab_size=vocab_size, embed_dim=embed_dim, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=24,
                  max_seq_len=128).double()  # fmt: skip
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found


def random_rows() -> TokenizedDataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        rows.append((ids, [True] * 2 + (torch.rand(length - 2, generator=generator) < 0.7).tolist()))
    return TokenizedDataset(rows, DatasetStats("random", len(rows)))


def step_gradients(
    dataset: Any, student: Transformer, teacher: Any, loss_of: Any, *, padding_free: bool = False, tokens: int | None = None,
    ranks: int = 1, accumulation: int = 1,
) -> list[Tensor]:  # fmt: skip
    """The gradient of the first step, of 8 examples, as the recipe makes it, summed over the ranks."""
    student, loss_fn = copy.deepcopy(student), loss_of()
    if loss_fn.module is not None:
        loss_fn.module.attach(2, (student.config.embed_dim, teacher.model.config.embed_dim), dtype=torch.float64)
    all_taken = [
        take_micro_batches(
            Loader(dataset, batch_size=8 // accumulation // ranks, pad_id=0, shuffle=False, rank=rank, num_ranks=ranks,
                   padding_free=padding_free, tokens_per_micro_batch=tokens, batches_per_step=accumulation), accumulation,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    num_valid_tokens = sum(batch.num_valid_tokens for taken in all_taken for batch in taken)
    for batch in (batch for taken in all_taken for batch in taken):
        hidden = student(**batch.inputs, return_hidden=True, **loss_fn.forward_options)
        loss, _ = loss_fn(hidden, student.output, teacher(batch), batch.targets)
        (loss / num_valid_tokens).backward()
    return [
        parameter.grad for parameter in [*student.parameters(), *loss_fn.parameters()] if parameter.grad is not None
    ]


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= TOLERANCE * other.norm() and other.norm() > 0


LOSSES = {
    "KL": lambda: KDLoss(ForwardKL(), kd_ratio=0.75, chunk_size=5),
    "top-k": lambda: KDLoss(ForwardKL(), kd_ratio=0.75, teacher_targets=TopKTargets(7)),
    "hidden states": lambda: KDLoss(ForwardKL(), kd_ratio=0.75, hidden_loss=HiddenStateLoss()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_steps_gradient(loss: str, layout: str) -> None:
    student = model(50, 0, 16)
    layers = (1, 2) if loss == "hidden states" else ()
    teacher = OnlineTeacher(model(50, 1, 32), layers)
    expected = step_gradients(random_rows(), student, teacher, LOSSES[loss])
    check_same(step_gradients(random_rows(), student, teacher, LOSSES[loss], **LAYOUTS[layout]), expected)


@pytest.mark.parametrize("layout", ["without padding", "20 tokens", "two ranks, 13 tokens"])
@pytest.mark.parametrize("divergence", [ULD(), ALM(), ALM(debias_threshold=0.001)], ids=lambda one: one.name)
def test_a_steps_gradient_with_a_teacher_of_other_tokens(divergence: Any, layout: str) -> None:
    backend = tokenizer_from_ranks(
        {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b" a": 257, b"in": 258}, r" ?\p{L}+|[^\p{L}]"
    )
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    other = GGUFTokenizer(backend, named=named, model_max_length=None, chat_template=CHATML, origin="other")
    pair = TokenizerPair(byte_tokenizer(max_seq_len=200), other)
    dataset = quickstart_dataset(pair, train_on="answers", prompt="plain", split="train[:8]")
    student = model(pair.student.vocab_size, 0, 16)
    teacher = OnlineTeacher(model(pair.teacher.vocab_size, 1, 32))
    fitted = fit_loss(pair, (pair.student.vocab_size, pair.teacher.vocab_size), divergence)
    loss = lambda: KDLoss(fitted, kd_ratio=0.75)  # noqa: E731
    settings = {**LAYOUTS[layout], **({"tokens": 400} if "tokens" in LAYOUTS[layout] else {})}
    expected = step_gradients(dataset, student, teacher, loss)
    check_same(step_gradients(dataset, student, teacher, loss, **settings), expected)


@pytest.mark.parametrize("layout", ["rows of two", "without padding, two by two", "20 tokens", "two ranks, 13 tokens"])
def test_a_steps_gradient_from_packs(layout: str) -> None:
    """The 8 examples are 4 packs."""
    student, teacher = model(50, 0, 16), OnlineTeacher(model(50, 1, 32))
    packs = pack_examples(random_rows(), byte_tokenizer(max_seq_len=16))
    assert [len(pack.documents) for pack in packs.examples(seed=0, epoch=0, shuffle=False)] == [2, 2, 2, 2]
    expected = step_gradients(random_rows(), student, teacher, LOSSES["KL"])
    check_same(step_gradients(packs, student, teacher, LOSSES["KL"], **LAYOUTS[layout]), expected)


@pytest.mark.parametrize("settings", [{}, {"tokens_per_micro_batch": 15}])
def test_a_validations_numbers(settings: dict[str, Any]) -> None:
    student, teacher, world = model(50, 0, 16), OnlineTeacher(model(50, 1, 32)), World(torch.device("cpu"))
    loss = KDLoss(ForwardKL(), kd_ratio=1.0)
    found, expected = (
        evaluate_kd(student, teacher, loss, batches(random_rows(), 3, 0, **kind), world=world, with_teacher_loss=True)
        for kind in ({"padding_free": True, **settings}, {})
    )
    assert found == pytest.approx(expected, rel=1e-11) and found["kd_loss"] > 0.1
