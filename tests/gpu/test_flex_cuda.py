"""Flex attention's kernel on CUDA against eager attention in float64."""

import pytest
import torch

from kdtune.models import Documents, attention, flex


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has a backward on CUDA alone")
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_capped_documents_are_eager_attention(dtype: torch.dtype, window: int | None, head_dim: int) -> None:
    assert flex.is_available(head_dim)
    for lengths in [(300, 84, 1), (5, 700, 60), (40,)]:
        torch.manual_seed(0)
        documents = Documents.of_lengths(lengths)
        inputs = [torch.randn(sum(lengths), heads, head_dim).to(dtype) for heads in (4, 2, 2)]
        slope = torch.randn(inputs[0].shape).to(dtype)
        exact = [x.double().requires_grad_() for x in inputs]
        expected = attention.attend_within(documents, *exact, window, None, 5.0)
        expected_grads = torch.autograd.grad(expected, exact, slope.double())
        ours = [x.cuda().requires_grad_() for x in inputs]
        masked = flex.with_block_masks(documents.to("cuda"), {window})
        found = attention.attend_within(masked, *ours, window, None, 5.0)
        grads = torch.autograd.grad(found, ours, slope.cuda())
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        for one, other in zip((found, *grads), (expected, *expected_grads), strict=True):
            assert (one.double().cpu() - other).norm() < bound * other.norm()
