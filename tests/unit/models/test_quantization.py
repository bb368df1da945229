"""Quantized linears: which ones, how far off, and what is refused before a weight is touched."""

import pytest
import torch

from kdtune.errors import ConfigError
from kdtune.models import llama
from kdtune.models.quantization import (
    SCHEMES,
    dequantized,
    is_quantized,
    quantize,
    scheme_problems,
    shape_problems,
    target_linears,
)

CPU = torch.device("cpu")
# Largest relative error of a normal weight: 8 bits by row, 4 bits in groups, and the normal float.
ERRORS = {
    "int8_weight_only": 0.012,
    "int8_dynamic": 0.012,
    "float8_weight_only": 0.03,
    "intx_4bit": 0.11,
    "nf4": 0.11,
}


def small_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320, "embed_dim": 192, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1,
        "intermediate_dim": 256, "max_seq_len": 64, "tie_embeddings": True,
    }  # fmt: skip
    return llama(**{**sizes, **changes}).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ERRORS)
def test_linears_of_the_layers_and_nothing_else(scheme, dtype):
    model, plain = small_model(dtype), small_model(dtype)
    seen = []
    errors = quantize(model, scheme, progress=seen.append)
    expected = [f"layers.{i}.{name}" for i in range(2) for name in (
        "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    assert [error.name for error in errors] == expected == seen
    assert {name for name, weight in model.named_parameters() if is_quantized(weight)} == {
        f"{name}.weight" for name in expected
    }
    assert not any(weight.requires_grad for weight in model.parameters())
    for error in errors:
        weight = plain.get_submodule(error.name).weight.double()
        found = dequantized(model.get_submodule(error.name).weight.detach()).double()
        assert error.relative_error == pytest.approx(((found - weight).norm() / weight.norm()).item(), rel=1e-3)
        assert 0 < error.relative_error < ERRORS[scheme]


@pytest.mark.parametrize("scheme", ERRORS)
def test_outputs_stay_close(scheme):
    """The output of one linear: measured 0.005 to 0.1 of its size."""
    model, plain = small_model(torch.bfloat16), small_model(torch.bfloat16)
    quantize(model, scheme)
    hidden = torch.randn(16, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = plain.layers[0].mlp.up_proj(hidden).float()
        found = model.layers[0].mlp.up_proj(hidden)
    assert found.dtype == torch.bfloat16
    error = ((found.float() - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 1.5 * ERRORS[scheme]


def test_smaller_groups_are_closer():
    errors = [max(e.relative_error for e in quantize(small_model(), "intx_4bit", group_size=g)) for g in (16, 64)]
    assert errors[0] < errors[1]


def test_the_head_only_when_asked_and_untied():
    model = small_model(tie_embeddings=False)
    assert "output" not in target_linears(model)
    quantize(model, "int8_weight_only", quantize_output=True)
    assert is_quantized(model.output.weight)
    assert not is_quantized(model.tok_embeddings.weight)
    with pytest.raises(ConfigError, match="tied"):
        quantize(small_model(), "int8_weight_only", quantize_output=True)


@pytest.mark.parametrize("scheme", ["int4_weight_only", "float8_dynamic"])
def test_what_a_cpu_lacks_is_refused_by_name_with_what_works(scheme):
    model = small_model(torch.bfloat16)
    with pytest.raises(ConfigError, match=rf"scheme={scheme}: needs a CUDA device.*int8_weight_only, .*nf4 work"):
        quantize(model, scheme)
    assert not any(is_quantized(weight) for weight in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", CPU, torch.float32), "scheme=int3: unknown; one of int8_weight_only"),
        (("int8_weight_only", torch.device("mps"), torch.float32), "not supported on mps"),
        (("int8_weight_only", CPU, torch.float32, 32), "group_size=32: with int8_weight_only null"),
        (("intx_4bit", CPU, torch.float32, 48), "group_size=48: with intx_4bit one of 16, 32"),
        (("int8_weight_only", CPU, torch.float16), "dtype is float16"),
        (("int4_weight_only", CPU, torch.float32), "needs weights of bfloat16; dtype is float32"),
    ],
)
def test_scheme_problems(arguments, message):
    assert any(message in problem for problem in scheme_problems(*arguments))


def test_every_scheme_works_somewhere():
    for name, scheme in SCHEMES.items():
        problems = scheme_problems(name, CPU, torch.bfloat16)
        assert bool(problems) == (scheme.lowest_capability is not None)


def test_shapes_that_do_not_fit():
    config = small_model().config
    assert shape_problems("intx_4bit", config, 64) == []
    (problem,) = shape_problems("intx_4bit", config, 128)
    assert "layers.0.attn.q_proj has 192 input features, not a multiple of 128" in problem
    odd = small_model(embed_dim=36, num_heads=3, num_kv_heads=1, intermediate_dim=10).config
    assert "weights, not a multiple of 64" in shape_problems("nf4", odd)[0]


def test_a_weight_that_torchao_leaves_is_an_error(monkeypatch):
    """torchao only logs where it skips a weight."""
    monkeypatch.setattr("torchao.quantization.quantize_", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"torchao left layers.0.attn.q_proj, shape \[192, 192\]"):
        quantize(small_model(), "int8_weight_only")
