"""Adapters on models: their arithmetic against the plain formulae, merging, what is trainable, and what is refused."""

import copy
import inspect
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtune import models
from kdtune.config import instantiate
from kdtune.errors import ConfigError
from kdtune.models import LoRALinear, Transformer, adapter_parameters, apply_lora, has_adapters, llama
from kdtune.pruning.prune import keep_layers

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
KINDS = [pytest.param(False, id="lora"), pytest.param(True, id="dora")]


def tiny(*, tie: bool = True, seed: int = 0) -> Transformer:
    """Two layers whose weights are large enough for logits of about 1."""
    torch.manual_seed(seed)
    model = llama(
        vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64, tie_embeddings=tie
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    return model


def trained(model: Transformer) -> Transformer:
    """The model with adapters as training leaves them: nothing is zero."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("use_dora", KINDS)
def test_fresh_adapters_change_nothing(use_dora: bool) -> None:
    model = tiny()
    before = model(TOKENS)
    apply_lora(model, apply_lora_to_output=True, use_dora=use_dora)
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-6)


def test_initialization_is_that_of_the_paper_code() -> None:
    model = apply_lora(tiny(), lora_rank=64)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_a.weight"):
            bound = parameter.shape[1] ** -0.5  # kaiming uniform with a = sqrt(5)
            assert 0.95 * bound < parameter.abs().max() <= bound
            assert abs(parameter.mean()) < 0.05 * bound
        else:
            assert not parameter.any()


def test_the_seed_decides_the_draw() -> None:
    first, second, third = (apply_lora(tiny(seed=seed)).layers[1].mlp.up_proj.lora_a.weight for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("use_dora", KINDS)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_merged_logits_are_the_unmerged_ones(dtype: torch.dtype, tolerance: float, tie: bool, use_dora: bool) -> None:
    model = trained(apply_lora(tiny(tie=tie).to(dtype), apply_lora_to_output=True, use_dora=use_dora))
    base = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter.zero_() if parameter.ndim == 2 else None
    expected = model(TOKENS)
    models.merge_adapters(model)
    assert not has_adapters(model) and not model.config.tie_embeddings
    assert model.output.weight is not model.tok_embeddings.weight
    found = model(TOKENS)
    largest = expected.abs().max()
    assert (found - expected).abs().max() < tolerance * largest
    assert (base(TOKENS) - expected).abs().max() > 0.01 * largest, "the adapters do nothing: the test shows nothing"


def test_a_merge_that_leaves_the_head_alone_keeps_it_tied() -> None:
    model = models.merge_adapters(trained(apply_lora(tiny())))
    assert model.config.tie_embeddings and model.output.weight is model.tok_embeddings.weight


def test_merging_what_cannot_be_merged() -> None:
    with pytest.raises(ConfigError, match="no adapters to merge"):
        models.merge_adapters(tiny())


def plain_formula(linear: LoRALinear, inputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """One adapted layer in float64, from the papers."""
    base, a, b = linear.weight.double(), parameters["lora_a.weight"], parameters["lora_b.weight"]
    weight = base + linear.alpha / linear.rank * b @ a
    if "magnitude" in parameters:
        weight = parameters["magnitude"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    return inputs.double() @ weight.T


@pytest.mark.parametrize("use_dora", KINDS)
def test_gradients_are_those_of_the_plain_formula(use_dora: bool) -> None:
    linear = trained(apply_lora(tiny(), lora_rank=3, lora_alpha=7.5, use_dora=use_dora)).layers[0].mlp.up_proj
    inputs = torch.randn(5, 32, requires_grad=True)
    direction = torch.randn(5, 64)
    (linear(inputs) * direction).sum().backward()

    names = [name for name, _ in linear.named_parameters() if name != "weight"]
    wide = {name: linear.get_parameter(name).detach().double().requires_grad_() for name in names}
    wide_inputs = inputs.detach().double().requires_grad_()
    outputs = plain_formula(linear, wide_inputs, wide)
    torch.testing.assert_close(linear(inputs).double(), outputs, rtol=1e-5, atol=1e-5)
    (outputs * direction).sum().backward()
    for name in names:
        torch.testing.assert_close(linear.get_parameter(name).grad.double(), wide[name].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.grad.double(), wide_inputs.grad, rtol=1e-4, atol=1e-4)
    assert linear.weight.grad is None


@pytest.mark.parametrize("use_dora", KINDS)
def test_dropout_acts_on_the_update_in_training_only(use_dora: bool) -> None:
    model = trained(apply_lora(tiny(), lora_dropout=0.5, use_dora=use_dora))
    linear = model.layers[0].attn.q_proj
    inputs = torch.randn(4, 32)
    model.eval()
    expected = plain_formula(linear, inputs, {name: p.double() for name, p in linear.named_parameters()})
    torch.testing.assert_close(linear(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    model.train()
    torch.manual_seed(1)
    found = linear(inputs)
    torch.manual_seed(1)
    dropped = functional.dropout(inputs, 0.5)
    gain = 1.0
    if use_dora:
        gain = linear.magnitude / (linear.weight + linear.scaling * linear.lora_b.weight @ linear.lora_a.weight).norm(
            dim=1
        )
    update = linear.scaling * dropped @ linear.lora_a.weight.T @ linear.lora_b.weight.T
    torch.testing.assert_close(found, gain * (inputs @ linear.weight.T + update), rtol=1e-5, atol=1e-5)


def test_exactly_the_adapters_are_trainable() -> None:
    model = apply_lora(
        tiny(), lora_attn_modules=["k_proj"], apply_lora_to_mlp=False, apply_lora_to_output=True, use_dora=True
    )
    expected = {
        f"{module}.{part}"
        for module in ("layers.0.attn.k_proj", "layers.1.attn.k_proj", "output")
        for part in ("lora_a.weight", "lora_b.weight", "magnitude")
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    assert set(adapter_parameters(model)) == expected
    model.to(torch.bfloat16)(TOKENS).float().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.bfloat16}


def test_names_of_the_base_stay() -> None:
    names = set(tiny().state_dict())
    adapted = set(apply_lora(tiny(), apply_lora_to_output=True, use_dora=True).state_dict())
    assert names < adapted
    assert {"output.lora_a.weight", "layers.1.mlp.down_proj.lora_b.weight"} < adapted - names


def test_parameter_counts_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = models.lora_llama3_2_1b(lora_rank=64, lora_alpha=128)
        dora = models.lora_llama3_2_1b(lora_rank=64, apply_lora_to_output=True, use_dora=True)
        large = models.qlora_llama3_1_8b(lora_rank=16)
    hidden, kv, inner, vocab = 2048, 512, 8192, 128_256
    pairs = [(hidden, hidden), (hidden, kv), (hidden, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    per_layer = sum(64 * (i + o) for i, o in pairs)
    assert per_layer * 16 == 42_467_328
    assert count(adapter_parameters(model).values()) == 42_467_328
    assert count(model.parameters()) == 1_235_814_400 + 42_467_328
    magnitudes = 16 * sum(o for _, o in pairs) + vocab
    assert count(adapter_parameters(dora).values()) == 42_467_328 + 64 * (hidden + vocab) + magnitudes
    eight = [(4096, 4096), (4096, 1024), (4096, 4096), (4096, 14_336), (4096, 14_336), (14_336, 4096)]
    assert count(adapter_parameters(large).values()) == 32 * 16 * sum(i + o for i, o in eight)
    assert all(parameter.is_meta for parameter in large.parameters())
    assert large.layers[0].mlp.up_proj.quantize_base and not isinstance(large.output, LoRALinear)


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_attn_modules": ["q_proj"]}, {"q_proj"}),
        ({"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_output": True}, {"q_proj", "v_proj", "output"}),
        ({"lora_attn_modules": ["k_proj"], "apply_lora_to_mlp": True}, {"k_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"lora_attn_modules": [], "apply_lora_to_output": True}, {"output"}),
        ({"apply_lora_to_mlp": True}, {"gate_proj", "up_proj", "down_proj"}),
        ({"apply_lora_to_mlp": False}, {"q_proj", "v_proj", "output_proj"}),
        ({}, {"q_proj", "v_proj", "output_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_what_is_listed_is_adapted_and_nothing_else(settings: dict[str, object], expected: set[str]) -> None:
    """As with torchtune's builders: its feed-forward and head take part only where they are named."""
    names = models.adapted_linears(apply_lora(tiny(), **settings))  # type: ignore[arg-type]
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(names) == 2 * len(expected - {"output"}) + ("output" in expected)


def test_every_builder_has_its_adapted_ones() -> None:
    settings = inspect.signature(apply_lora).parameters
    names = ["llama", *models.LLAMA.sizes]
    assert len(names) == 14
    for name in names:
        own = inspect.signature(getattr(models, name)).parameters
        for prefix in ("lora", "qlora"):
            found = inspect.signature(getattr(models, f"{prefix}_{name}")).parameters
            assert list(found) == [*own, *(setting for setting in settings if setting != "model")]
            assert found["quantize_base"].default is (prefix == "qlora")


def test_a_config_names_the_wrong_argument() -> None:
    node = {"_component_": "kdtune.models.lora_llama3_2_1b", "lora_rnk": 8, "lora_attn_modules": ["q_poj"]}
    with pytest.raises(ConfigError) as caught:
        instantiate(node)
    assert "did you mean 'lora_rank'" in str(caught.value) or "lora_rank" in str(caught.value)
    assert "q_poj" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "lora_rank=0: must be 1"),
        ({"lora_rank": -3}, "lora_rank=-3"),
        ({"lora_alpha": 0}, "lora_alpha=0: must be above 0"),
        ({"lora_alpha": -1.5}, "lora_alpha=-1.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0: must be at least 0 and below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_attn_modules": ["q_proj", "o_proj"]}, r"'o_proj'\] unknown; a list of q_proj"),
        ({"lora_attn_modules": "q_proj"}, "'q_proj' unknown; a list of"),
        ({"lora_attn_modules": [], "apply_lora_to_mlp": False}, "no module to adapt"),
        ({"lora_attn_modules": []}, "no module to adapt"),
    ],
)
def test_bad_settings_are_refused_before_anything_changes(settings: dict[str, object], message: str) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        apply_lora(model, **settings)  # type: ignore[arg-type]
    assert not has_adapters(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_go_on_once() -> None:
    with pytest.raises(ConfigError, match="has adapters already"):
        apply_lora(apply_lora(tiny()))


def test_adapters_go_on_plain_linears_only() -> None:
    model = tiny()
    model.layers[1].mlp.up_proj = nn.Sequential(nn.Linear(32, 64))  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj: is a Sequential"):
        apply_lora(model)
    assert not has_adapters(model)


@pytest.mark.parametrize("use_dora", KINDS)
def test_copies_are_equal_and_apart(use_dora: bool) -> None:
    model = trained(apply_lora(tiny(), apply_lora_to_output=True, use_dora=use_dora))
    twin = copy.deepcopy(model)
    expected = model(TOKENS)
    assert torch.equal(twin(TOKENS), expected)
    assert twin.output.weight is twin.tok_embeddings.weight
    with torch.no_grad():
        twin.output.lora_b.weight.add_(1)
    assert torch.equal(model(TOKENS), expected) and not torch.equal(twin(TOKENS), expected)


def test_layers_kept_keep_their_adapters() -> None:
    model = trained(apply_lora(tiny(), apply_lora_to_output=True))
    kept = keep_layers(model, [1])
    expected = kept(TOKENS)
    assert set(adapter_parameters(kept)) == {
        name.replace("layers.1.", "layers.0.") for name in adapter_parameters(model) if "layers.0." not in name
    }
    torch.testing.assert_close(models.merge_adapters(kept)(TOKENS), expected, rtol=0, atol=1e-5)
    assert has_adapters(model)


def test_weights_for_saving_leave_the_model_alone() -> None:
    model = trained(apply_lora(tiny(), apply_lora_to_output=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: compute() for name, compute in models.merged_weights(model).items()}
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    merged = models.merge_adapters(model).state_dict()
    assert weights.keys() == merged.keys()
    assert all(torch.equal(weights[name], merged[name]) for name in merged)


def test_half_precision_merges_in_single() -> None:
    model = trained(apply_lora(tiny().to(torch.bfloat16), lora_rank=4, lora_alpha=3.0))
    linear = model.layers[0].attn.q_proj
    exact = linear.weight.double() + 0.75 * linear.lora_b.weight.double() @ linear.lora_a.weight.double()
    merged = linear.merged_weight()
    assert merged.dtype == torch.bfloat16
    error = (merged.double() - exact).abs()
    assert (error <= exact.abs() * 2.0**-8).all(), "rounded more than once"


@pytest.mark.parametrize("use_dora", KINDS)
def test_compiled_layers_compute_the_same(use_dora: bool) -> None:
    from kdtune.parallel import apply_activation_checkpointing

    model = trained(apply_lora(tiny(), use_dora=use_dora))
    plain = copy.deepcopy(model)
    apply_activation_checkpointing(model)
    for layer in model.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    model(TOKENS).square().sum().backward()
    plain(TOKENS).square().sum().backward()
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, parameter in adapter_parameters(plain).items():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
