"""Operations by formula against those that torch counts as it computes."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdtune import losses, models
from kdtune.losses import HiddenSignal, Targets
from kdtune.models.flops import ModelFlops
from kdtune.models.llama import llama

ROWS, LENGTH, VOCAB = 3, 20, 97


def tiny(layers: int, dim: int) -> models.Transformer:
    torch.manual_seed(0)
    return llama(
        vocab_size=VOCAB,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=dim,
        intermediate_dim=3 * dim,
        max_seq_len=64,
    )


def counted(step: Callable[[], object]) -> tuple[int, int]:
    """Operations of products with matrices, and of attention, whose products are batches, each token with all: torch has no mask there."""
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch leaves it out
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    found = {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("bmm", 0)
    return sum(found.values()), attention


@pytest.mark.parametrize("kind", ["full", "lora", "frozen head"])
def test_the_formula_counts_what_torch_counts_in_a_distillation_step(kind: str) -> None:
    student, teacher = tiny(2, 32), tiny(3, 48).requires_grad_(False)
    if kind == "lora":
        student = models.apply_lora(
            student, lora_rank=4, lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=True
        )
    elif kind == "frozen head":
        student.output.requires_grad_(False)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))
    targets = Targets.from_labels(tokens)
    loss_fn = losses.KDLoss(losses.ForwardKL(), kd_ratio=0.5)
    own, theirs = ModelFlops.of(student), ModelFlops.of(teacher)

    @torch.no_grad()
    def teach() -> torch.Tensor:
        return teacher(tokens, return_hidden=True)

    products, attention = counted(teach)
    pairs = ROWS * LENGTH * (LENGTH + 1) // 2
    assert attention == theirs.attention * ROWS * LENGTH**2
    assert theirs.forward([LENGTH] * ROWS, 0) == products + theirs.attention * pairs

    def distil() -> None:
        hidden = student(tokens, return_hidden=True)
        loss_fn(hidden, student.output, signal, targets)[0].backward()

    # The first layer's input has a gradient where the embedding is trained.
    student.tok_embeddings.requires_grad_(True)
    signal = HiddenSignal(teach(), teacher.output)
    products, attention = counted(distil)
    assert attention == 3 * own.attention * ROWS * LENGTH**2
    of_heads = theirs.head * len(targets)
    assert own.training([LENGTH] * ROWS, len(targets)) + of_heads == products + 3 * own.attention * pairs


def test_tokens_attend_within_their_text_alone() -> None:
    flops = ModelFlops(layers=10, trained_layers=0, attention=7, head=3, trained_head=0)
    assert flops.forward([2, 3], 4) == 10 * 5 + 7 * (3 + 6) + 3 * 4
    assert flops.training([2, 3], 4) == 2 * 10 * 5 + 3 * 7 * 9 + 2 * 3 * 4
