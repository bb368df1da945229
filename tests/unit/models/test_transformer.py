"""The decoder: sizes, cache, masks, ties, dtypes."""

import copy
import dataclasses
import inspect
import math

import pytest
import torch

from kdtune import models
from kdtune.errors import ConfigError
from kdtune.models import LLAMA, KVCache, Transformer
from kdtune.models.transformer import FeedForward

PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
}


def tiny(**changes) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "intermediate_dim": 24}
    model = models.llama(**(sizes | {"num_kv_heads": 2, "rope_base": 100.0} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


def token_ids(*shape) -> torch.Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_every_size_has_a_builder_and_a_count():
    assert LLAMA.sizes.keys() == PARAMETERS.keys()
    assert set(dir(models)) >= LLAMA.sizes.keys()


@pytest.mark.parametrize("name", ["rope_base", "norm_eps", "max_seq_len"])
def test_what_a_size_of_ones_own_leaves_out_is_llama_3s(name):
    assert inspect.signature(models.llama).parameters[name].default == getattr(LLAMA.sizes["llama3_8b"][1], name)


def test_state_dict_names():
    names = set(tiny().state_dict())
    layer = ["attn_norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp_norm"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    assert names == expected | {"tok_embeddings.weight", "norm.weight", "output.weight"}


def test_fresh_weights_are_usable():
    torch.manual_seed(0)
    model = models.llama(vocab_size=500, embed_dim=64, num_layers=2, num_heads=4, intermediate_dim=96)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    tokens = torch.randint(0, 500, (2, 20))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(500), rel=0.05)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 7, 4]])
@torch.no_grad()
def test_cache_gives_the_same_logits(chunks):
    model, tokens = tiny(), token_ids(3, 12)
    expected = model(tokens)
    cache = KVCache(model.config, 3, 12)
    got = [model(part, kv_cache=cache) for part in tokens.split(chunks, dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 7, 4]])
@torch.no_grad()
def test_a_cache_takes_memory_for_what_it_holds(chunks, monkeypatch):
    """A text may be as long as the context, and ends long before."""
    monkeypatch.setattr("kdtune.models.kv_cache._FIRST_ROOM", 2)
    model, tokens = tiny(), token_ids(3, 12)
    cache = KVCache(model.config, 3, 10**12)
    got = [model(part, kv_cache=cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_truncated_cache_goes_on_from_there():
    model, tokens = tiny(), token_ids(1, 10)
    cache = KVCache(model.config, 1, 10)
    model(tokens.flip(1), kv_cache=cache)
    cache.truncate(0)
    model(tokens[:, :6], kv_cache=cache)
    model(tokens[:, :3], kv_cache=cache)
    cache.truncate(6)
    torch.testing.assert_close(model(tokens[:, 6:], kv_cache=cache), model(tokens)[:, 6:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="length=11; allowed: 0 to 10"):
        cache.truncate(11)


@torch.no_grad()
def test_overflowing_cache_is_an_error_and_changes_nothing():
    model = tiny()
    cache = KVCache(model.config, 1, 8)
    model(token_ids(1, 6), kv_cache=cache)
    with pytest.raises(ValueError, match="6 tokens held and 3 new ones; it has room for 8"):
        model(token_ids(1, 3), kv_cache=cache)
    assert cache.length == 6
    with pytest.raises(ValueError, match="batch of 2 sequences; this cache was made for 1"):
        model(token_ids(2, 1), kv_cache=cache)


@torch.no_grad()
def test_a_token_sees_only_earlier_ones():
    model, tokens = tiny(), token_ids(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 31
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@torch.no_grad()
def test_causal_mask_is_the_default():
    model, tokens = tiny(), token_ids(2, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    for mask in (causal, causal.expand(2, 9, 9)):
        torch.testing.assert_close(model(tokens, mask=mask), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_block_mask_and_positions_keep_packed_documents_apart():
    model, first, second = tiny(), token_ids(1, 5), token_ids(1, 7)
    documents = torch.tensor([0] * 5 + [1] * 7)
    mask = (documents[:, None] == documents) & torch.ones(12, 12, dtype=torch.bool).tril()
    positions = torch.cat((torch.arange(5), torch.arange(7)))
    packed = model(torch.cat((first, second), dim=1), mask=mask[None], input_pos=positions)
    torch.testing.assert_close(packed[:, :5], model(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(second), atol=1e-5, rtol=1e-5)
    batched = model(torch.cat((first, second), dim=1), mask=mask[None], input_pos=positions[None])
    assert torch.equal(batched, packed)


@torch.no_grad()
def test_only_distances_between_positions_matter():
    model, tokens = tiny(), token_ids(1, 8)
    shifted = model(tokens, input_pos=torch.arange(8) + 17)
    torch.testing.assert_close(shifted, model(tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(tokens, input_pos=torch.arange(8) * 2), shifted, atol=1e-2)


@torch.no_grad()
def test_hidden_states_times_the_head_are_the_logits():
    model, tokens = tiny(), token_ids(2, 4)
    hidden = model(tokens, return_hidden=True)
    assert hidden.shape == (2, 4, 16)
    assert torch.equal(model.output(hidden), model(tokens))


@torch.no_grad()
def test_attention_is_the_textbook_formula():
    from kdtune.models.attention import attend

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    expected = torch.empty(2, 6, 5, 8, dtype=torch.float64)
    for batch in range(2):
        for head in range(6):
            for t in range(5):
                keys, values = k[batch, head // 3, : t + 1].double(), v[batch, head // 3, : t + 1].double()
                weights = (keys @ q[batch, head, t].double() / math.sqrt(8)).softmax(0)
                expected[batch, head, t] = weights @ values
    torch.testing.assert_close(attend(q, k, v, None).double(), expected, atol=1e-6, rtol=1e-5)


def test_tie_survives_materialization():
    with torch.device("meta"):
        model = models.llama(
            vocab_size=31, embed_dim=16, num_layers=1, num_heads=2, intermediate_dim=24, tie_embeddings=True
        )
    assert model.output.weight is model.tok_embeddings.weight
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.output.weight is model.tok_embeddings.weight
    model.reset_parameters()
    model(token_ids(1, 5)).logsumexp(-1).sum().backward()
    untied = tiny(num_layers=1, num_heads=2, rope_base=model.config.rope_base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untied.load_state_dict(state)
    untied(token_ids(1, 5)).logsumexp(-1).sum().backward()
    expected = untied.output.weight.grad + untied.tok_embeddings.weight.grad
    torch.testing.assert_close(model.output.weight.grad, expected)


def test_tie_survives_deepcopy_and_dtype():
    model = tiny(tie_embeddings=True).to(torch.bfloat16)
    for each in (model, copy.deepcopy(model)):
        assert each.output.weight is each.tok_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny().parameters()) - 31 * 16


@torch.no_grad()
def test_rope_tables_are_right_after_meta_construction_and_in_low_precision():
    reference = tiny()
    with torch.device("meta"):
        model = Transformer(reference.config)
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    assert torch.equal(model(token_ids(1, 9)), reference(token_ids(1, 9)))
    positions = torch.tensor([4095, 4096])
    expected = reference.rope(positions, torch.float32)[0]
    cos = model.to(torch.bfloat16).rope(positions, torch.bfloat16)[0]
    assert torch.equal(cos, expected.to(torch.bfloat16))
    assert not torch.equal(cos[0], cos[1])


def test_beyond_max_seq_len_forward_goes_on():
    model = tiny(max_seq_len=4)
    assert model(token_ids(1, 9)).isfinite().all()


def test_float64_is_not_rounded():
    model = tiny().double()
    tokens = token_ids(1, 6)
    exact = model(tokens)
    assert exact.dtype == torch.float64
    # One ulp of fp32 anywhere in the norms would show: they are scale invariant up to eps.
    model.tok_embeddings.weight.data[tokens] *= 1 + 1e-12
    assert 0 < (model(tokens) - exact).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5: must be even"),
        ({"num_layers": 0}, "num_layers=0: must be above 0"),
        ({"rope_base": -1.0}, "rope_base=-1.0"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny().config, **changes)


@pytest.mark.parametrize("tie", [True, False])
def test_the_number_of_parameters_is_that_of_the_model(tie: bool) -> None:
    model = models.llama(
        vocab_size=33, embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_dim=20, max_seq_len=8,
        tie_embeddings=tie,
    )  # fmt: skip
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_keeps_no_activation_and_has_autograds_gradient_to_the_bit(activation, dtype):
    config = dataclasses.replace(tiny().config, activation=activation)
    mlp = FeedForward(config).to(dtype)
    hidden = torch.randn(1, 5, config.embed_dim, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = mlp(hidden)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, [hidden, *mlp.parameters()], gradient)

    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    act = (
        torch.nn.functional.silu if activation == "silu" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )
    plain = mlp.down_proj(act(gate) * up)
    assert torch.equal(out, plain)
    for one, other in zip(found, torch.autograd.grad(plain, [hidden, *mlp.parameters()], gradient), strict=True):
        assert torch.equal(one, other)
    # The gate's input, the other factor, and their product, which the last linear reads.
    assert len({one.data_ptr() for one in kept if one.numel() == 5 * config.intermediate_dim}) == 3
