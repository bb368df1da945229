"""Flex attention of soft-capped documents: its two functions, its blocks and its result are those of eager attention."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from kdtune.models import Documents, Transformer, attention, flex, llama

CAP = 2.0
LENGTHS = [(5,), (128,), (3, 130, 1, 122), (300, 84, 1), (40,) * 10, (256, 1)]
WINDOWS = [None, 1, 7, 128, 200]


def heads(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(num_tokens, num, 16, dtype=dtype) * 2 for num in (4, 2, 2)]


def by_force(documents: Documents, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores of all tokens, through the two functions that flex attention is given."""
    num_tokens = len(q)
    allowed = create_mask(flex.block_mask(documents, window).mask_mod, 1, 1, num_tokens, num_tokens, device="cpu")[0]
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    none = torch.zeros((), dtype=torch.int64)
    scores = flex.soft_cap(torch.tensor(CAP))(torch.einsum("she,the->hst", q, k) / 4, none, none, none, none)
    return torch.einsum("hst,the->she", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS[:3])
def test_the_functions_are_eager_attention(lengths: tuple[int, ...], window: int | None) -> None:
    documents, inputs = Documents.of_lengths(lengths), heads(sum(lengths), torch.float64)
    found = by_force(documents, window, *(x.requires_grad_() for x in inputs))
    slope = torch.randn_like(found)
    eager = attention.attend_within(documents, *inputs, window, None, CAP)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, slope) for out in (found, eager)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_blocks_are_those_of_a_dense_mask(lengths: tuple[int, ...], window: int | None) -> None:
    ours, total = flex.block_mask(Documents.of_lengths(lengths), window), sum(lengths)
    dense = create_block_mask(ours.mask_mod, 1, 1, total, total, device="cpu")
    assert ours.shape == dense.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, places = (getattr(dense, f"{name}_{part}") for part in ("num_blocks", "indices"))
        our_places = getattr(ours, f"{name}_indices")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts), name
        for row, count in enumerate(counts[0, 0].tolist()):  # what is beyond the count is never read
            assert torch.equal(our_places[0, 0, row, :count], places[0, 0, row, :count]), name


@pytest.mark.parametrize("window", [None, 7])
def test_torchs_flex_attention_is_eager_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own unfused form, whose backward a CPU computes if it is let; the kernel is compared in tests/gpu."""
    monkeypatch.setattr(flex, "_compiled", flex.flex_attention)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    documents, inputs = Documents.of_lengths(LENGTHS[2]), [x.requires_grad_() for x in heads(256, torch.float32)]
    found = flex.attend_capped(flex.block_mask(documents, window), *inputs, 0.3, CAP)
    expected = attention.attend_within(documents, *inputs, window, 0.3, CAP)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    slope = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, slope) for out in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_a_model_on_a_gpu_makes_a_mask_for_each_window_and_calls_flex_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama(vocab_size=64, embed_dim=64, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_dim=64, max_seq_len=64)  # fmt: skip
    model = Transformer(replace(model.config, score_softcap=CAP, windows=(7, None, 7, None)))
    documents, tokens = Documents.of_lengths((20, 3, 9)), torch.randint(64, (1, 32))
    expected = model(tokens, documents=documents)
    masks = list[object]()

    def called(mask: object, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float) -> Tensor:
        masks.append(mask)
        window = next(window for window, one in made.block_masks.items() if one is mask)
        return attention.attend_within(documents, q, k, v, window, scale, softcap)

    assert attention.with_block_masks(documents, model.config) is documents, "not on a CPU"
    made = flex.with_block_masks(documents, {7, None})
    monkeypatch.setattr("kdtune.models.transformer.with_block_masks", lambda *_: made)
    monkeypatch.setattr(flex, "attend_capped", called)
    torch.testing.assert_close(model(tokens, documents=documents), expected, rtol=0, atol=0)
    assert masks == [made.block_masks[window] for window in (7, None, 7, None)]


@pytest.mark.parametrize(("head_dim", "triton", "is_taken"), [(16, True, True), (8, True, False), (16, False, False)])
def test_where_flex_attention_is_taken(
    head_dim: int, triton: bool, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "find_spec", lambda name: object() if triton else None)
    assert flex.is_available(head_dim) == is_taken


@pytest.mark.slow("torch's compiler traces layers and their backward for several lengths")
def test_compiled_layers_serve_any_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    model = llama(vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64, max_seq_len=64)  # fmt: skip
    model = Transformer(replace(model.config, score_softcap=CAP, windows=(7, None)))
    weights, results = list(model.parameters()), list[list[Tensor]]()
    counter, counts = CompileCounterWithBackend("aot_eager"), list[int]()
    texts = [(5, 300), (100, 28), (40, 70, 90), (200,), (1000, 3)]
    for is_compiled in (False, True):
        if is_compiled:
            monkeypatch.setattr(
                "kdtune.models.transformer.with_block_masks", lambda one, _: flex.with_block_masks(one, {7, None})
            )
            for layer in model.layers:
                layer.compile(backend=counter, dynamic=True)
        for lengths in texts:
            tokens = torch.arange(sum(lengths))[None] % 61
            logits = model(tokens, documents=Documents.of_lengths(lengths))
            results.append([logits.detach(), *torch.autograd.grad(logits.sin().sum(), weights)])
            counts.append(counter.frame_count)
    assert counts[-1] == counts[len(texts) + 1] > 0, "no code is made after the second text"
    for ours, theirs in zip(results[len(texts) :], results[: len(texts)], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
