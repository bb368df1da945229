"""Documents end to end in one row: the hidden states and gradients are those of each document alone, in float64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from kdtune.models import Documents, KVCache, Transformer, apply_lora, attention, llama
from kdtune.parallel.build import apply_activation_checkpointing

LENGTHS = (5, 9, 1, 3)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(kind: str) -> Transformer:
    model = llama(
        vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64, max_seq_len=64
    )
    if kind == "norms after":
        switches: dict[str, Any] = {"qk_norm": "projection", "norm_placement": "after", "attention_scale": 0.3}
        switches |= {"residual_scale": 0.5, "embedding_scale": 3.0, "logit_divisor": 2.0, "rotates": (True, False)}
        model = Transformer(replace(model.config, **switches))
    if kind == "switched":
        switches = {
            "qkv_bias": True,
            "qk_norm": "head",
            "logit_softcap": 5.0,
            "windows": (4, None),
            "window_rope_base": 30.0,
        }
        switches |= {"norm_placement": "both", "norm_offset": 1.0, "activation": "gelu_tanh"}
        model = Transformer(replace(model.config, **switches))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 4)
    if kind in ("lora", "dora"):
        model = apply_lora(model, lora_rank=4, use_dora=kind == "dora")
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter)
    return model


def gradients(model: Transformer) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["full", "switched", "norms after", "lora", "dora"])
def test_each_document_is_computed_as_if_it_were_alone(kind: str, is_checkpointed: bool) -> None:
    model = model_of(kind)
    texts = [torch.randint(64, (1, length)) for length in LENGTHS]
    alone = [model(text) for text in texts]
    slopes = [torch.randn_like(logits) for logits in alone]
    torch.autograd.backward(alone, slopes)
    expected = gradients(model)
    if is_checkpointed:
        apply_activation_checkpointing(model)
    logits = model(torch.cat(texts, 1), documents=Documents.of_lengths(LENGTHS))
    logits.backward(torch.cat(slopes, 1))
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=0, atol=1e-11)
    for found, grad in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=0, atol=1e-10 * float(grad.abs().max()))


def test_the_boundaries() -> None:
    documents = Documents.of_lengths(LENGTHS)
    assert documents.positions_T.tolist() == [position for length in LENGTHS for position in range(length)]
    assert documents.starts_N1.tolist() == [0, 5, 14, 15, 18]
    assert (documents.starts_N1.dtype, documents.positions_T.dtype, documents.longest) == (torch.int32, torch.int64, 9)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_documents_without_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one document, each of at least 1 token"):
        Documents.of_lengths(lengths)


def test_other_tokens_and_arguments_that_documents_replace_are_refused() -> None:
    model, documents = model_of("full"), Documents.of_lengths([2, 3])
    for shape in [(1, 6), (5, 1), (2, 5)]:
        with pytest.raises(ValueError, match=r"documents: 2 of 5 tokens together.*one row, \[1, 5\]"):
            model(torch.zeros(shape, dtype=torch.int64), documents=documents)
    tokens = torch.zeros((1, 5), dtype=torch.int64)
    others: list[dict[str, Any]] = [
        {"input_pos": torch.arange(5)}, {"mask": torch.ones(5, 5, dtype=torch.bool)}, {"kv_cache": KVCache(model.config, 1, 8)},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(ValueError, match="documents: they are the positions and the mask"):
            model(tokens, documents=documents, **other)


@pytest.mark.parametrize(("num_kv_heads", "is_shared", "window"), [(2, True, None), (4, False, 3)])
def test_one_call_with_the_boundaries_on_a_gpu(
    num_kv_heads: int, is_shared: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes alone: FakeTensorMode has no values, and torch's own operator checks what it is given."""
    calls, kernel = list[tuple[Any, Any]](), varlen.varlen_attn

    def recorded(*args: Any, **settings: Any) -> Any:
        calls.append((args, settings))
        return kernel(*args, **settings)

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    with FakeTensorMode(), torch.device("cuda"):
        documents = Documents.of_lengths(LENGTHS)
        q_SHE = torch.empty(18, 4, 16, dtype=torch.bfloat16)
        k_SKE = torch.empty(18, num_kv_heads, 16, dtype=torch.bfloat16)
        out_SHE = attention.attend_within(documents, q_SHE, k_SKE, k_SKE, window)
    (((_, _, _, starts, ends, *longest), settings),) = calls
    assert (out_SHE.shape, out_SHE.dtype, out_SHE.device.type) == ((18, 4, 16), torch.bfloat16, "cuda")
    assert starts is ends is documents.starts_N1 and longest == [9, 9]
    # torch's convention: nothing to the right and all to the left is causal; a window's size counts the token itself.
    assert settings == {
        "window_size": (-1 if window is None else window - 1, 0),
        "scale": None,
        "enable_gqa": is_shared,
    }


def test_compiled_layers_serve_any_number_of_documents() -> None:
    model, compiled = model_of("full"), model_of("full")
    compiled.load_state_dict(model.state_dict())
    counter, counts = CompileCounterWithBackend("aot_eager"), list[int]()
    for layer in compiled.layers:
        layer.compile(backend=counter, dynamic=True)
    for lengths in [(5, 9, 3), (7, 2), (20, 11, 4, 8), (2,), (3, 1, 1)]:
        tokens, documents = torch.randint(64, (1, sum(lengths))), Documents.of_lengths(lengths)
        hidden = [one(tokens, documents=documents, return_hidden=True) for one in (model, compiled)]
        torch.testing.assert_close(*hidden, rtol=0, atol=1e-11)
        hidden[1].sum().backward()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, "no code is made for other lengths"
