"""Adapters on a base in 4 bits (QLoRA): what is quantized, what survives, and that training works."""

import copy

import pytest
import torch
from torch import Tensor
from torchao.quantization import to_nf4

from kdtune.errors import ConfigError
from kdtune.models import Transformer, adapter_parameters, apply_lora, llama, lora_llama, merge_adapters
from kdtune.models.nf4 import dequantized, fill_rows, is_cut_by_rows, is_nf4, nf4_parts, quantize_nf4

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
DTYPES = [torch.float32, torch.bfloat16]

# The 16 levels of NF4 (arXiv 2305.14314, appendix E), which are published numbers.
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def tiny(dtype: torch.dtype = torch.float32) -> Transformer:
    """Sizes such that some weights have 9 and 27 blocks of 64 values, as SmolLM2's have odd numbers of blocks."""
    torch.manual_seed(0)
    model = llama(
        vocab_size=48, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_dim=36,
        tie_embeddings=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    return model.to(dtype)


def quantized(dtype: torch.dtype = torch.float32, *, use_dora: bool = False) -> Transformer:
    return apply_lora(tiny(dtype), lora_rank=4, apply_lora_to_output=True, use_dora=use_dora, quantize_base=True)


def test_rows_of_256_scales_are_quantized_as_torchao_does_by_default() -> None:
    weight = torch.randn(2, 64 * 256, generator=torch.Generator().manual_seed(0))
    ours, theirs = nf4_parts(quantize_nf4(weight)), nf4_parts(to_nf4(weight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapted_linears_of_the_layers_are_quantized_and_nothing_else(dtype: torch.dtype) -> None:
    model = quantized(dtype)
    found = {name for name, parameter in model.named_parameters() if is_nf4(parameter)}
    inner = ["attn.q_proj", "attn.v_proj", "attn.output_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert found == {f"layers.{index}.{name}.weight" for index in range(2) for name in inner}
    assert not any(parameter.requires_grad for parameter in model.parameters() if is_nf4(parameter))
    assert model.output.weight is model.tok_embeddings.weight


def test_values_are_the_nearest_levels() -> None:
    """Against the definition: each block of 64 is scaled by its largest value (which is itself rounded to 8 bits)."""
    weight = tiny().layers[0].mlp.up_proj.weight.detach()
    found = dequantized(quantized().layers[0].mlp.up_proj.weight).detach()
    blocks = weight.flatten().view(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = levels[(blocks / scales)[..., None].sub(levels).abs().argmin(-1)] * scales
    # No farther from the weight than the nearest level, but for the rounding of the scale.
    error = (found.flatten().view(-1, 64) - blocks).abs()
    assert (error <= (nearest - blocks).abs() + 0.02 * scales).all()
    assert not torch.allclose(found, weight, atol=0.01)


@pytest.mark.parametrize("shape", [(64, 1), (128, 192), (24, 40), (32, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_on_the_meta_device_has_the_same_parts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=dtype)
    parts, others = nf4_parts(quantize_nf4(weight)), nf4_parts(quantize_nf4(weight.to("meta")))
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
        name: (part.shape, part.dtype) for name, part in others.items()
    }
    assert all(part.is_meta for part in others.values())


@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 1), (128, 192), (24, 40), (32, 576)])
def test_rows_of_a_weight_stand_for_what_they_stood_for(shape: tuple[int, int], num_parts: int) -> None:
    weight = quantize_nf4(torch.randn(shape))
    if not is_cut_by_rows(weight.shape, num_parts):
        assert shape[0] * shape[1] // 64 % num_parts  # fewer blocks than parts, or blocks of two parts
        return
    length = shape[0] // num_parts
    for first in range(0, shape[0], length):
        part = quantize_nf4(torch.randn(length, shape[1]))
        assert part.scaler_block_size == weight.scaler_block_size
        fill_rows(part, weight, slice(first, first + length))
        assert torch.equal(dequantized(part), dequantized(weight)[first : first + length])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_adapters_compute_what_the_quantized_base_does(dtype: torch.dtype, use_dora: bool) -> None:
    model = quantized(dtype, use_dora=use_dora)
    plain = tiny(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_nf4(parameter):
                plain.get_parameter(name).copy_(dequantized(parameter))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0, atol=tolerance)


def spoiled(model: Transformer) -> Transformer:
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_and_copying(use_dora: bool) -> None:
    model = spoiled(quantized(use_dora=use_dora))
    expected = model(TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), expected)
    merge_adapters(twin)
    assert not any(is_nf4(parameter) for parameter in twin.parameters())
    assert (twin(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(model(TOKENS), expected)


def test_casting_keeps_the_base_quantized() -> None:
    model = spoiled(quantized())
    expected = model(TOKENS)
    model.to(torch.bfloat16)
    assert is_nf4(model.layers[0].attn.q_proj.weight)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = model(TOKENS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    model.to("cpu")
    assert torch.equal(model(TOKENS), found)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_falls(dtype: torch.dtype, use_dora: bool) -> None:
    model = quantized(dtype, use_dora=use_dora)
    before = {name: dequantized(parameter).clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(8):
        logits: Tensor = model(TOKENS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), TOKENS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    adapters = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(dequantized(parameter), before[name]) != (name in adapters), name


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from kdtune.parallel import apply_activation_checkpointing

    model = spoiled(quantized())
    twin = copy.deepcopy(model)
    apply_activation_checkpointing(twin)
    for one in (model, twin):
        one(TOKENS).square().sum().backward()
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(twin.get_parameter(name).grad, parameter.grad), name


@pytest.mark.slow("torch.compile traces every layer for half a minute")
def test_compiled_layers_compute_the_same() -> None:
    model = spoiled(quantized())
    expected = model(TOKENS)
    for layer in model.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    found = model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())


def test_a_weight_of_another_size_is_refused_by_name() -> None:
    sizes = {"vocab_size": 48, "embed_dim": 12, "num_layers": 1, "num_heads": 2, "intermediate_dim": 17}
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.q_proj has a weight of \[12, 12\], 144 values"):
        lora_llama(**sizes, quantize_base=True)
